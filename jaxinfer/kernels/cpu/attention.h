// Attention of each row's last token to its keys, where they are in the cache; included after micro.h, as that is.

INLINE Float exponential(Float x) {  // of what is at most 0
  x = x < -87.0f ? Float{} - 87.0f : x;
  const Float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2**23 rounds
  const Float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Float power = Float{} + 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * rest + term;
  return power * (Float)((__builtin_convertvector(whole, Int) + 127) << 23);
}

// Scores of queries with keys that follow each other: scores[q][k] = queries[q] . keys[k].
template <class T>
void score(const float* const* queries, int64_t count, const T* keys, int64_t some, int64_t dim, float* scores,
           int64_t span) {
  in_steps<4, 1>(0, count, [&](int64_t first, auto group) {
    in_steps<4, 1>(0, some, [&](int64_t k, auto size) {
      constexpr int GROUP = group, SIZE = size;
      Float total[GROUP][SIZE] = {};
      for (int64_t i = 0; i < dim; i += LANES)
        for (int n = 0; n < size; n++) {
          Float key = load(keys + (k + n) * dim + i);
          for (int m = 0; m < group; m++) total[m][n] += key * load(queries[first + m] + i);
        }
      for (int m = 0; m < group; m++)
        for (int n = 0; n < size; n++) scores[(first + m) * span + k + n] = sum(total[m][n]);
    });
  });
}

// out[q] += sum of weights[q][k] * values[k], of values that follow each other.
template <class T>
void gather(const float* weights, int64_t span, int64_t count, const T* values, int64_t some, int64_t dim,
            float* const* out) {
  in_steps<4, 1>(0, count, [&](int64_t first, auto group) {
    in_steps<4, 1>(0, dim / LANES, [&](int64_t chunk, auto size) {
      constexpr int GROUP = group, SIZE = size;
      Float total[GROUP][SIZE];
      for (int m = 0; m < group; m++)
        for (int c = 0; c < size; c++) total[m][c] = load(out[first + m] + (chunk + c) * LANES);
      for (int64_t k = 0; k < some; k++)
        for (int c = 0; c < size; c++) {
          Float value = load(values + k * dim + (chunk + c) * LANES);
          for (int m = 0; m < group; m++) total[m][c] += value * weights[(first + m) * span + k];
        }
      for (int m = 0; m < group; m++)
        for (int c = 0; c < size; c++) store(out[first + m] + (chunk + c) * LANES, total[m][c]);
    });
  });
}

// The last token of a row, and the query heads of one key/value head.
template <class T>
void attend(const Attention& a, const T* keys, const T* values, int64_t row, int64_t head) {
  const int64_t stop = a.kv_len[row], start = a.window ? std::max<int64_t>(stop - a.window, 0) : 0;
  const int64_t count = stop - start, span = (count + LANES - 1) / LANES * LANES;
  float* scores = (float*)buffer(4 * a.group * span);
  const float* queries[MOST_QUERIES];
  float* out[MOST_QUERIES];
  for (int64_t i = 0; i < a.group; i++) {
    const int64_t at = ((row * a.kv_heads + head) * a.group + i) * a.dim;
    queries[i] = a.q + at;
    out[i] = a.out + at;
  }
  auto runs = [&](auto call) {  // of keys that follow each other: those on a page
    for (int64_t k = start, some; k < stop; k += some) {
      some = std::min(stop - k, a.page_size - k % a.page_size);
      const int64_t page = a.pages[row * a.table + k / a.page_size];
      call(k - start, (page * a.kv_heads + head) * a.page_size + k % a.page_size, some);
    }
  };
  runs([&](int64_t k, int64_t at, int64_t some) {
    score(queries, a.group, keys + at * a.dim, some, a.dim, scores + k, span);
    if (a.k_scales)
      for (int64_t i = 0; i < a.group; i++)
        for (int64_t n = 0; n < some; n++) scores[i * span + k + n] *= a.k_scales[at + n];
  });
  for (int64_t i = 0; i < a.group; i++) {
    float* of = scores + i * span;
    std::fill(of + count, of + span, of[0]);
    Float tops = load(of), totals = {};
    for (int64_t k = LANES; k < span; k += LANES) tops = load(of + k) > tops ? load(of + k) : tops;
    float top = tops[0];
    for (int lane = 1; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
    for (int64_t k = 0; k < span; k += LANES) store(of + k, exponential((load(of + k) - top) * a.scale));
    std::fill(of + count, of + span, 0.0f);
    for (int64_t k = 0; k < span; k += LANES) totals += load(of + k);
    const float total = sum(totals);
    for (int64_t k = 0; k < span; k += LANES) store(of + k, load(of + k) / total);
  }
  runs([&](int64_t k, int64_t at, int64_t some) {
    if (a.v_scales)
      for (int64_t i = 0; i < a.group; i++)
        for (int64_t n = 0; n < some; n++) scores[i * span + k + n] *= a.v_scales[at + n];
    gather(scores + k, span, a.group, values + at * a.dim, some, a.dim, out);
  });
}
