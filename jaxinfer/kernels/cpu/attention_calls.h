// Attention as XLA calls it.

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
  if (keys.element_type() == ffi::DataType::U16) return with(attend<float, bf16>);  // its bits
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
