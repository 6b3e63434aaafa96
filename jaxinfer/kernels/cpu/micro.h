// Products x [T, K] times w [N, K] transposed, for one instruction set: included once for each, inside of a namespace.
//
// Before it: LEVEL (2: AVX-512 with VNNI and BF16, 1: AVX2 with FMA, 0: anything), and LANES, the floats of a vector.
// Few tokens: lanes run along K, a weight is read once and is the bottleneck ("gemv"). Many: lanes are tokens, and one
// weight (or 2 of bf16, or 4 of int8: what fills 32 bits) meets all of them ("gemm"); weights are not repacked.
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

INLINE Int load_bytes(const void* p) {
#if LEVEL == 2
  return (Int)_mm512_cvtepu8_epi32(load_as<__m128i>(p));
#elif LEVEL == 1
  return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load_as<Bytes>(p), Int);
#endif
}

INLINE Float load(const fp8* p) {
  const Int bits = load_bytes(p), size = bits & 0x7f;
  // Subnormals are made as 2**-6 more than they are: XLA's threads flush those of float32 to zero.
  const Int low = size < 8;
  const Float value = (Float)((size << 20) + (((low & 1) + 120) << 23)) - (Float)(low & 0x3c800000);
  return (Float)((Int)value | (bits & 0x80) << 24);
}

INLINE float sum(Float v) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

template <int STEP, int... LANE>
INLINE void swap_blocks(Float& a, Float& b, std::integer_sequence<int, LANE...>) {
  const Float low{(LANE & STEP ? b[LANE & ~STEP] : a[LANE])...};
  b = Float{(LANE & STEP ? b[LANE] : a[LANE | STEP])...};
  a = low;
}

template <int HALF, int... LANE>
INLINE Float with_halves_swapped(Float v, std::integer_sequence<int, LANE...>) {
  return Float{v[LANE ^ HALF]...};
}

// `sum` of each of N vectors, a power of two up to LANES, at once and to the same bits.
template <int N, int STEP = LANES / 2>
INLINE void sums(Float* rows, float* to) {
  constexpr auto LANE = std::make_integer_sequence<int, LANES>();
  constexpr int MANY = STEP * N / (LANES / 2);  // rows that are left of N
  if constexpr (MANY > 1) {
    for (int i = 0; i < MANY / 2; i++) {
      swap_blocks<STEP>(rows[i], rows[i + MANY / 2], LANE);
      rows[i] += rows[i + MANY / 2];
    }
    sums<N, STEP / 2>(rows, to);
  } else if constexpr (STEP > 0) {
    rows[0] += with_halves_swapped<STEP>(rows[0], LANE);
    sums<N, STEP / 2>(rows, to);
  } else {
    for (int i = 0; i < N; i++) to[i] = rows[0][i * (LANES / N)];
  }
}

// rows[i][j] becomes rows[j][i]: the halves of all, then the halves of those, and so on.
template <int STEP = LANES / 2>
INLINE void transpose(Float (&rows)[LANES]) {
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) swap_blocks<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>());
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// The highest of some numbers and the first place that has it; NaN is the highest.
inline void argmax(const float* x, int64_t count, float* highest, int32_t* place) {
  constexpr int64_t BLOCK = 16 * LANES;
  const int64_t whole = count / LANES * LANES;
  Float tops = Float{} - INFINITY;
  Int broken = {};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Float here = load(x + i);
    broken |= here != here;
    tops = here > tops ? here : tops;
  }
  float top = -INFINITY;
  bool none = true;  // of them is NaN
  for (int lane = 0; lane < LANES; lane++) {
    top = std::max(top, tops[lane]);
    none &= !broken[lane];
  }
  for (int64_t i = whole; i < count; i++) {
    top = std::max(top, x[i]);
    none &= x[i] == x[i];
  }
  auto is = [&](float number) { return none ? number == top : number != number; };
  int64_t at = 0;
  for (; none && at + BLOCK <= count; at += BLOCK) {
    Int found = {};
    for (int64_t i = 0; i < BLOCK; i += LANES) found |= load(x + at + i) == top;
    bool any = false;
    for (int lane = 0; lane < LANES; lane++) any |= found[lane] != 0;
    if (any) break;
  }
  while (!is(x[at])) at++;
  *highest = none ? top : NAN;
  *place = at;
}

// ---- gemv: a few tokens, float32 activations, exact products.

// Rows of weights that meet so many tokens at once: registers have no room for more of four, and one token waits for
// memory, which is read fastest in one stream.
constexpr int thin_rows(int tokens) { return tokens == 2 || tokens == 3 ? 2 : 1; }

// Calls `call(n, t, rows, tokens)`, the last two constants, for all outputs [first, last) of all tokens.
template <class Call>
INLINE void thin_tiles(int64_t first, int64_t last, int64_t tokens, const Call& call) {
  in_steps<2, 1>(first, last, [&](int64_t n, auto rows) {
    in_steps<4, 3, 2, 1>(0, tokens, [&](int64_t t, auto count) {
      in_steps<std::min<int>(rows, thin_rows(count)), 1>(n, n + rows, [&](int64_t row, auto some) {
        call(row, t, some, count);
      });
    });
  });
}

// Some outputs of some tokens: products of weights [begin, end) of their rows, added to it from the second piece on.
template <int ROWS, int TOKENS, class Weight, class Out>
INLINE void thin_tile(const float* x, int64_t depth, const Weight* w, int64_t begin, int64_t end, Out* out,
                      int64_t columns) {
  constexpr int UNROLL = LEVEL == 2 ? 4 : 2, STEP = UNROLL * LANES;
  Float total[ROWS][UNROLL][TOKENS] = {};
  int64_t k = begin;
  for (; k + STEP <= end; k += STEP)
    for (int r = 0; r < ROWS; r++) {
      // Rows follow each other in memory, and the hardware alone does not read far enough ahead.
      for (size_t line = 0; line < STEP * sizeof(Weight); line += 64)
        __builtin_prefetch((const char*)(w + r * depth + k) + AHEAD + line);
      for (int u = 0; u < UNROLL; u++) {
        Float weights = load(w + r * depth + k + u * LANES);
        for (int t = 0; t < TOKENS; t++) total[r][u][t] += weights * load(x + t * depth + k + u * LANES);
      }
    }
  for (; k + LANES <= end; k += LANES)
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) total[r][0][t] += load(w + r * depth + k) * load(x + t * depth + k);
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) {
      for (int u = 1; u < UNROLL; u++) total[r][0][t] += total[r][u][t];
      float result = sum(total[r][0][t]);
      for (int64_t i = k; i < end; i++) result += x[t * depth + i] * to_float(w[r * depth + i]);
      Out* to = out + t * columns + r;
      *to = (begin > 0 ? *to : 0) + (Out)result;
    }
}

// Outputs [first, last). Integers are multiplied as float32, which is exact for up to EXACT of them.
template <class Weight, class Out>
void gemv(const float* x, int64_t depth, const Part<Weight, Out>& part, int64_t first, int64_t last) {
  const int64_t step = std::is_same_v<Out, int32_t> ? EXACT : depth;
  thin_tiles(first, last, part.tokens, [&](int64_t n, int64_t t, auto rows, auto tokens) {
    Out* out = part.out + t * part.columns + n;
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += step)
      thin_tile<rows, tokens>(x + t * depth, depth, part.w + n * depth, begin, std::min(begin + step, depth), out,
                              part.columns);
  });
}

constexpr int WIDE_ROWS = LEVEL == 2 ? 12 : 6;  // with 2 panels they fill the registers

// ---- int4: two values a byte, the even column's in the low bits; a scale, and a zero point, for each `group` columns.
// Values are integers in two's complement, or places in a table of 16 numbers.

#if LEVEL == 2
INLINE Float looked_up(const float* table, Int places) {  // by the low 4 bits alone
  return (Float)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(table));
}
#elif LEVEL == 1
INLINE Float looked_up(const float* table, Int places) {
  const __m256i low = (__m256i)places;  // of which the low 3 bits count, and the fourth says from which half
  return (Float)_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), low),
                                 _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), low),
                                 (__m256)_mm256_slli_epi32(low, 28));
}
#else
INLINE Float looked_up(const float* table, Int places) {
  Float numbers;
  for (int i = 0; i < LANES; i++) numbers[i] = table[places[i] & 15];
  return numbers;
}
#endif

template <bool TABLE>
INLINE void load_pairs(const nibbles* p, const float* table, float zero, Float& even, Float& odd) {
  const Int bytes = load_bytes(p);
  if constexpr (TABLE) {
    even = looked_up(table, bytes);
    odd = looked_up(table, bytes >> 4);
    return;
  }
#if LEVEL == 2
  const __m512 values = (__m512)((Float)_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1) - zero);
  even = (Float)_mm512_permutexvar_ps((__m512i)bytes, values);  // which looks at the low 4 bits alone
  odd = (Float)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)bytes, 4), values);
#else
  even = __builtin_convertvector(bytes << 28 >> 28, Float) - zero;
  odd = __builtin_convertvector(bytes << 24 >> 28, Float) - zero;
#endif
}

// Some outputs from n on of some tokens, whose even columns come first in x.
template <bool TABLE, int ROWS, int TOKENS>
INLINE void thin_int4(const float* x, int64_t depth, const Part<nibbles, float>& part, int64_t n, float* out) {
  Float total[ROWS][TOKENS] = {};
  const int64_t half = depth / 2, blocks = depth / part.group;
  for (int64_t b = 0; b < blocks; b++) {
    Float some[ROWS][TOKENS] = {}, even, odd;
    const int64_t begin = b * (part.group / 2);
    for (int r = 0; r < ROWS; r++) __builtin_prefetch((const char*)(part.w + (n + r) * half + begin) + AHEAD);
    for (int64_t k = begin; k < begin + part.group / 2; k += LANES)
      for (int r = 0; r < ROWS; r++) {
        const float zero = part.zeros ? part.zeros[(n + r) * blocks + b] : 0;
        load_pairs<TABLE>(part.w + (n + r) * half + k, part.table, zero, even, odd);
        for (int t = 0; t < TOKENS; t++)
          some[r][t] += even * load(x + t * depth + k) + odd * load(x + t * depth + half + k);
      }
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) total[r][t] += some[r][t] * scale_of(part, (n + r) * blocks + b);
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) out[t * part.columns + r] = sum(total[r][t]);
}

inline void gemv(const float* x, int64_t depth, const Part<nibbles, float>& part, int64_t first, int64_t last) {
  auto with = [&](auto table) {
    thin_tiles(first, last, part.tokens, [&](int64_t n, int64_t t, auto rows, auto tokens) {
      thin_int4<table, rows, tokens>(x + t * depth, depth, part, n, part.out + t * part.columns + n);
    });
  };
  part.table ? with(std::true_type()) : with(std::false_type());
}

// Row n as float32.
template <bool TABLE>
INLINE void dequantize_row(const Part<nibbles, float>& part, int64_t n, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth / 2; k += LANES) {
    Float even, odd;
    const int64_t block = (n * depth + 2 * k) / part.group;
    load_pairs<TABLE>(part.w + n * depth / 2 + k, part.table, part.zeros ? part.zeros[block] : 0, even, odd);
    const float scale = scale_of(part, block);
    for (int i = 0; i < LANES; i++) {
      to[2 * (k + i)] = even[i] * scale;
      to[2 * (k + i) + 1] = odd[i] * scale;
    }
  }
}

inline void dequantize(const Part<nibbles, float>& part, int64_t n, int64_t depth, float* to) {
  part.table ? dequantize_row<true>(part, n, depth, to) : dequantize_row<false>(part, n, depth, to);
}

// ---- gemm: activations in panels [units][LANES tokens] of 32 bits, weights in rows of such units.

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

#if LEVEL == 1
struct Words {  // int8 as int16, two of which are multiplied and summed at once, in int32
  using Total = Int;
  static constexpr int64_t each = 2;
  static INLINE Int add(Int total, Int x, uint32_t w) {
    return total + (Int)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi32(w));
  }
  static void fill(uint32_t* to, const int8_t* from, int64_t count) {
    if (count % 2) to[count / 2] = 0;
    int16_t* words = (int16_t*)to;
    for (int64_t k = 0; k < count; k++) words[k] = from[k];
  }
};
#endif

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

struct Halves : Pairs {  // float32 as two bfloat16, of 16 bits together: lanes of one, and lanes of what is left
  static void fill_rest(uint32_t* to, const float* from, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES) {
      float some[LANES] = {};
      std::copy_n(from + k, std::min<int64_t>(count - k, LANES), some);
      const Float all = load(some);
      bf16 first[LANES];
      store(first, _mm512_cvtneps_pbh((__m512)all));
      const Float rest = all - load(first);
      store(to + k / 2, _mm512_cvtneps_pbh((__m512)(rest == rest ? rest : Float{})));  // infinity has none
    }
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

template <class Units>
constexpr bool IN_HALVES = false;
#if LEVEL == 2
template <>
constexpr bool IN_HALVES<Halves> = true;
#endif
template <class Units>
constexpr int64_t PANEL = IN_HALVES<Units> ? LANES / 2 : LANES;  // tokens

// The first PANEL tokens of x as a panel; those from `tokens` on are zeros.
template <class Units, class X>
void pack(const X* x, int64_t tokens, int64_t depth, uint32_t* panel) {
  const int64_t some = std::min<int64_t>(tokens, PANEL<Units>);
  alignas(64) uint32_t staged[LANES][LANES] = {};
  for (int64_t k = 0; k < depth; k += LANES * Units::each) {
    const int64_t count = std::min(depth - k, LANES * Units::each), units = (count + Units::each - 1) / Units::each;
    for (int64_t t = 0; t < some; t++) {
      Units::fill(staged[t], x + t * depth + k, count);
      if constexpr (IN_HALVES<Units>) Units::fill_rest(staged[PANEL<Units> + t], x + t * depth + k, count);
    }
    Float rows[LANES];
    for (int t = 0; t < LANES; t++) rows[t] = load_as<Float>(staged[t]);
    transpose(rows);
    for (int64_t u = 0; u < units; u++)
      store(panel + u * LANES, (Int)rows[u] ^ (Units::each == 4 ? (int32_t)0x80808080 : 0));
    panel += units * LANES;
  }
}

// Compiled by itself, or the compiler runs out of registers. more: what outputs have beside. next: where the weights are
// that come after these, of which this fetches `bytes` for each unit.
template <class Units, int ROWS, int PANELS, class Out>
APART void wide_tile(const uint32_t* panels, int64_t panel, const uint32_t* w, int64_t stride, int64_t begin,
                     int64_t end, const Out* more, Out* out, int64_t columns, int64_t tokens, bool add,
                     const char* next, int64_t bytes) {
  typename Units::Total total[PANELS][ROWS];
  for (auto& panel : total)
    for (auto& row : panel) row = typename Units::Total{};
  for (int64_t u = begin; u < end; u++) {
    __builtin_prefetch(next + u * bytes);
    for (int r = 0; r < ROWS; r++)
      for (int p = 0; p < PANELS; p++)
        total[p][r] = Units::add(total[p][r], load_as<Int>(panels + p * panel + u * LANES), w[r * stride + u]);
  }
  typedef Out Outs __attribute__((vector_size(4 * LANES)));
  for (int p = 0; p < PANELS; p++)
    for (int n = 0; n < ROWS; n += LANES) {
      Float lanes[LANES];
      for (int r = 0; r < LANES; r++) lanes[r] = n + r < ROWS ? (Float)total[p][n + r] : Float{};
      transpose(lanes);
      if constexpr (IN_HALVES<Units>)
        for (int t = 0; t < PANEL<Units>; t++) lanes[t] += lanes[PANEL<Units> + t];
      Outs results[LANES];
      for (int t = 0; t < PANEL<Units>; t++)
        results[t] = __builtin_convertvector((typename Units::Total)lanes[t], Outs) + load_as<Outs>(more + n);
      const int some = std::min(ROWS - n, LANES);
      for (int64_t t = 0; t < std::min<int64_t>(tokens - p * PANEL<Units>, PANEL<Units>); t++) {
        Out* to = out + (p * PANEL<Units> + t) * columns + n;
        for (int r = 0; add && r < some; r++) results[t][r] += to[r];
        std::memcpy(to, &results[t], some * sizeof(Out));
      }
    }
}

// Outputs [first, last). scratch: for WIDE_ROWS rows of weights as units, and one of float32.
template <class Units, class Weight, class Out>
void gemm(const uint32_t* panels, int64_t depth, const Part<Weight, Out>& part, int64_t first, int64_t last,
          uint32_t* scratch) {
  constexpr bool as_they_are = sizeof(Weight) * Units::each == 4;
  const Weight* w = part.w;
  const int64_t units = (depth + Units::each - 1) / Units::each;
  const int64_t step = Units::each == 4 ? units : EXACT;
  const int64_t row = held_by_row<Weight>(depth) * sizeof(Weight);  // bytes
  auto rows_of = [&](int64_t n, auto rows) {
    const uint32_t* weights = scratch;
    if constexpr (std::is_same_v<Weight, nibbles>) {
      float* row = (float*)(scratch + WIDE_ROWS * units);
      for (int64_t r = 0; r < rows; r++) {
        dequantize(part, n + r, depth, row);
        Units::fill(scratch + r * units, row, depth);
      }
    } else if (as_they_are && depth % Units::each == 0 && part.tokens < COPIED) {
      weights = (const uint32_t*)(w + n * depth);
    } else {
      for (int64_t r = 0; r < rows; r++) Units::fill(scratch + r * units, w + (n + r) * depth, depth);
    }
    Out more[WIDE_ROWS + LANES] = {};
    if constexpr (Units::each == 4)
      for (int64_t r = 0; r < rows; r++) more[r] = -128 * total_of(w + (n + r) * depth, depth);
    for (int64_t begin = 0; begin == 0 || begin < units; begin += step) {
      const int64_t end = std::min(begin + step, units);
      auto some = [&](int64_t p, auto count) {
        wide_tile<Units, rows, count>(panels + p * LANES * units, units * LANES, weights, units, begin, end, more,
                                      part.out + p * PANEL<Units> * part.columns + n, part.columns,
                                      part.tokens - p * PANEL<Units>,
                                      begin > 0, (const char*)w + (n + (p == 0 ? rows : 0)) * row, rows * row / units);
      };
      in_steps<2, 1>(0, (part.tokens + PANEL<Units> - 1) / PANEL<Units>, some);
    }
  };
  in_steps<WIDE_ROWS, 4, 1>(first, last, rows_of);
}

// Panels are packed once for all parts of the same tokens.
template <class Units, class X, class Weight, class Out>
void wide_products(Threads& threads, const X* x, int64_t depth, const Parts<Weight, Out>& whole) {
  const int64_t units = (depth + Units::each - 1) / Units::each, size = LANES * units;
  const int64_t most = std::max<int64_t>(CACHED / (8 * size), 4) * 2 * LANES;  // tokens
  Parts<Weight, Out> parts;
  for (auto part : whole)
    for (int64_t left = part.tokens; left > 0; left -= most, part.token += most, part.out += most * part.columns) {
      part.tokens = std::min(left, most);
      parts.push_back(part);
    }
  std::map<int64_t, int64_t> first_panel;           // of those that begin with a token
  std::vector<std::pair<int64_t, int64_t>> panels;  // the first token of each, and how many are left from there
  for (const auto& part : parts)
    if (first_panel.emplace(part.token, panels.size()).second)
      for (int64_t t = 0; t < part.tokens; t += PANEL<Units>) panels.push_back({part.token + t, part.tokens - t});
  uint32_t* packed = (uint32_t*)buffer(4 * panels.size() * size);
  const Stage packs{(int64_t)panels.size(), [&, packed](int64_t p) {
                      pack<Units>(x + panels[p].first * depth, panels[p].second, depth, packed + p * size);
                    }};
  auto meet = [&, packed](const Part<Weight, Out>& part, int64_t first, int64_t last) {
    std::unique_ptr<uint32_t[]> scratch(new uint32_t[WIDE_ROWS * units + depth]);
    gemm<Units>(packed + first_panel.at(part.token) * size, depth, part, first, last, scratch.get());
  };
  threads.run({packs, in_pieces(threads, parts, 16, WIDE_ROWS, meet)});
}

// Tokens as gemv wants them, in this thread's buffer where they aren't: float32, and for int4 the even columns of
// each before the odd ones.
template <class Weight, class X>
const float* as_floats(const X* x, int64_t tokens, int64_t depth) {
  constexpr bool int4 = std::is_same_v<Weight, nibbles>;
  if constexpr (!int4 && std::is_same_v<X, float>) return x;
  float* to = (float*)buffer(4 * tokens * depth);
  for (int64_t i = 0; i < tokens * depth; i++)
    to[int4 ? i / depth * depth + i % 2 * (depth / 2) + i % depth / 2 : i] = to_float(x[i]);
  return to;
}

template <class X, class Weight, class Out>
void thin_products(Threads& threads, const X* x, int64_t tokens, int64_t depth, const Parts<Weight, Out>& parts) {
  const float* floats = as_floats<Weight>(x, tokens, depth);
  auto meet = [=](const Part<Weight, Out>& part, int64_t first, int64_t last) {
    gemv(floats + part.token * depth, depth, part, first, last);
  };
  threads.run({in_pieces(threads, parts, 4, WIDE_ROWS, meet)});
}

template <class X, class Weight>
constexpr bool FITS_HALVES =  // and nothing of a weight is lost in bfloat16
    std::is_same_v<X, float> && !std::is_same_v<Weight, float> && !std::is_same_v<Weight, nibbles>;

// out [T, N] = x [T, K] times w [N, K] transposed, of each part and its tokens; parts that are done in one way are done
// together. rounds: float32 activations may become bfloat16, two of them from SEVERAL tokens on, one from MANY on. How a part is done is decided by all of
// its tokens, so that the bits of those that are live do not depend on how many these are.
template <class X, class Weight, class Out>
void products(Threads& threads, const X* x, int64_t tokens, int64_t depth, const Parts<Weight, Out>& parts,
              [[maybe_unused]] bool rounds) {
  Parts<Weight, Out> thin, wide, packed, halves;
  auto way = [&](const Part<Weight, Out>& part) {
#if LEVEL == 1
    if (std::is_same_v<X, int8_t> && part.tokens >= 4) return &packed;
#elif LEVEL == 2
    if constexpr (std::is_same_v<X, int8_t>) {
      if (part.tokens >= 4) return &packed;
    } else if constexpr (!std::is_same_v<Weight, float>) {
      if (part.tokens >= MANY && (rounds || std::is_same_v<X, bf16>)) return &packed;
      if (FITS_HALVES<X, Weight> && part.tokens >= SEVERAL && part.tokens < MANY && rounds) return &halves;
    }
#endif
    return part.tokens < FEW ? &thin : &wide;
  };
  for (const auto& part : parts) {
    auto& some = *way(part);
    some.push_back(part);
    some.back().tokens = part.live;
  }
  if (!thin.empty()) thin_products(threads, x, tokens, depth, thin);
  if (!wide.empty()) wide_products<Singles>(threads, x, depth, wide);
#if LEVEL == 1
  if constexpr (std::is_same_v<X, int8_t>)
    if (!packed.empty()) wide_products<Words>(threads, x, depth, packed);
#elif LEVEL == 2
  using Units = std::conditional_t<std::is_same_v<X, int8_t>, Quads, Pairs>;
  if constexpr (!std::is_same_v<Weight, float>)
    if (!packed.empty()) wide_products<Units>(threads, x, depth, packed);
  if constexpr (FITS_HALVES<X, Weight>)
    if (!halves.empty()) wide_products<Halves>(threads, x, depth, halves);
#endif
}
