// Products x [T, K] times w [N, K] transposed, for one instruction set: included once for each, inside of a namespace.
//
// Before it: LEVEL (2: AVX-512 with VNNI and BF16, 1: AVX2 with FMA, 0: anything), and LANES, the floats of a vector.
// Few tokens: lanes run along K, a weight is read once and is the bottleneck ("thin"). Many: lanes are tokens, and one
// weight (or 2 of bf16, or 4 of int8: what fills 32 bits) meets all of them ("wide"); weights are not repacked.
// Every output is summed by one thread in an order that depends on the shapes alone.

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

template <class T>
INLINE T load_as(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
INLINE void store(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

INLINE Float load(const float* p) { return load_as<Float>(p); }

#if LEVEL == 2
INLINE Float load(const bf16* p) {
  return (Float)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
}
INLINE Float load(const int8_t* p) { return (Float)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p))); }
#elif LEVEL == 1
INLINE Float load(const bf16* p) {
  return (Float)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
}
INLINE Float load(const int8_t* p) {
  return (Float)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#else
INLINE Float load(const bf16* p) {
  typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
  typedef uint32_t Word __attribute__((vector_size(4 * LANES)));
  return (Float)(__builtin_convertvector(load_as<Half>(p), Word) << 16);
}
INLINE Float load(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(p), Int), Float);
}
#endif

INLINE float sum(Float v) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// ---- thin: a few tokens, float32 activations, exact products.

// One output of each token: products of weights [begin, end) of a row, added to it from the second piece on.
template <int TOKENS, class Weight, class Out>
INLINE void thin_tile(const float* x, int64_t depth, const Weight* w, int64_t begin, int64_t end, Out* out,
                      int64_t columns) {
  constexpr int UNROLL = LEVEL == 2 ? 4 : 2, STEP = UNROLL * LANES;
  Float total[UNROLL][TOKENS] = {};
  int64_t k = begin;
  for (; k + STEP <= end; k += STEP) {
    // Rows follow each other in memory, and the hardware alone does not read far enough ahead.
    for (size_t line = 0; line < STEP * sizeof(Weight); line += 64)
      __builtin_prefetch((const char*)(w + k) + AHEAD + line);
    for (int u = 0; u < UNROLL; u++) {
      Float weights = load(w + k + u * LANES);
      for (int t = 0; t < TOKENS; t++) total[u][t] += weights * load(x + t * depth + k + u * LANES);
    }
  }
  for (; k + LANES <= end; k += LANES)
    for (int t = 0; t < TOKENS; t++) total[0][t] += load(w + k) * load(x + t * depth + k);
  for (int t = 0; t < TOKENS; t++) {
    for (int u = 1; u < UNROLL; u++) total[0][t] += total[u][t];
    float result = sum(total[0][t]);
    for (int64_t i = k; i < end; i++) result += x[t * depth + i] * to_float(w[i]);
    Out* to = out + t * columns;
    *to = (begin > 0 ? *to : 0) + (Out)result;
  }
}

// Outputs [first, last) of all tokens. Integers are multiplied as float32, which is exact for up to EXACT of them.
template <class Weight, class Out>
void thin(const float* x, int64_t tokens, const Weight* w, int64_t depth, Out* out, int64_t columns, int64_t first,
          int64_t last) {
  const int64_t step = std::is_same_v<Out, int32_t> ? EXACT : depth;
  for (int64_t n = first; n < last; n++)
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += step) {
      const int64_t end = std::min(begin + step, depth);
      in_steps<4, 2, 1>(0, tokens, [&](int64_t t, auto count) {
        thin_tile<count>(x + t * depth, depth, w + n * depth, begin, end, out + t * columns + n, columns);
      });
    }
}

constexpr int WIDE_ROWS = LEVEL == 2 ? 12 : 6;  // with 2 panels they fill the registers

// ---- wide: activations in panels [units][LANES tokens] of 32 bits, weights in rows of such units.

struct Singles {  // float32
  using Total = Float;
  static constexpr int64_t each = 1;
  static INLINE Float add(Float total, Int x, uint32_t w) {
    return total + (Float)x * load_as<float>(&w);
  }
  template <class T>
  static void fill(uint32_t* to, const T* from, int64_t count) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(to + k, load(from + k));
    for (; k < count; k++) to[k] = load_as<uint32_t>(&static_cast<const float&>(to_float(from[k])));
  }
};

#if LEVEL == 2
struct Pairs {  // bfloat16, summed in float32
  using Total = Float;
  static constexpr int64_t each = 2;
  static INLINE Float add(Float total, Int x, uint32_t w) {
    return (Float)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)_mm512_set1_epi32(w));
  }
  template <class T>
  static void fill(uint32_t* to, const T* from, int64_t count) {
    bf16* halves = (bf16*)to;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) store(halves + k, _mm512_cvtneps_pbh((__m512)load(from + k)));
    if (k < count) {
      float rest[LANES] = {};
      for (int64_t i = k; i < count; i++) rest[i - k] = to_float(from[i]);
      __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(rest));
      std::memcpy(halves + k, &rounded, 4 * ((count - k + 1) / 2));
    }
  }
  static void fill(uint32_t* to, const bf16* from, int64_t count) {
    if (count % 2) to[count / 2] = 0;
    std::memcpy(to, from, 2 * count);
  }
};

struct Quads {  // int8, summed in int32; activations have 128 added, as the instruction wants one side unsigned
  using Total = Int;
  static constexpr int64_t each = 4;
  static INLINE Int add(Int total, Int x, uint32_t w) {
    return (Int)_mm512_dpbusd_epi32((__m512i)total, (__m512i)x, _mm512_set1_epi32(w));
  }
  static void fill(uint32_t* to, const int8_t* from, int64_t count) {
    if (count % 4) to[count / 4] = 0;
    std::memcpy(to, from, count);
  }
};
#endif

// Tokens [first, first + LANES) of x as a panel; those from `tokens` on are zeros.
template <class Units, class X>
void pack(const X* x, int64_t tokens, int64_t depth, int64_t first, uint32_t* panel) {
  const int64_t some = std::min<int64_t>(tokens - first, LANES);
  uint32_t staged[LANES][LANES] = {};
  for (int64_t k = 0; k < depth; k += LANES * Units::each) {
    const int64_t count = std::min(depth - k, LANES * Units::each), units = (count + Units::each - 1) / Units::each;
    for (int64_t t = 0; t < some; t++) Units::fill(staged[t], x + (first + t) * depth + k, count);
    for (int64_t u = 0; u < units; u++)
      for (int t = 0; t < LANES; t++) panel[u * LANES + t] = staged[t][u] ^ (Units::each == 4 ? 0x80808080u : 0);
    panel += units * LANES;
  }
}

template <class Units, int ROWS, int PANELS, class Out>
INLINE void wide_tile(const uint32_t* panels, int64_t panel, const uint32_t* w, int64_t stride, int64_t begin,
                      int64_t end, const int32_t* minus, Out* out, int64_t columns, int64_t tokens, bool add) {
  typename Units::Total total[PANELS][ROWS] = {};
  for (int64_t u = begin; u < end; u++)
    for (int r = 0; r < ROWS; r++)
      for (int p = 0; p < PANELS; p++)
        total[p][r] = Units::add(total[p][r], load_as<Int>(panels + p * panel + u * LANES), w[r * stride + u]);
  for (int p = 0; p < PANELS; p++)
    for (int t = 0; t < std::min<int64_t>(tokens - p * LANES, LANES); t++) {
      Out* to = out + (p * LANES + t) * columns;
      for (int r = 0; r < ROWS; r++) to[r] = (add ? to[r] : 0) + (Out)total[p][r][t] - (Out)minus[r];
    }
}

// Outputs [first, last) of all tokens. scratch: for WIDE_ROWS rows of weights as units.
template <class Units, class Weight, class Out>
void wide(const uint32_t* panels, int64_t tokens, const Weight* w, int64_t depth, Out* out, int64_t columns,
          int64_t first, int64_t last, uint32_t* scratch) {
  constexpr bool as_they_are = sizeof(Weight) * Units::each == 4;
  const int64_t units = (depth + Units::each - 1) / Units::each;
  const int64_t step = Units::each == 4 ? units : EXACT;
  auto rows_of = [&](int64_t n, auto rows) {
    const uint32_t* weights = scratch;
    if (as_they_are && depth % Units::each == 0) {
      weights = (const uint32_t*)(w + n * depth);
    } else {
      for (int64_t r = 0; r < rows; r++) Units::fill(scratch + r * units, w + (n + r) * depth, depth);
    }
    int32_t minus[rows] = {};
    if constexpr (Units::each == 4)
      for (int64_t r = 0; r < rows; r++) minus[r] = 128 * total_of(w + (n + r) * depth, depth);
    for (int64_t begin = 0; begin == 0 || begin < units; begin += step) {
      const int64_t end = std::min(begin + step, units);
      auto some = [&](int64_t p, auto count) {
        wide_tile<Units, rows, count>(panels + p * LANES * units, units * LANES, weights, units, begin, end, minus,
                                      out + p * LANES * columns + n, columns, tokens - p * LANES, begin > 0);
      };
      in_steps<2, 1>(0, (tokens + LANES - 1) / LANES, some);
    }
  };
  in_steps<WIDE_ROWS, 4, 1>(first, last, rows_of);
}

template <class Units, class X, class Weight, class Out>
void wide_product(Threads& threads, const X* x, int64_t tokens, const Weight* w, int64_t depth, Out* out,
                  int64_t columns, int64_t each) {
  const int64_t units = (depth + Units::each - 1) / Units::each, panels = (tokens + LANES - 1) / LANES;
  uint32_t* packed = (uint32_t*)buffer(4 * panels * LANES * units);
  threads.run(panels, [=](int64_t p) { pack<Units>(x, tokens, depth, p * LANES, packed + p * LANES * units); });
  threads.run((columns + each - 1) / each, [=](int64_t i) {
    std::unique_ptr<uint32_t[]> scratch(new uint32_t[WIDE_ROWS * units]);
    wide<Units>(packed, tokens, w, depth, out, columns, i * each, std::min((i + 1) * each, columns), scratch.get());
  });
}

template <class X, class Weight, class Out>
void thin_product(Threads& threads, const X* x, int64_t tokens, const Weight* w, int64_t depth, Out* out,
                  int64_t columns, int64_t each) {
  const float* floats = (const float*)x;
  if constexpr (!std::is_same_v<X, float>) {
    float* to = (float*)buffer(4 * tokens * depth);
    for (int64_t i = 0; i < tokens * depth; i++) to[i] = to_float(x[i]);
    floats = to;
  }
  threads.run((columns + each - 1) / each, [=](int64_t i) {
    thin(floats, tokens, w, depth, out, columns, i * each, std::min((i + 1) * each, columns));
  });
}

// out [T, N] = x [T, K] times w [N, K] transposed. rounds: float32 activations may become bfloat16, from MANY tokens on.
template <class X, class Weight, class Out>
void product(Threads& threads, const X* x, int64_t tokens, const Weight* w, int64_t depth, Out* out, int64_t columns,
             [[maybe_unused]] bool rounds) {
  const int64_t each = (columns / (16 * threads.count) / WIDE_ROWS + 1) * WIDE_ROWS;
  auto with = [&](auto call) { call(threads, x, tokens, w, depth, out, columns, each); };
#if LEVEL == 2
  if constexpr (std::is_same_v<X, int8_t>) {
    if (tokens >= 4) return with(wide_product<Quads, X, Weight, Out>);
  } else if constexpr (!std::is_same_v<Weight, float>) {
    if (tokens >= MANY && (rounds || std::is_same_v<X, bf16>)) return with(wide_product<Pairs, X, Weight, Out>);
  }
#endif
  if (tokens < 8) return with(thin_product<X, Weight, Out>);
  with(wide_product<Singles, X, Weight, Out>);
}

// ---- attention of each row's last token to its keys, where they are in the cache

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
