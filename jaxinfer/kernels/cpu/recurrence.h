// Recurrences over the stream of tokens, of each row one token after the other; included after attention.h, as that is.

constexpr int64_t COLUMNS = 32;  // of a state that a task has: of 128 rows they are half of the nearest cache

// Of a head the columns from `column` on, which need no others.
inline void recur(const LinearAttention& a, const Run& run, int64_t head, int64_t column) {
  constexpr int VECTORS = COLUMNS / LANES, UNROLL = LANES / 4;
  const int64_t some = std::min(a.width - column, COLUMNS), key = head / (a.heads / a.keys);
  float* state = (float*)buffer(4 * a.depth * COLUMNS);
  float* kept = a.states + (run.slot * a.heads + head) * a.depth * a.width + column;
  if (run.fresh || some < COLUMNS) std::fill(state, state + a.depth * COLUMNS, 0.0f);
  if (!run.fresh)
    for (int64_t i = 0; i < a.depth; i++) std::memcpy(state + i * COLUMNS, kept + i * a.width, 4 * some);
  for (int64_t t = run.first; t < run.last; t++) {
    const float *q = a.q + (t * a.keys + key) * a.depth, *k = a.k + (t * a.keys + key) * a.depth;
    const float keep = std::exp(a.decay[t * a.heads + head]);
    alignas(64) float staged[COLUMNS] = {};
    std::memcpy(staged, a.v + (t * a.heads + head) * a.width + column, 4 * some);
    Float added[VECTORS], sums[UNROLL][VECTORS] = {};
    for (int c = 0; c < VECTORS; c++) added[c] = load(staged + c * LANES);
    if (a.beta) {
      in_steps<UNROLL, 1>(0, a.depth, [&](int64_t i, auto rows) {
        for (int r = 0; r < rows; r++)
          for (int c = 0; c < VECTORS; c++) sums[r][c] += load(state + (i + r) * COLUMNS + c * LANES) * k[i + r];
      });
      for (int c = 0; c < VECTORS; c++) {
        for (int r = 1; r < UNROLL; r++) sums[0][c] += sums[r][c];
        added[c] = (added[c] - sums[0][c] * keep) * a.beta[t * a.heads + head];
      }
    }
    for (auto& row : sums)
      for (auto& total : row) total = Float{};
    in_steps<UNROLL, 1>(0, a.depth, [&](int64_t i, auto rows) {
      for (int r = 0; r < rows; r++)
        for (int c = 0; c < VECTORS; c++) {
          float* at = state + (i + r) * COLUMNS + c * LANES;
          const Float now = load(at) * keep + added[c] * k[i + r];
          store(at, now);
          sums[r][c] += now * q[i + r];
        }
    });
    for (int c = 0; c < VECTORS; c++) {
      for (int r = 1; r < UNROLL; r++) sums[0][c] += sums[r][c];
      store(staged + c * LANES, sums[0][c]);
    }
    std::memcpy(a.out + (t * a.heads + head) * a.width + column, staged, 4 * some);
  }
  for (int64_t i = 0; i < a.depth; i++) std::memcpy(kept + i * a.width, state + i * COLUMNS, 4 * some);
}

constexpr int64_t CHANNELS = LANES;  // of a scan's task

INLINE Float load_some(const float* from, int64_t count) {
  if (count == LANES) return load(from);
  float staged[LANES] = {};
  std::memcpy(staged, from, 4 * count);
  return load(staged);
}

// Of channels from `channel` on, as many as a vector has.
inline void scan(const SelectiveScan& s, const Run& run, int64_t channel) {
  const int64_t some = std::min<int64_t>(s.channels - channel, LANES), size = s.size;
  float* state = (float*)buffer(4 * 2 * size * LANES);
  float *rates = state + size * LANES, *kept = s.states + (run.slot * s.channels + channel) * size;
  std::fill(state, rates + size * LANES, 0.0f);
  for (int64_t i = 0; i < some; i++)
    for (int64_t n = 0; n < size; n++) {
      rates[n * LANES + i] = s.a[(channel + i) * size + n];
      if (!run.fresh) state[n * LANES + i] = kept[i * size + n];
    }
  for (int64_t t = run.first; t < run.last; t++) {
    const float *b = s.b + t * size, *c = s.c + t * size;
    const Float dt = load_some(s.dt + t * s.channels + channel, some);
    const Float added = load_some(s.x + t * s.channels + channel, some) * dt;
    Float total{};
    for (int64_t n = 0; n < size; n++) {
      const Float now = load(state + n * LANES) * exponential(dt * load(rates + n * LANES)) + added * b[n];
      store(state + n * LANES, now);
      total += now * c[n];
    }
    std::memcpy(s.out + t * s.channels + channel, &total, 4 * some);
  }
  for (int64_t i = 0; i < some; i++)
    for (int64_t n = 0; n < size; n++) kept[i * size + n] = state[n * LANES + i];
}

// Of one channel or a vector of them, all rows.
template <class Some>
void convolve_some(const Convolution& c, const std::vector<Run>& runs, int64_t channel) {
  constexpr int64_t COUNT = sizeof(Some) / 4;
  const int64_t before = c.width - 1;
  float* weights = (float*)buffer(4 * c.width * COUNT);
  for (int64_t i = 0; i < COUNT; i++)
    for (int64_t j = 0; j < c.width; j++) weights[j * COUNT + i] = c.weight[(channel + i) * c.width + j];
  const Some bias = c.bias ? load_as<Some>(c.bias + channel) : Some{};
  for (const Run& run : runs) {
    float* past = c.states + run.slot * before * c.channels + channel;
    auto seen = [&](int64_t i) {  // by the first token from `i` = 0 on
      if (i >= before) return load_as<Some>(c.x + (run.first + i - before) * c.channels + channel);
      return run.fresh ? Some{} : load_as<Some>(past + i * c.channels);
    };
    const int64_t tokens = run.last - run.first;
    for (int64_t t = 0; t < tokens; t++) {
      Some total = bias;
      for (int64_t j = 0; j < c.width; j++) total += load_as<Some>(weights + j * COUNT) * seen(t + j);
      store(c.out + (run.first + t) * c.channels + channel, total);
    }
    for (int64_t i = 0; i < before; i++) store(past + i * c.channels, seen(tokens + i));  // those before are older
  }
}

inline void convolve(const Convolution& c, const std::vector<Run>& runs, int64_t first, int64_t last) {
  for (; first + LANES <= last; first += LANES) convolve_some<Float>(c, runs, first);
  for (; first < last; first++) convolve_some<float>(c, runs, first);
}
