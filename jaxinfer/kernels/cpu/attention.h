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

// Scores of some queries with some keys that follow each other: scores[q][k] = queries[q] . keys[k]. Here and below what
// is inside is a function by itself, or the compiler keeps sums in memory.
template <int GROUP, int SIZE, class T>
APART void score_some(const float* const* queries, const T* keys, int64_t dim, float* scores, int64_t span) {
  Float total[GROUP][SIZE];
  for (auto& of_query : total)
    for (Float& x : of_query) x = Float{};
  for (int64_t i = 0; i < dim; i += LANES) {
    Float query[GROUP];
    for (int m = 0; m < GROUP; m++) query[m] = load(queries[m] + i);
    for (int n = 0; n < SIZE; n++) {
      const Float key = load(keys + n * dim + i);
      for (int m = 0; m < GROUP; m++) total[m][n] += key * query[m];
    }
  }
  float found[GROUP * SIZE];
  sums<GROUP * SIZE>(total[0], found);
  for (int m = 0; m < GROUP; m++) std::copy_n(found + m * SIZE, SIZE, scores + m * span);
}

// The same of all.
template <class T>
void score(const float* const* queries, int64_t count, const T* keys, int64_t some, int64_t dim, float* scores,
           int64_t span) {
  in_steps<4, 2, 1>(0, count, [&](int64_t first, auto group) {
    in_steps<LANES / std::max<int>(group, 2), 1>(0, some, [&](int64_t k, auto size) {
      score_some<group, size>(queries + first, keys + k * dim, dim, scores + first * span + k, span);
    });
  });
}

// out[q] += sum of weights[q][k] * values[k], of values that follow each other and of as many numbers of them.
template <int GROUP, int SIZE, class T>
APART void gather_some(const float* weights, int64_t span, const T* values, int64_t some, int64_t dim, float* const* out,
                       int64_t from) {
  Float total[GROUP][SIZE];
  for (int m = 0; m < GROUP; m++)
    for (int c = 0; c < SIZE; c++) total[m][c] = load(out[m] + from + c * LANES);
  for (int64_t k = 0; k < some; k++)
    for (int c = 0; c < SIZE; c++) {
      const Float value = load(values + k * dim + from + c * LANES);
      for (int m = 0; m < GROUP; m++) total[m][c] += value * weights[m * span + k];
    }
  for (int m = 0; m < GROUP; m++)
    for (int c = 0; c < SIZE; c++) store(out[m] + from + c * LANES, total[m][c]);
}

template <class T>
void gather(const float* weights, int64_t span, int64_t count, const T* values, int64_t some, int64_t dim,
            float* const* out) {
  in_steps<4, 2, 1>(0, count, [&](int64_t first, auto group) {
    in_steps<4, 1>(0, dim / LANES, [&](int64_t chunk, auto size) {
      gather_some<group, size>(weights + first * span, span, values, some, dim, out + first, chunk * LANES);
    });
  });
}

// Where key k of a row is, of all [pages, kv_heads, page_size].
INLINE int64_t on_page(const Attention& a, int64_t row, int64_t head, int64_t k) {
  return (a.pages[row * a.table + k / a.page_size] * a.kv_heads + head) * a.page_size + k % a.page_size;
}

// Calls `call(k, at, some)` for keys [start, stop) of a row in runs of those that are evenly apart, on a page or in the
// stream: the first of them, where that is (of all [pages, kv_heads, page_size] or [tokens, kv_heads]) and how many.
template <class Call>
INLINE void in_runs(const Attention& a, int64_t row, int64_t head, int64_t start, int64_t stop, const Call& call) {
  if (!a.pages) return call(start, (a.q_start[row] + start) * a.kv_heads + head, stop - start);
  for (int64_t k = start, some; k < stop; k += some) {
    some = std::min(stop - k, a.page_size - k % a.page_size);
    call(k, on_page(a, row, head, k), some);
  }
}

// Fetches the page that has key k of a row, if that is before `stop`.
template <class T>
INLINE void fetch_page(const Attention& a, const T* x, int64_t row, int64_t head, int64_t k, int64_t stop) {
  if (k >= stop) return;
  const char* from = (const char*)(x + on_page(a, row, head, k / a.page_size * a.page_size) * a.dim);
  for (size_t line = 0; line < a.page_size * a.dim * sizeof(T); line += 64) __builtin_prefetch(from + line);
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
    k + some < stop ? fetch_page(a, keys, row, head, k + some, stop) : fetch_page(a, values, row, head, start, stop);
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
    fetch_page(a, values, row, head, k + some, stop);
    if (a.v_scales)
      for (int64_t i = 0; i < a.group; i++)
        for (int64_t n = 0; n < some; n++) weights[i * span + n] *= a.v_scales[at + n];
    gather(weights, span, a.group, values + at * a.dim, some, a.dim, out);
  });
}

// ---- several tokens: lanes are queries, each of a token and a head, so that nothing is summed across them.

constexpr int SUMS = LEVEL == 2 ? 24 : 12;  // vectors of them: what is added has the other registers
constexpr int64_t KEYS = 64;                // a block of them
constexpr int64_t MOST_LANES = 128;         // of a task, which has keys and values of a block as floats once

// Lanes of each task of so many queries, about the same of all, for `pieces` at least if there is enough.
inline int64_t task_lanes(int64_t queries, int64_t pieces) {
  const int64_t most = std::clamp<int64_t>(queries / pieces, 2 * LANES, MOST_LANES), tasks = (queries + most - 1) / most;
  return ((queries + tasks - 1) / tasks + LANES - 1) / LANES * LANES;
}

// total[r] += sum over k of x[k * step] * lanes[k], for ROWS numbers r that are `stride` apart in x. Compiled by itself,
// or the compiler runs out of registers.
template <int PANELS, int ROWS>
APART void sum_rows(const float* x, int64_t stride, int64_t step, const float* lanes, int64_t count, float* total) {
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

// The same for all numbers [0, rows).
template <int PANELS>
INLINE void sum_all_rows(const float* x, int64_t rows, int64_t stride, int64_t step, const float* lanes, int64_t count,
                         float* total) {
  in_steps<SUMS / PANELS, 4, 1>(0, rows, [&](int64_t r, auto some) {
    sum_rows<PANELS, some>(x + r * stride, stride, step, lanes, count, total + r * PANELS * LANES);
  });
}

// Keys or values [start, stop) of a row as rows of float32 that follow each other: where they are, or put to `to`.
template <class T>
const float* block_of(const Attention& a, const T* x, const float* scales, int64_t row, int64_t head, int64_t start,
                      int64_t stop, float* to) {
  const float* rows = to;
  in_runs(a, row, head, start, stop, [&](int64_t k, int64_t at, int64_t some) {
    if constexpr (std::is_same_v<T, float>)
      if (a.stride == a.dim && some == stop - start) {
        rows = x + at * a.dim;
        return;
      }
    for (int64_t n = 0; n < some; n++)
      for (int64_t i = 0; i < a.dim; i += LANES)
        store(to + (k - start + n) * a.dim + i,
              load(x + at * a.dim + n * a.stride + i) * (scales ? scales[at + n] : 1.0f));
  });
  return rows;
}

INLINE void put(float* to, Float x) { store(to, x); }
INLINE void put(bf16* to, Float x) {
  const Int bits = (Int)x, rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : Int{} + 0x7fc00000;
  for (int i = 0; i < LANES; i++) to[i].bits = (uint32_t)rounded[i] >> 16;
}

struct Tile {  // queries of a row from `first` on, those of one key/value head, numbered by token and then by head
  float *queries, *out;  // [dim, lanes]
  float *top, *total;    // [lanes]: of their scores the highest, and what the weights sum up to
  int32_t* position;     // [lanes]; -1 where results are nobody's
  int64_t first, count, start, stop;  // and the keys that they see
};

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

constexpr float NOTHING = -1e30f;  // a score that doesn't count

template <int PANELS, class X>
void begin(const Attention& a, int64_t row, int64_t head, Tile& tile) {
  constexpr int TILE = PANELS * LANES;
  const int64_t tokens = a.q_start[row + 1] - a.q_start[row], before = a.kv_len[row] - tokens;
  for (int64_t i = 0; i < TILE; i++) {
    tile.position[i] = i < tile.count ? before + (tile.first + i) / a.group : -1;
    tile.top[i] = a.sinks ? sink_of(a, head * a.group + (tile.first + i) % a.group) : NOTHING;
    tile.total[i] = a.sinks ? 1 : 0;
  }
  for (int p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < a.dim; k += LANES) {
      Float rows[LANES];
      for (int i = 0; i < LANES; i++)
        rows[i] = load((const X*)a.q + a.place(row, head, tile.first + std::min(p * LANES + i, (int)tile.count - 1)) + k);
      transpose(rows);
      for (int i = 0; i < LANES; i++) store(tile.queries + (k + i) * TILE + p * LANES, rows[i]);
    }
  std::fill(tile.out, tile.out + TILE * a.dim, 0.0f);
  const int64_t ahead = a.causal ? 1 : a.window;  // how far keys are seen
  tile.start = std::max<int64_t>(tile.position[0] + 1 - a.window, 0);
  tile.stop = std::min<int64_t>(tile.position[tile.count - 1] + ahead, a.kv_len[row]);
}

// What is added by keys from `block` on, to `end`.
template <int PANELS>
void add_block(const Attention& a, int64_t head, const Tile& tile, const float* keys, const float* values, int64_t block,
               int64_t end, float* scores) {
  constexpr int TILE = PANELS * LANES;
  const int64_t some = end - block, ahead = a.causal ? 1 : a.window;
  std::fill(scores, scores + TILE * some, 0.0f);
  sum_all_rows<PANELS>(keys, some, a.dim, 1, tile.queries, a.dim, scores);
  capped(a, scores, TILE * some);
  if (a.bias) add_bias<TILE>(a, head, tile.first, block - tile.position[0], some, scores + TILE * KEYS, scores);
  const bool all = end <= tile.position[0] + ahead && tile.count == TILE &&
                   block > tile.position[tile.count - 1] - a.window;
  for (int p = 0; p < PANELS; p++) {
    const Int own = load_as<Int>(tile.position + p * LANES);
    const Float before = load(tile.top + p * LANES);
    Float highest = before;
    for (int64_t k = 0; k < some; k++) {
      float* at = scores + k * TILE + p * LANES;
      Float score = load(at);
      if (!all) {
        const Int here = Int{} + (int32_t)(block + k);
        score = (here < own + (int32_t)ahead) & (here > own - (int32_t)a.window) ? score : Float{} + NOTHING;
        store(at, score);
      }
      highest = score > highest ? score : highest;
    }
    const Float keep = exponential((before - highest) * a.scale);
    Float sum = load(tile.total + p * LANES) * keep;
    for (int64_t k = 0; k < some; k++) {
      float* at = scores + k * TILE + p * LANES;
      const Float score = load(at);
      Float weight = exponential((score - highest) * a.scale);
      weight = score <= NOTHING ? Float{} : weight;  // NaN stays
      sum += weight;
      store(at, weight);
    }
    store(tile.top + p * LANES, highest);
    store(tile.total + p * LANES, sum);
    for (int64_t i = 0; i < a.dim; i++) {
      float* at = tile.out + i * TILE + p * LANES;
      store(at, load(at) * keep);
    }
  }
  sum_all_rows<PANELS>(values, a.dim, 1, a.dim, scores, some, tile.out);
}

template <int PANELS, class X>
void finish(const Attention& a, int64_t row, int64_t head, const Tile& tile) {
  constexpr int TILE = PANELS * LANES;
  for (int64_t p = 0; p < PANELS; p++)
    for (int64_t k = 0; k < a.dim; k += LANES) {
      Float rows[LANES];
      for (int i = 0; i < LANES; i++)
        rows[i] = load(tile.out + (k + i) * TILE + p * LANES) / load(tile.total + p * LANES);
      transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(tile.count - p * LANES, LANES); i++)
        put((X*)a.out + a.place(row, head, tile.first + p * LANES + i) + k, rows[i]);
    }
}

// Queries of a row from `first` on, as many as a task has lanes: in tiles of two panels, or one at the end.
template <class X, class T>
void attend_some(const Attention& a, const T* keys, const T* values, int64_t row, int64_t head, int64_t first,
                 int64_t lanes) {
  const int64_t dim = a.dim, all = (a.q_start[row + 1] - a.q_start[row]) * a.group;
  const int64_t wide = 2 * LANES, own = std::min(all - first, lanes), count = (own + wide - 1) / wide;
  const int64_t nearby = a.bias ? a.group * (wide + KEYS) : 0, each = wide * (2 * dim + 3);
  float* scores = (float*)buffer(4 * (count * each + 2 * KEYS * dim + wide * KEYS + nearby));
  float *staged = scores + wide * KEYS + nearby, *held = staged + 2 * KEYS * dim;
  Tile tiles[MOST_LANES / wide];
  auto with = [&](const Tile& tile, auto call) {
    tile.count > LANES ? call(std::integral_constant<int, 2>()) : call(std::integral_constant<int, 1>());
  };
  int64_t start = INT64_MAX, stop = 0;
  for (int64_t i = 0; i < count; i++, held += each) {
    float* more = held + 2 * wide * dim;
    Tile& tile = tiles[i] = {held, held + wide * dim, more, more + wide, (int32_t*)(more + 2 * wide), first + i * wide};
    tile.count = std::min(own - i * wide, wide);
    with(tile, [&](auto panels) { begin<panels, X>(a, row, head, tile); });
    start = std::min(start, tile.start);
    stop = std::max(stop, tile.stop);
  }
  // Blocks begin at multiples of KEYS, so that what a query's sums are does not depend on the task that it is in.
  for (int64_t block = start / KEYS * KEYS; block < stop; block += KEYS) {
    const int64_t end = std::min(block + KEYS, stop);
    const float* k = block_of(a, keys, a.k_scales, row, head, block, end, staged);
    const float* v = block_of(a, values, a.v_scales, row, head, block, end, staged + KEYS * dim);
    for (int64_t i = 0; i < count; i++) {
      const int64_t from = std::max(block, tiles[i].start), to = std::min(end, tiles[i].stop), skip = (from - block) * dim;
      if (from < to)
        with(tiles[i], [&](auto panels) { add_block<panels>(a, head, tiles[i], k + skip, v + skip, from, to, scores); });
    }
  }
  for (int64_t i = 0; i < count; i++)
    with(tiles[i], [&](auto panels) { finish<panels, X>(a, row, head, tiles[i]); });
}
