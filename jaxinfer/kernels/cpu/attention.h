// Attention to keys and values where they are, in pages of the cache or in the stream of tokens; included after micro.h,
// as that is. Softmax over blocks of keys is Milakov and Gimelshein's (arXiv:1805.02867).

// x as whole * log(2) + rest, and 2**whole.
INLINE Float whole_of(Float x) { return (x * 1.44269504f + 12582912.0f) - 12582912.0f; }  // 1.5 * 2**23 rounds
INLINE Float rest_of(Float x, Float whole) { return (x - whole * 0.693359375f) + whole * 2.12194440e-4f; }
INLINE Float power_of_two(Float whole) { return (Float)((__builtin_convertvector(whole, Int) + 127) << 23); }

INLINE Float exponential(Float x) {  // of what is at most 0
  x = x < -87.0f ? Float{} - 87.0f : x;
  const Float whole = whole_of(x), rest = rest_of(x, whole);
  Float power = Float{} + 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * rest + term;
  return power * power_of_two(whole);
}

// By e**(-2 |x|) - 1, which is exact near 0, too.
INLINE Float hyperbolic_tangent(Float x) {
  Float size = x < 0.0f ? -x : x;
  size = size > 10.0f ? Float{} + 10.0f : size;  // from there on it is 1; NaN stays
  const Float whole = whole_of(size * -2.0f), rest = rest_of(size * -2.0f, whole), power = power_of_two(whole);
  Float series = Float{} + 1.0f / 40320;
  for (float term : {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) series = series * rest + term;
  const Float less = power * (series * rest * rest + rest) + (power - 1.0f);
  const Float negative = less / (less + 2.0f);
  return x < 0.0f ? negative : -negative;
}

// What scores are before they are multiplied by `scale`: a count that is a multiple of LANES.
inline void capped(const Attention& a, float* scores, int64_t count) {
  if (a.cap > 0)
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, hyperbolic_tangent(load(scores + i) * a.cap));
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

// Calls `call(k, at, some)` for keys [start, stop) of a row in runs of those that are evenly apart, on a page or in the
// stream: the first of them, where that is (of all [pages, kv_heads, page_size] or [tokens, kv_heads]) and how many.
template <class Call>
INLINE void in_runs(const Attention& a, int64_t row, int64_t head, int64_t start, int64_t stop, const Call& call) {
  if (!a.pages) return call(start, (a.q_start[row] + start) * a.kv_heads + head, stop - start);
  for (int64_t k = start, some; k < stop; k += some) {
    some = std::min(stop - k, a.page_size - k % a.page_size);
    const int64_t page = a.pages[row * a.table + k / a.page_size];
    call(k, (page * a.kv_heads + head) * a.page_size + k % a.page_size, some);
  }
}

// ---- one token: lanes run along the head.

// A query head's sink as a score of its own; without one, what weighs nothing.
inline float sink_of(const Attention& a, int64_t query) { return a.sinks ? a.sinks[query] / a.scale : -INFINITY; }

// The query heads of one key/value head.
template <class T>
void attend(const Attention& a, const T* keys, const T* values, int64_t row, int64_t head) {
  const int64_t stop = a.kv_len[row], start = std::max<int64_t>(stop - a.window, 0);
  const int64_t count = stop - start, span = (count + LANES - 1) / LANES * LANES;
  float* scores = (float*)buffer(4 * a.group * span);
  const float* queries[MOST_QUERIES];
  float* out[MOST_QUERIES];
  for (int64_t i = 0; i < a.group; i++) {
    const int64_t at = ((a.q_start[row] * a.kv_heads + head) * a.group + i) * a.dim;
    queries[i] = (const float*)a.q + at;
    out[i] = (float*)a.out + at;
  }
  in_runs(a, row, head, start, stop, [&](int64_t k, int64_t at, int64_t some) {
    float* to = scores + k - start;
    score(queries, a.group, keys + at * a.dim, some, a.dim, to, span);
    if (a.k_scales)
      for (int64_t i = 0; i < a.group; i++)
        for (int64_t n = 0; n < some; n++) to[i * span + n] *= a.k_scales[at + n];
  });
  for (int64_t i = 0; i < a.group; i++) {
    float* of = scores + i * span;
    std::fill(of + count, of + span, of[0]);
    capped(a, of, span);
    Float tops = load(of), totals = {};
    for (int64_t k = LANES; k < span; k += LANES) tops = load(of + k) > tops ? load(of + k) : tops;
    float top = tops[0];
    for (int lane = 1; lane < LANES; lane++) top = tops[lane] > top ? tops[lane] : top;
    const float sink = sink_of(a, head * a.group + i);
    top = sink > top ? sink : top;
    for (int64_t k = 0; k < span; k += LANES) store(of + k, exponential((load(of + k) - top) * a.scale));
    std::fill(of + count, of + span, 0.0f);
    for (int64_t k = 0; k < span; k += LANES) totals += load(of + k);
    const float total = sum(totals) + std::exp((sink - top) * a.scale);
    for (int64_t k = 0; k < span; k += LANES) store(of + k, load(of + k) / total);
  }
  in_runs(a, row, head, start, stop, [&](int64_t k, int64_t at, int64_t some) {
    float* weights = scores + k - start;
    if (a.v_scales)
      for (int64_t i = 0; i < a.group; i++)
        for (int64_t n = 0; n < some; n++) weights[i * span + n] *= a.v_scales[at + n];
    gather(weights, span, a.group, values + at * a.dim, some, a.dim, out);
  });
}

// ---- several tokens: lanes are queries, each of a token and a head, so that nothing is summed across them.

constexpr int MOST_PANELS = 3, TILE_ROWS = LEVEL == 2 ? 8 : 4;  // 3 x 8 sums and 3 of what is added
constexpr int64_t KEYS = 64;                                   // a block of them

// Lanes of each tile of so many queries, about the same of all.
inline int64_t tile_lanes(int64_t queries) {
  const int64_t panels = (queries + LANES - 1) / LANES, tiles = (panels + MOST_PANELS - 1) / MOST_PANELS;
  return (panels + tiles - 1) / tiles * LANES;
}

// total[r] += sum over k of x[k * step] * lanes[k], for ROWS numbers r that are `stride` apart in x.
template <int PANELS, int ROWS>
INLINE void sum_rows(const float* x, int64_t stride, int64_t step, const float* lanes, int64_t count, float* total) {
  constexpr int TILE = PANELS * LANES;
  Float sums[ROWS][PANELS];
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < PANELS; p++) sums[r][p] = load(total + r * TILE + p * LANES);
  for (int64_t k = 0; k < count; k++) {
    Float with[PANELS];
    for (int p = 0; p < PANELS; p++) with[p] = load(lanes + k * TILE + p * LANES);
    for (int r = 0; r < ROWS; r++)
      for (int p = 0; p < PANELS; p++) sums[r][p] += with[p] * x[r * stride + k * step];
  }
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < PANELS; p++) store(total + r * TILE + p * LANES, sums[r][p]);
}

// `some` keys or values, `stride` apart, as rows of float32 that follow each other: where they are, or put to `to`.
template <class T>
INLINE const float* as_floats(const T* from, int64_t stride, const float* scales, int64_t some, int64_t dim, float* to) {
  if constexpr (std::is_same_v<T, float>)
    if (stride == dim) return from;
  for (int64_t n = 0; n < some; n++)
    for (int64_t i = 0; i < dim; i += LANES)
      store(to + n * dim + i, load(from + n * stride + i) * (scales ? scales[n] : 1.0f));
  return to;
}

INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// Adds to scores [keys][TILE] of a block what each has by the distance from its query, the first of which is `shift` for
// the first key; tile lanes are numbered from `first` on. near: for this, [group][TILE + KEYS].
template <int TILE>
INLINE void add_bias(const Attention& a, int64_t head, int64_t first, int64_t shift, int64_t keys, float* near,
                     float* scores) {
  constexpr int64_t WIDE = TILE + KEYS;
  for (int64_t g = 0; g < a.group; g++) {
    const float* of = a.bias + (head * a.group + g) * (2 * a.furthest + 1) + a.furthest;
    for (int64_t m = 0; m < WIDE; m++)  // falling, as queries of a key are in a row
      near[g * WIDE + m] = of[std::clamp<int64_t>(shift + KEYS - 1 - m, -a.furthest, a.furthest)] / a.scale;
  }
  for (int64_t k = 0; k < keys; k++) {
    const float* of = near + KEYS - 1 - k;
    float* to = scores + k * TILE;
    if (a.group == 1)
      for (int64_t i = 0; i < TILE; i += LANES) store(to + i, load(to + i) + load(of + i));
    else
      for (int64_t i = 0; i < TILE; i++)
        to[i] += of[(first + i) % a.group * WIDE + (first + i) / a.group - first / a.group];
  }
}

// Queries of a row from `first` on, those of one key/value head, numbered by token and then by head.
template <int PANELS, class X, class T>
void attend_panels(const Attention& a, const T* keys, const T* values, int64_t row, int64_t head, int64_t first) {
  constexpr int TILE = PANELS * LANES;
  const int64_t begin = a.q_start[row], tokens = a.q_start[row + 1] - begin, before = a.kv_len[row] - tokens;
  const int64_t count = std::min<int64_t>(tokens * a.group - first, TILE), dim = a.dim;
  const int64_t nearby = a.bias ? a.group * (TILE + KEYS) : 0;
  float* queries = (float*)buffer(4 * (2 * TILE * dim + TILE * KEYS + KEYS * dim + nearby));
  float *out = queries + TILE * dim, *scores = out + TILE * dim, *staged = scores + TILE * KEYS;
  auto place = [&](int64_t i) {
    return ((begin + i / a.group) * a.kv_heads + head) * a.group * dim + i % a.group * dim;
  };
  int32_t position[TILE];
  for (int64_t i = 0; i < TILE; i++) {
    position[i] = i < count ? before + (first + i) / a.group : -1;  // its results are nobody's
    const X* q = (const X*)a.q + place(first + std::min(i, count - 1));
    for (int64_t k = 0; k < dim; k++) queries[k * TILE + i] = to_float(q[k]);
  }
  std::fill(out, out + TILE * dim, 0.0f);
  constexpr float NOTHING = -1e30f;
  Float top[PANELS], total[PANELS] = {};
  for (Float& one : top) one = Float{} + NOTHING;
  for (int64_t i = 0; a.sinks && i < TILE; i++) {
    top[i / LANES][i % LANES] = sink_of(a, head * a.group + (first + i) % a.group);
    total[i / LANES][i % LANES] = 1;
  }
  const int64_t ahead = a.causal ? 1 : a.window;  // how far keys are seen
  const int64_t stop = std::min<int64_t>(position[count - 1] + ahead, a.kv_len[row]);
  const int64_t start = std::max<int64_t>(position[0] + 1 - a.window, 0);
  for (int64_t block = start; block < stop; block += KEYS) {
    const int64_t end = std::min(block + KEYS, stop);
    std::fill(scores, scores + TILE * (end - block), 0.0f);
    in_runs(a, row, head, block, end, [&](int64_t k, int64_t at, int64_t some) {
      const float* rows = as_floats(keys + at * dim, a.stride, a.k_scales ? a.k_scales + at : nullptr, some, dim, staged);
      in_steps<TILE_ROWS, 4, 1>(0, some, [&](int64_t n, auto size) {
        sum_rows<PANELS, size>(rows + n * dim, dim, 1, queries, dim, scores + (k - block + n) * TILE);
      });
    });
    capped(a, scores, TILE * (end - block));
    if (a.bias) add_bias<TILE>(a, head, first, block - position[0], end - block, staged + KEYS * dim, scores);
    const bool all = end <= position[0] + ahead && count == TILE && block > position[count - 1] - a.window;
    for (int p = 0; p < PANELS; p++) {
      const Int own = load_as<Int>(position + p * LANES);
      Float highest = top[p];
      for (int64_t k = block; k < end; k++) {
        float* at = scores + (k - block) * TILE + p * LANES;
        Float score = load(at);
        if (!all) {
          const Int here = Int{} + (int32_t)k;
          score = (here < own + (int32_t)ahead) & (here > own - (int32_t)a.window) ? score : Float{} + NOTHING;
          store(at, score);
        }
        highest = score > highest ? score : highest;
      }
      const Float keep = exponential((top[p] - highest) * a.scale);
      Float sum = total[p] * keep;
      top[p] = highest;
      for (int64_t k = 0; k < end - block; k++) {
        float* at = scores + k * TILE + p * LANES;
        const Float score = load(at);
        Float weight = exponential((score - highest) * a.scale);
        weight = score <= NOTHING ? Float{} : weight;  // NaN stays
        sum += weight;
        store(at, weight);
      }
      total[p] = sum;
      for (int64_t i = 0; i < dim; i++) {
        float* at = out + i * TILE + p * LANES;
        store(at, load(at) * keep);
      }
    }
    in_runs(a, row, head, block, end, [&](int64_t k, int64_t at, int64_t some) {
      const float* rows =
          as_floats(values + at * dim, a.stride, a.v_scales ? a.v_scales + at : nullptr, some, dim, staged);
      in_steps<TILE_ROWS, 4>(0, dim, [&](int64_t i, auto size) {
        sum_rows<PANELS, size>(rows + i, 1, dim, scores + (k - block) * TILE, some, out + i * TILE);
      });
    });
  }
  for (int64_t k = 0; k < dim; k++)
    for (int p = 0; p < PANELS; p++) {
      float* at = out + k * TILE + p * LANES;
      store(at, load(at) / total[p]);
    }
  for (int64_t i = 0; i < count; i++) {
    X* to = (X*)a.out + place(first + i);
    for (int64_t k = 0; k < dim; k++) put(to + k, out[k * TILE + i]);
  }
}

// The same of a tile of so many lanes.
template <class X, class T>
void attend_tile(const Attention& a, const T* keys, const T* values, int64_t row, int64_t head, int64_t first,
                 int64_t lanes) {
  if (lanes == LANES) attend_panels<1, X>(a, keys, values, row, head, first);
  if (lanes == 2 * LANES) attend_panels<2, X>(a, keys, values, row, head, first);
  if (lanes == 3 * LANES) attend_panels<3, X>(a, keys, values, row, head, first);
}
