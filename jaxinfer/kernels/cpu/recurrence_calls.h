// Recurrences and convolutions as XLA calls them.

using Ints = ffi::Buffer<ffi::S32>;

// Rows of a stream that go on from states, and those after them: where they were, or a copy.
struct Recurrence {
  // False if they are not right.
  bool find(Floats states, Ints q_start, Ints kv_len, Ints slots, Floats after, int64_t tokens) {
    const auto rows = (int64_t)kv_len.element_count();
    if ((int64_t)q_start.element_count() != rows + 1 || (int64_t)slots.element_count() != rows) return false;
    for (int64_t row = rows - 1; row >= 0; row--) {
      const int64_t first = q_start.typed_data()[row], last = q_start.typed_data()[row + 1];
      const int64_t length = kv_len.typed_data()[row], slot = slots.typed_data()[row];
      if (length <= 0 || first == last) continue;
      if (first < 0 || last < first || last > tokens || slot < 0 || slot >= states.dimensions()[0]) return false;
      runs.push_back({first, last, slot, length == last - first});
    }
    held = after.typed_data();
    if (held != states.typed_data()) std::memcpy(held, states.typed_data(), states.size_bytes());
    return true;
  }

  std::vector<Run> runs;  // of those that are live, the last first, among which the longest are
  float* held;
};

bool are(ffi::AnyBuffer::Dimensions shape, std::initializer_list<int64_t> wanted) {
  return std::equal(shape.begin(), shape.end(), wanted.begin(), wanted.end());
}

const char* WRONG_ROWS = "jaxinfer: rows must follow each other within the tokens, and have slots that there are";

ffi::Error linear_attention(ffi::ThreadPool pool, Floats states, Ints q_start, Ints kv_len, Ints slots, Floats q,
                            Floats k, Floats v, Floats decay, Arguments beta, ffi::Result<Floats> after,
                            ffi::Result<Floats> out) {
  const auto held = states.dimensions(), keys = q.dimensions();
  const char* shapes = "jaxinfer_linear_attention: q and k must be [T, K, d], v [T, H, D], states [slots, H, d, D]";
  if (held.size() != 4 || keys.size() != 3 || keys[1] < 1 || held[1] % keys[1] || beta.size() > 1) return wrong(shapes);
  const int64_t tokens = keys[0], heads = held[1], depth = held[2], width = held[3];
  if (!are(keys, {tokens, keys[1], depth}) || !are(k.dimensions(), {tokens, keys[1], depth}) ||
      !are(v.dimensions(), {tokens, heads, width}) || !are(decay.dimensions(), {tokens, heads}))
    return wrong(shapes);
  Recurrence rows;
  if (!rows.find(states, q_start, kv_len, slots, *after, tokens)) return wrong(WRONG_ROWS);
  LinearAttention a{q.typed_data(),    k.typed_data(), v.typed_data(), decay.typed_data(), nullptr,
                    out->typed_data(), rows.held,      keys[1],        heads,              depth,
                    width};
  if (beta.size()) {
    const auto given = beta.get<Floats>(0);
    if (!given.has_value() || !are(given->dimensions(), {tokens, heads})) return wrong(shapes);
    a.beta = given->typed_data();
  }
  std::memset(a.out, 0, out->size_bytes());
  const auto one = AT_LEVEL(recur);
  const int64_t columns = AT_LEVEL(COLUMNS), blocks = (width + columns - 1) / columns, each = heads * blocks;
  Threads threads(pool);
  if (tokens * heads * depth * width < SMALL) threads.count = 1;
  threads.run({{(int64_t)rows.runs.size() * each, [&](int64_t i) {
                  one(a, rows.runs[i / each], i % each / blocks, i % blocks * columns);
                }}});
  return ffi::Error::Success();
}

ffi::Error selective_scan(ffi::ThreadPool pool, Floats states, Ints q_start, Ints kv_len, Ints slots, Floats x,
                          Floats dt, Floats b, Floats c, Floats a, ffi::Result<Floats> after, ffi::Result<Floats> out) {
  const auto held = states.dimensions();
  const char* shapes = "jaxinfer_selective_scan: x and dt must be [T, C], b and c [T, N], a [C, N], states [slots, C, N]";
  if (held.size() != 3 || held[1] < 1) return wrong(shapes);
  const int64_t channels = held[1], size = held[2], tokens = x.element_count() / channels;
  if (!are(x.dimensions(), {tokens, channels}) || !are(dt.dimensions(), {tokens, channels}) ||
      !are(b.dimensions(), {tokens, size}) || !are(c.dimensions(), {tokens, size}) ||
      !are(a.dimensions(), {channels, size}))
    return wrong(shapes);
  Recurrence rows;
  if (!rows.find(states, q_start, kv_len, slots, *after, tokens)) return wrong(WRONG_ROWS);
  const SelectiveScan s{x.typed_data(),    dt.typed_data(), b.typed_data(), c.typed_data(), a.typed_data(),
                        out->typed_data(), rows.held,       channels,       size};
  std::memset(s.out, 0, out->size_bytes());
  const auto one = AT_LEVEL(scan);
  const int64_t lanes = AT_LEVEL(CHANNELS), each = (channels + lanes - 1) / lanes;
  Threads threads(pool);
  if (tokens * channels * size * 8 < SMALL) threads.count = 1;
  threads.run({{(int64_t)rows.runs.size() * each,
                [&](int64_t i) { one(s, rows.runs[i / each], i % each * lanes); }}});
  return ffi::Error::Success();
}

ffi::Error convolution(ffi::ThreadPool pool, Floats states, Ints q_start, Ints kv_len, Ints slots, Floats x,
                       Floats weight, Floats bias, ffi::Result<Floats> after, ffi::Result<Floats> out) {
  const auto kept = weight.dimensions(), held = states.dimensions();
  const int64_t width = kept.size() ? kept.back() : 0, channels = width ? weight.element_count() / width : 0;
  const int64_t tokens = x.dimensions().size() ? x.dimensions()[0] : 0;
  if (held.size() < 2 || held[1] != width - 1 || (int64_t)states.element_count() != held[0] * held[1] * channels ||
      (int64_t)x.element_count() != tokens * channels ||
      (bias.element_count() && (int64_t)bias.element_count() != channels))
    return wrong("jaxinfer_convolution: x must be [T, ...], a weight [..., width], states [slots, width - 1, ...]");
  Recurrence rows;
  if (!rows.find(states, q_start, kv_len, slots, *after, tokens)) return wrong(WRONG_ROWS);
  const Convolution c{x.typed_data(), weight.typed_data(), if_any(bias), out->typed_data(),
                      rows.held,      channels,            width};
  std::memset(c.out, 0, out->size_bytes());
  const auto some = AT_LEVEL(convolve);
  constexpr int64_t EACH = 64;  // channels
  Threads threads(pool);
  if (tokens * channels * width < SMALL) threads.count = 1;
  threads.run({{(channels + EACH - 1) / EACH,
                [&](int64_t i) { some(c, rows.runs, i * EACH, std::min((i + 1) * EACH, channels)); }}});
  return ffi::Error::Success();
}
