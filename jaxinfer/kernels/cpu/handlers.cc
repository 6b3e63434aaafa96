// XLA FFI handlers of the CPU kernels. What they compute is said in __init__.py; how, in micro.h.

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

#define INLINE inline __attribute__((always_inline))
#define APART __attribute__((noinline))

namespace {

struct bf16 {
  uint16_t bits;
};

struct nibbles {  // of int4
  uint8_t bits;
};

struct fp8 {  // e4m3fn: no infinities; NaN, which no weight is, is read as 480
  uint8_t bits;
};

template <class Weight, class Out>
struct Part {  // of products: some tokens, w [columns, K] and out [tokens, columns]
  const Weight* w;
  Out* out;
  int64_t columns;
  // Of int4, for each `group` columns: [columns, K / group]; zeros is null where the scheme has none.
  const float* scales;
  const uint8_t* exponents;  // or, instead of scales, powers of two, plus 127
  const int8_t* zeros;
  const float* table;  // what values stand for; null: themselves
  int64_t group;
  int64_t token, tokens;  // the first of them, and how many
};

INLINE float power(uint8_t exponent) {
  const uint32_t bits = (uint32_t)exponent << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Part>
INLINE float scale_of(const Part& part, int64_t block) {
  return part.exponents ? power(part.exponents[block]) : part.scales[block];
}

template <class Weight, class Out>
using Parts = std::vector<Part<Weight, Out>>;

constexpr int64_t AHEAD = 4096;      // bytes: how far ahead weights are fetched
constexpr int64_t FEW = 8;          // tokens, below which each weight is used as it is read
constexpr int64_t MANY = 16;        // tokens, from which on activations may be rounded
constexpr int64_t SMALL = 1 << 16;  // products that are done before another thread has woken up
constexpr int64_t EXACT = 1024;     // products of int8 whose sum float32 has exactly: 1024 * 127 * 128 < 2**24
constexpr int64_t CACHED = 1 << 18; // bytes of tokens that meet all weights before others do
constexpr int64_t COPIED = 64;      // tokens, from which on weights are put where they follow each other

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
INLINE float to_float(fp8 x) {
  const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  const float size = exponent ? (8 + mantissa) * 0x1p-10f * (float)(1 << exponent) : mantissa * 0x1p-9f;
  return x.bits & 0x80 ? -size : size;
}

INLINE int32_t total_of(const int8_t* x, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; i++) total += x[i];
  return total;
}
template <class T>
INLINE int32_t total_of(const T*, int64_t) { return 0; }

// Calls `call(i, n)` from `first` to `last` with the largest of these sizes n that is left, a constant.
template <int SIZE, int... SMALLER, class Call>
INLINE void in_steps(int64_t first, int64_t last, const Call& call) {
  for (; first + SIZE <= last; first += SIZE) call(first, std::integral_constant<int, SIZE>());
  if constexpr (sizeof...(SMALLER) > 0) in_steps<SMALLER...>(first, last, call);
}

// Kept by each thread from call to call: fresh memory of this size costs more than filling it.
void* buffer(int64_t bytes) {
  thread_local std::unique_ptr<char, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = (bytes + 63) / 64 * 64;
    kept.reset((char*)std::aligned_alloc(64, size));
  }
  return kept.get();
}

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

struct Attention {
  const void* q;  // [tokens, kv_heads, group, dim], of float where there are pages
  void* out;
  const float* sinks;                          // [kv_heads, group], or null
  const float *k_scales, *v_scales;            // [pages, kv_heads, page_size], or null
  const int32_t *q_start, *kv_len, *pages;     // [rows + 1], [rows] and [rows, table]; null: keys are in the stream
  int64_t kv_heads, group, dim, page_size, table, window;
  float scale, cap;  // of scores; where cap is not 0 they are scale * tanh(cap * score)
  int64_t stride;    // from one key to the next
  bool causal = true;
  const float* bias = nullptr;  // of distances from -furthest to furthest [kv_heads, group, 2 * furthest + 1], or null
  int64_t furthest = 0;

  // Where a query of a row begins, of those that are numbered by token and then by head.
  int64_t place(int64_t row, int64_t head, int64_t query) const {
    return (((q_start[row] + query / group) * kv_heads + head) * group + query % group) * dim;
  }

  void set_scale(float of_scores, float soft_cap) {
    scale = soft_cap > 0 ? soft_cap : of_scores;
    cap = soft_cap > 0 ? std::max(of_scores / soft_cap, FLT_MIN) : 0;
  }
};

template <class Weight>
struct LowRank {  // of one weight: b [S, R, columns], z [T, R], and out [T, columns], which has the weight's own products
  const Weight *a, *b;
  const float *gain, *shift;  // [S, columns], or null
  const float* scales;        // [columns], of the weight's own products; or null
  float *z, *out;
  int64_t columns;
};

struct Neighbours {  // tokens from `first` to `last` with one adapter, which they meet together, or none: -1
  int64_t slot, first, last;
};

constexpr int64_t MOST_NEIGHBOURS = 8;
constexpr int64_t MOST_QUERIES = 128;  // of a token that have one key

namespace portable {
#define LEVEL 0
#define LANES 4
#include "micro.h"
#include "attention.h"
#include "low_rank.h"
#undef LEVEL
#undef LANES
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LEVEL 1
#define LANES 8
#include "micro.h"
#include "attention.h"
#include "low_rank.h"
#undef LEVEL
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
namespace avx512 {
#define LEVEL 2
#define LANES 16
#include "micro.h"
#include "attention.h"
#include "low_rank.h"
#undef LEVEL
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif


int level_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> level{level_of_machine()};

// Calls `call` of the best level: avx512::name, avx2::name or portable::name.
#if defined(__x86_64__)
#define AT_LEVEL(...) (level == 2 ? avx512::__VA_ARGS__ : level == 1 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define AT_LEVEL(...) portable::__VA_ARGS__
#endif

using Arguments = ffi::RemainingArgs;
using Table = ffi::Span<const float>;
using Results = ffi::RemainingRets;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// Of a call: x [T, K], and a weight [N, K] of each part, or experts [E, N, K] where there are sizes: how many tokens each
// expert has, which come in their order; what comes after them is nobody's.
struct Operands {
  ffi::ThreadPool pool;
  bool rounds;
  ffi::AnyBuffer x;
  const int32_t* sizes;
  int64_t experts;
  const Beside* beside = nullptr;
};

std::atomic<int64_t> experts_read{0};  // bytes of their weights, without scales

// Of parts with the weights of all experts, one for each that has tokens. Outputs of the others are zeros.
template <class Weight, class Out>
Parts<Weight, Out> of_experts(const Operands& call, const Parts<Weight, Out>& parts) {
  const int64_t depth = call.x.dimensions()[1], held = std::is_same_v<Weight, nibbles> ? depth / 2 : depth;
  Parts<Weight, Out> owned;
  for (Part<Weight, Out> part : parts) {
    const int64_t tokens = part.tokens;
    part.token = 0;
    for (int64_t e = 0; e < call.experts; e++) {
      part.tokens = std::max(call.sizes[e], 0);
      if (part.tokens) {
        owned.push_back(part);
        experts_read += part.columns * held * sizeof(Weight);
      }
      part.token += part.tokens;
      part.out += part.tokens * part.columns;
      part.w += part.columns * held;
      if (part.scales) part.scales += part.columns * (depth / part.group);
      if (part.exponents) part.exponents += part.columns * (depth / part.group);
      if (part.zeros) part.zeros += part.columns * (depth / part.group);
    }
    std::memset(part.out, 0, (tokens - part.token) * part.columns * sizeof(Out));
  }
  return owned;
}

template <class X, class Weight, class Out>
ffi::Error product(const Operands& call, Parts<Weight, Out> parts) {
  const X* x = (const X*)call.x.untyped_data();
  const int64_t tokens = call.x.dimensions()[0], depth = call.x.dimensions()[1];
  int64_t columns = 0, used = call.sizes ? 0 : tokens;
  for (const auto& part : parts) columns += part.columns;
  for (int64_t e = 0; e < call.experts; e++) used += std::max(call.sizes[e], 0);
  if (used > tokens) return wrong("jaxinfer_grouped_dot: the sizes are of more tokens than there are");
  Threads threads(call.pool, call.beside);
  if (used * depth * columns < SMALL) threads.count = 1;
  if (call.sizes) parts = of_experts(call, parts);
  AT_LEVEL(products<X, Weight, Out>)(threads, x, tokens, depth, parts, call.rounds);
  return ffi::Error::Success();
}

template <class X, class Weight, class Out>
ffi::Error with_weights(const Operands& call, Arguments weights, Results outs) {
  Parts<Weight, Out> parts;
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = *weights.get<ffi::AnyBuffer>(i * (weights.size() / outs.size()));
    parts.push_back({(const Weight*)w.untyped_data(), (Out*)(*outs.get<ffi::AnyBuffer>(i))->untyped_data(),
                     w.dimensions()[w.dimensions().size() - 2], nullptr, nullptr, nullptr, nullptr, 0, 0,
                     call.x.dimensions()[0]});
  }
  return product<X>(call, parts);
}

// Whether an array is [N, K], or [E, N, K] of as many experts as there are sizes.
bool fits(const Operands& call, ffi::AnyBuffer::Dimensions shape) {
  return shape.size() == (call.sizes ? 3 : 2) && (!call.sizes || shape[0] == call.experts);
}

// Of each output there is a weight, and perhaps something else after it.
ffi::Error any_dot(const Operands& call, Arguments weights, Results outs) {
  using ffi::DataType;
  const char* shapes = "jaxinfer_dot: x must be [T, K], each w [N, K] or [E, N, K], of one type, and what comes out [T, N]";
  const size_t each = outs.size() ? weights.size() / outs.size() : 0;
  if (each == 0 || weights.size() != each * outs.size()) return wrong(shapes);
  const DataType kind = weights.get<ffi::AnyBuffer>(0)->element_type(), of = call.x.element_type();
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = *weights.get<ffi::AnyBuffer>(i * each);
    const auto in = call.x.dimensions();
    if (in.size() != 2 || !fits(call, w.dimensions()) || in[1] != w.dimensions().back() || w.element_type() != kind ||
        (int64_t)(*outs.get<ffi::AnyBuffer>(i))->element_count() != in[0] * w.dimensions()[w.dimensions().size() - 2])
      return wrong(shapes);
  }
  auto are = [&](DataType a, DataType b) { return of == a && kind == b; };
  auto with = [&](auto each) { return each(call, weights, outs); };
  if (are(DataType::S8, DataType::S8)) return with(with_weights<int8_t, int8_t, int32_t>);
  if (are(DataType::F32, DataType::S8)) return with(with_weights<float, int8_t, float>);
  if (are(DataType::F32, DataType::BF16)) return with(with_weights<float, bf16, float>);
  if (are(DataType::F32, DataType::F8E4M3FN)) return with(with_weights<float, fp8, float>);
  if (are(DataType::F32, DataType::F32)) return with(with_weights<float, float, float>);
  if (are(DataType::BF16, DataType::S8)) return with(with_weights<bf16, int8_t, float>);
  if (are(DataType::BF16, DataType::BF16)) return with(with_weights<bf16, bf16, float>);
  if (are(DataType::BF16, DataType::F8E4M3FN)) return with(with_weights<bf16, fp8, float>);
  return wrong("jaxinfer_dot: there is no product of these types");
}

// Of each weight there are values, scales, and zeros if the scheme has them. table: what values stand for; empty:
// themselves, in two's complement.
ffi::Error any_dot_int4(const Operands& call, Table table, Arguments weights, Results outs) {
  const char* shapes = "jaxinfer_dot_int4: x must be [T, K], w [N, K/2] and scales (and zeros) [N, K/(32 n)], or [E, ...]";
  if (table.size() != 0 && table.size() != 16) return wrong("jaxinfer_dot_int4: a table must have 16 numbers");
  const size_t each = outs.size() ? weights.size() / outs.size() : 0;
  const auto in = call.x.dimensions();
  if (each < 2 || each > 3 || weights.size() != each * outs.size() || in.size() != 2) return wrong(shapes);
  Parts<nibbles, float> parts;
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = weights.get<ffi::Buffer<ffi::U8>>(i * each);
    const auto scales = weights.get<ffi::AnyBuffer>(i * each + 1);
    if (!w.has_value() || !scales.has_value()) return wrong(shapes);
    const bool powers = scales->element_type() == ffi::DataType::F8E8M0FNU;
    if (!powers && scales->element_type() != ffi::DataType::F32) return wrong(shapes);
    const auto held = w->dimensions(), some = scales->dimensions();
    if (!fits(call, held) || !fits(call, some)) return wrong(shapes);
    const int64_t rows = held[held.size() - 2], blocks = some.back();
    if (in[1] != 2 * held.back() || some[some.size() - 2] != rows || blocks < 1 || in[1] % blocks ||
        in[1] / blocks % 32)
      return wrong(shapes);
    const int8_t* zeros = nullptr;
    if (each == 3) {
      const auto given = weights.get<ffi::Buffer<ffi::S8>>(i * each + 2);
      if (!given.has_value() || given->element_count() != scales->element_count()) return wrong(shapes);
      zeros = given->typed_data();
    }
    parts.push_back({(const nibbles*)w->typed_data(), (float*)(*outs.get<ffi::AnyBuffer>(i))->untyped_data(), rows,
                     powers ? nullptr : (const float*)scales->untyped_data(),
                     powers ? (const uint8_t*)scales->untyped_data() : nullptr, zeros,
                     table.size() ? table.begin() : nullptr, in[1] / blocks, 0, in[0]});
  }
  if (call.x.element_type() == ffi::DataType::F32) return product<float>(call, parts);
  if (call.x.element_type() == ffi::DataType::BF16) return product<bf16>(call, parts);
  return wrong("jaxinfer_dot_int4: x must be float32 or bfloat16");
}

ffi::Error dot(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, Arguments weights, Results outs) {
  if (weights.size() != outs.size()) return wrong("jaxinfer_dot: there must be as many weights as products");
  return any_dot({pool, rounds, x, nullptr, 0}, weights, outs);
}

ffi::Error dot_int4(ffi::ThreadPool pool, bool rounds, Table table, ffi::AnyBuffer x, Arguments weights, Results outs) {
  return any_dot_int4({pool, rounds, x, nullptr, 0}, table, weights, outs);
}

using Sizes = ffi::Buffer<ffi::S32>;

ffi::Error grouped(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, Sizes sizes, Arguments weights, Results outs) {
  if (weights.size() != outs.size()) return wrong("jaxinfer_grouped_dot: there must be as many weights as products");
  return any_dot({pool, rounds, x, sizes.typed_data(), (int64_t)sizes.element_count()}, weights, outs);
}

ffi::Error grouped_int4(ffi::ThreadPool pool, bool rounds, Table table, ffi::AnyBuffer x, Sizes sizes,
                        Arguments weights, Results outs) {
  const auto count = (int64_t)sizes.element_count();
  return any_dot_int4({pool, rounds, x, sizes.typed_data(), count}, table, weights, outs);
}

ffi::Error take(ffi::AnyBuffer table, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = table.dimensions();
  if (shape.size() != 2 || shape[0] < 1) return wrong("jaxinfer_take: the table must be [V, D]");
  const int64_t row = table.size_bytes() / shape[0];
  for (int64_t i = 0; i < (int64_t)ids.element_count(); i++) {
    const int64_t id = std::clamp<int64_t>(ids.typed_data()[i], 0, shape[0] - 1);
    std::memcpy((char*)out->untyped_data() + i * row, (const char*)table.untyped_data() + id * row, row);
  }
  return ffi::Error::Success();
}

// X: of queries and what comes out. Those of pages are float, and what has one token there is done by itself.
template <class X, class T>
void attend(Threads& threads, const Attention& a, const void* keys, const void* values, int64_t rows) {
  const auto one = AT_LEVEL(attend<T>);
  const auto some = AT_LEVEL(attend_some<X, T>);
  const int64_t pieces = 4 * std::max<int64_t>(threads.pool.num_threads(), 1) / a.kv_heads + 1;
  struct Task {
    int64_t row, first, lanes;  // the first of its queries, each of a token and a head; -1: the row has one token
  };
  std::vector<Task> tasks;
  for (int64_t row = rows - 1; row >= 0; row--) {  // the longest come first: those at the end of a prompt
    const int64_t tokens = a.kv_len[row] > 0 ? a.q_start[row + 1] - a.q_start[row] : 0;
    if (tokens == 1 && a.pages) {
      tasks.push_back({row, -1, 0});
    } else if (tokens > 0) {
      const int64_t queries = tokens * a.group, lanes = AT_LEVEL(task_lanes(queries, pieces));
      for (int64_t tile = (queries - 1) / lanes; tile >= 0; tile--) tasks.push_back({row, tile * lanes, lanes});
    }
  }
  auto attend_one = [&](int64_t i) {
    const Task& task = tasks[i / a.kv_heads];
    const int64_t head = i % a.kv_heads;
    if (task.first < 0)
      one(a, (const T*)keys, (const T*)values, task.row, head);
    else
      some(a, (const T*)keys, (const T*)values, task.row, head, task.first, task.lanes);
  };
  threads.run({{(int64_t)tasks.size() * a.kv_heads, attend_one}});
}

using Floats = ffi::Buffer<ffi::F32>;

// What is beside products [T, N] of x [T, K]: of each of them arguments a [S, R, K], b [S, R, N], and perhaps gain and
// shift [S, N], after `skip` others.
template <class Weight>
struct Adapters {
  Adapters(ffi::AnyBuffer x, float share) : x(x), share(share), tokens(x.dimensions()[0]), depth(x.dimensions()[1]) {}

  // Whether they fit. scaled: the last of the others are the scales [N] of products.
  bool read(ffi::Buffer<ffi::S32> slot, Arguments given, Results outs, size_t skip, bool scaled) {
    const size_t each = outs.size() ? given.size() / outs.size() : 0;
    if ((each != skip + 2 && each != skip + 4) || given.size() != each * outs.size() ||
        (int64_t)slot.element_count() != tokens || given.get<ffi::AnyBuffer>(skip)->dimensions().size() != 3)
      return false;
    const auto first = given.get<ffi::AnyBuffer>(skip)->dimensions();
    const int64_t slots = first[0];
    rank = first[1];
    low.resize(outs.size() * tokens * rank);
    for (size_t i = 0; i < outs.size(); i++) {
      const auto get = [&](size_t k) { return *given.get<ffi::AnyBuffer>(each * i + k); };
      const ffi::AnyBuffer out = **outs.get<ffi::AnyBuffer>(i), a = get(skip), b = get(skip + 1);
      const int64_t own = out.dimensions().back();
      const float* vectors[2] = {nullptr, nullptr};
      bool fits = (int64_t)out.element_count() == tokens * own && (int64_t)a.element_count() == slots * rank * depth &&
                  (int64_t)b.element_count() == slots * rank * own && a.element_type() == b.element_type();
      for (size_t k = skip + 2; k < each; k++) {
        fits &= (int64_t)get(k).element_count() == slots * own;
        vectors[k - skip - 2] = (const float*)get(k).untyped_data();
      }
      if (!fits || (scaled && (int64_t)get(skip - 1).element_count() != own)) return false;
      parts.push_back({(const Weight*)a.untyped_data(), (const Weight*)b.untyped_data(), vectors[0], vectors[1],
                       scaled ? (const float*)get(skip - 1).untyped_data() : nullptr, low.data() + i * tokens * rank,
                       (float*)out.untyped_data(), own});
      columns += own;
    }
    const int32_t* of = slot.typed_data();
    auto own = [&](int64_t t) { return of[t] < 0 || of[t] >= slots ? -1 : of[t]; };
    for (int64_t t = 0, end; t < tokens; t = end) {
      for (end = t + 1; end < tokens && end - t < MOST_NEIGHBOURS && own(end) == own(t);) end++;
      if (own(t) >= 0 || scaled) all.push_back({own(t), t, end});
      if (own(t) < 0) continue;
      used += end - t;
      for (const auto& part : parts)
        shrunk.push_back({part.a + of[t] * rank * depth, part.z + t * rank, rank, nullptr, nullptr, nullptr, nullptr, 0,
                          t, end - t});
    }
    return true;
  }

  Beside beside(const Threads& threads) const {
    return {AT_LEVEL(shrink<Weight>)(threads, (const float*)x.untyped_data(), depth, shrunk),
            AT_LEVEL(expand<Weight>)(threads, parts, all, rank, share)};
  }

  ffi::AnyBuffer x;
  float share;
  int64_t tokens, depth, rank = 0, columns = 0, used = 0;
  std::vector<float> low;
  std::vector<LowRank<Weight>> parts;
  std::vector<Neighbours> all;
  Parts<Weight, float> shrunk;
};

template <class Weight>
ffi::Error low_ranks(ffi::ThreadPool pool, float share, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slot, Arguments given,
                     Results outs) {
  Adapters<Weight> adapters(x, share);
  if (!adapters.read(slot, given, outs, 1, false))
    return wrong("jaxinfer_low_rank: base must be [T, N], a [S, R, K], b [S, R, N], gain and shift [S, N]");
  for (size_t i = 0; i < outs.size(); i++) {
    const auto base = *given.get<ffi::AnyBuffer>(i * (given.size() / outs.size()));
    void* out = (*outs.get<ffi::AnyBuffer>(i))->untyped_data();
    if (base.size_bytes() != (*outs.get<ffi::AnyBuffer>(i))->size_bytes())
      return wrong("jaxinfer_low_rank: base and what comes out must have one shape");
    if (out != base.untyped_data()) std::memcpy(out, base.untyped_data(), base.size_bytes());
  }
  Threads threads(pool);
  const int64_t sizes = adapters.depth * (int64_t)adapters.parts.size() + adapters.columns;
  if (adapters.used * adapters.rank * sizes < SMALL) threads.count = 1;
  const Beside beside = adapters.beside(threads);
  threads.run({beside.first, beside.last});
  return ffi::Error::Success();
}

// Products with weights of one kind, and perhaps their scales, and what is beside them: all at once.
template <class Weight>
ffi::Error adapted_dots(ffi::ThreadPool pool, bool rounds, bool scaled, float share, ffi::AnyBuffer x,
                        ffi::Buffer<ffi::S32> slot, Arguments given, Results outs) {
  Adapters<Weight> adapters(x, share);
  if (!adapters.read(slot, given, outs, scaled ? 2 : 1, scaled))
    return wrong("jaxinfer_adapted_dot: w must be [N, K], scales [N], a [S, R, K], b [S, R, N], gain and shift [S, N]");
  const Beside beside = adapters.beside(Threads(pool));
  return any_dot({pool, rounds, x, nullptr, 0, &beside}, given, outs);
}

// Calls `with` of the dtype that adapters are in, the `place`-th argument's.
template <class Call>
ffi::Error of_kind(ffi::AnyBuffer x, Arguments given, size_t place, const Call& with) {
  if (x.element_type() != ffi::DataType::F32 || x.dimensions().size() != 2 || given.size() <= place)
    return wrong("jaxinfer_low_rank: x must be [T, K], float32");
  const auto kind = given.get<ffi::AnyBuffer>(place)->element_type();
  if (kind == ffi::DataType::BF16) return with(bf16());
  if (kind == ffi::DataType::F32) return with(float());
  return wrong("jaxinfer_low_rank: adapters must be float32 or bfloat16");
}

ffi::Error low_rank(ffi::ThreadPool pool, float share, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slot, Arguments given,
                    Results outs) {
  return of_kind(x, given, 1, [&](auto kind) { return low_ranks<decltype(kind)>(pool, share, x, slot, given, outs); });
}

ffi::Error adapted_dot(ffi::ThreadPool pool, bool rounds, bool scaled, float share, ffi::AnyBuffer x,
                       ffi::Buffer<ffi::S32> slot, Arguments given, Results outs) {
  return of_kind(x, given, scaled ? 2 : 1, [&](auto kind) {
    return adapted_dots<decltype(kind)>(pool, rounds, scaled, share, x, slot, given, outs);
  });
}

const float* if_any(const Floats& x) { return x.element_count() ? x.typed_data() : nullptr; }

ffi::Error attention(ffi::ThreadPool pool, float scale, float soft_cap, int64_t window, Floats q, Floats sinks,
                     ffi::Buffer<ffi::S32> q_start, ffi::Buffer<ffi::S32> kv_len, ffi::Buffer<ffi::S32> pages,
                     ffi::AnyBuffer keys, ffi::AnyBuffer values, Arguments scales, ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = keys.dimensions(), queries = q.dimensions();
  if (shape.size() != 4 || queries.size() != 4 || shape[3] % 16 || queries[3] != shape[3] || queries[1] != shape[1] ||
      queries[2] > MOST_QUERIES || pages.dimensions().size() != 2 ||
      q_start.element_count() != kv_len.element_count() + 1 ||
      (sinks.element_count() && sinks.element_count() != size_t(queries[1] * queries[2])))
    return wrong("jaxinfer_attention: q must be [T, K, G, d], and keys and values [P, K, size, d]");
  Attention a{q.typed_data(),
              out->typed_data(),
              if_any(sinks),
              nullptr,
              nullptr,
              q_start.typed_data(),
              kv_len.typed_data(),
              pages.typed_data(),
              shape[1],
              queries[2],
              shape[3],
              shape[2],
              pages.dimensions()[1],
              window ? window : INT32_MAX,
              0,
              0,
              shape[3]};
  a.set_scale(scale, soft_cap);
  if (scales.size() == 2) {
    a.k_scales = scales.get<Floats>(0)->typed_data();
    a.v_scales = scales.get<Floats>(1)->typed_data();
  }
  std::memset(a.out, 0, out->size_bytes());
  Threads threads(pool);
  auto with = [&](auto call) {
    call(threads, a, keys.untyped_data(), values.untyped_data(), kv_len.element_count());
    return ffi::Error::Success();
  };
  if (keys.element_type() == ffi::DataType::F32) return with(attend<float, float>);
  if (keys.element_type() == ffi::DataType::BF16) return with(attend<float, bf16>);
  if (keys.element_type() == ffi::DataType::S8) return with(attend<float, int8_t>);
  return wrong("jaxinfer_attention: there is none for keys of this type");
}

ffi::Error attention_rows(ffi::ThreadPool pool, float scale, float soft_cap, int64_t window, bool causal,
                          ffi::AnyBuffer q, Floats sinks, Floats bias, ffi::Buffer<ffi::S32> q_start,
                          ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> out) {
  const auto queries = q.dimensions(), shape = keys.dimensions();
  const bool fits = queries.size() == 4 && shape.size() == 3 && queries[0] == shape[0] && queries[1] == shape[1] &&
                    queries[3] == shape[2] && shape[2] % 16 == 0 && queries[2] <= MOST_QUERIES;
  const auto kind = q.element_type();
  if (!fits || values.element_count() != keys.element_count() || out->element_count() != q.element_count() ||
      keys.element_type() != kind || values.element_type() != kind || out->element_type() != kind)
    return wrong("jaxinfer_attention_rows: q must be [T, K, G, d], and keys and values [T, K, d], of one type");
  const int64_t heads = queries[1] * queries[2], rows = (int64_t)q_start.element_count() - 1;
  if ((sinks.element_count() && (int64_t)sinks.element_count() != heads) || bias.element_count() % heads ||
      (bias.element_count() && bias.element_count() / heads % 2 == 0))
    return wrong("jaxinfer_attention_rows: sinks must be [K * G] and a bias [K * G, 2 D - 1]");
  std::vector<int32_t> lengths;
  int64_t products = 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t start = q_start.typed_data()[row], stop = q_start.typed_data()[row + 1];
    if (start < 0 || stop < start || stop > queries[0])
      return wrong("jaxinfer_attention_rows: rows must follow each other within the tokens");
    lengths.push_back(stop - start);
    products += (stop - start) * (stop - start) * heads * shape[2];
  }
  // A window that is no shorter than the stream is none, and doesn't overflow.
  const int64_t seen = window ? std::min<int64_t>(window, queries[0]) : queries[0];
  Attention a{q.untyped_data(),
              out->untyped_data(),
              if_any(sinks),
              nullptr,
              nullptr,
              q_start.typed_data(),
              lengths.data(),
              nullptr,
              shape[1],
              queries[2],
              shape[2],
              0,
              0,
              seen,
              0,
              0,
              shape[1] * shape[2],
              causal,
              if_any(bias),
              (int64_t)bias.element_count() / heads / 2};
  a.set_scale(scale, soft_cap);
  std::memset(a.out, 0, out->size_bytes());
  Threads threads(pool);
  if (products < SMALL) threads.count = 1;
  auto with = [&](auto call) {
    call(threads, a, keys.untyped_data(), values.untyped_data(), rows);
    return ffi::Error::Success();
  };
  if (kind == ffi::DataType::F32) return with(attend<float, float>);
  if (kind == ffi::DataType::BF16) return with(attend<bf16, bf16>);
  return wrong("jaxinfer_attention_rows: there is none of this type");
}

auto binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("rounds"); }
auto int4_binding() { return binding().Attr<Table>("table"); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot, dot, binding().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot_int4, dot_int4,
                              int4_binding().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_grouped_dot, grouped,
                              binding().Arg<ffi::AnyBuffer>().Arg<Sizes>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_grouped_dot_int4, grouped_int4,
                              int4_binding().Arg<ffi::AnyBuffer>().Arg<Sizes>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_take, take,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_low_rank, low_rank,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("share")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_adapted_dot, adapted_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("rounds")
                                  .Attr<bool>("scaled")
                                  .Attr<float>("share")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

auto attention_binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Attr<float>("soft_cap").Attr<int64_t>("window");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention, attention,
                              attention_binding()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention_rows, attention_rows,
                              attention_binding()
                                  .Attr<bool>("causal")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// The instruction set that is used, 0 to 2; set to at most `wanted`.
extern "C" int jaxinfer_level(int wanted) { return level = std::min(wanted, level_of_machine()); }

// Bytes of experts' weights that grouped products have read, and of no other expert's: a count for tests.
extern "C" int64_t jaxinfer_experts_read() { return experts_read; }
