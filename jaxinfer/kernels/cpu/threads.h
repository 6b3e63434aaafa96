// Work on XLA's own threads.

// Runs `call(0)` to `call(tasks - 1)` of each stage on XLA's own threads and this one, all of a stage before the next, and
// returns when all are done. A thread that comes too late, because it was busy with something else, finds nothing to do.
struct Stage {
  int64_t tasks;
  std::function<void(int64_t)> call;
};

struct Beside {  // what else there is to do: with the first stage, and after the last
  Stage first, last;
};

struct Threads {
  explicit Threads(ffi::ThreadPool pool, const Beside* beside = nullptr)
      : pool(pool), count(std::max<int64_t>(pool.num_threads(), 1)), beside(beside) {}

  void run(std::vector<Stage> stages) {
    struct Progress {
      Stage stage;
      std::atomic<int64_t> next{0}, done{0};
    };
    struct Shared {
      explicit Shared(size_t count) : all(count) {}
      void work() {
        for (auto& at : all) {
          for (int64_t i; (i = at.next.fetch_add(1)) < at.stage.tasks;) {
            at.stage.call(i);
            at.done.fetch_add(1);
          }
          while (at.done.load() < at.stage.tasks) std::this_thread::yield();
        }
      }
      std::vector<Progress> all;
    };
    if (beside) {
      const Stage one = beside->first, other = stages.front();
      stages.front() = {one.tasks + other.tasks,
                        [=](int64_t i) { i < one.tasks ? one.call(i) : other.call(i - one.tasks); }};
      stages.push_back(beside->last);
    }
    auto shared = std::make_shared<Shared>(stages.size());
    int64_t most = 0;
    for (size_t i = 0; i < stages.size(); i++) {
      most = std::max(most, stages[i].tasks);
      shared->all[i].stage = std::move(stages[i]);
    }
    for (int64_t i = 1; i < std::min(count, most); i++) pool.Schedule([shared] { shared->work(); });
    shared->work();
  }

  ffi::ThreadPool pool;
  int64_t count;
  const Beside* beside;
};

// Cuts columns into about `pieces` for each thread, whole multiples of `rows`: of each `call(part, first, last)`.
template <class Parts, class Call>
Stage in_pieces(const Threads& threads, const Parts& parts, int64_t pieces, int64_t rows, const Call& call) {
  int64_t columns = 0, tasks = 0;
  for (const auto& part : parts) columns += part.columns;
  const int64_t each = (columns / (pieces * threads.count) / rows + 1) * rows;
  for (const auto& part : parts) tasks += (part.columns + each - 1) / each;
  return {tasks, [&parts, call, each](int64_t i) {
            auto part = parts.begin();
            for (int64_t own; i >= (own = (part->columns + each - 1) / each); part++) i -= own;
            call(*part, i * each, std::min((i + 1) * each, part->columns));
          }};
}
