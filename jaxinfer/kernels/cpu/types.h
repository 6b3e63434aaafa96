// What kernels of all instruction sets work with.

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
  int64_t live;           // how many come before zeros that end them
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

// How many of them, each of one type, hold a row of weights.
template <class Weight>
constexpr int64_t held_by_row(int64_t depth) { return std::is_same_v<Weight, nibbles> ? depth / 2 : depth; }

template <class Weight, class Out>
using Parts = std::vector<Part<Weight, Out>>;

constexpr int64_t AHEAD = 4096;      // bytes: how far ahead weights are fetched
constexpr int64_t FEW = 8;          // tokens, below which each weight is used as it is read
constexpr int64_t SEVERAL = 5;      // tokens, from which on activations may become two bfloat16
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

struct Run {  // tokens of one row, which goes on from what is in its slot; fresh: from zeros
  int64_t first, last, slot;
  bool fresh;
};

struct LinearAttention {
  const float *q, *k, *v;       // [tokens, keys, depth] twice, and [tokens, heads, width]
  const float *decay, *beta;    // [tokens, heads]; beta is null where there is no delta rule
  float *out, *states;          // [tokens, heads, width] and [slots, heads, depth, width]
  int64_t keys, heads, depth, width;
};

struct SelectiveScan {
  const float *x, *dt, *b, *c, *a;  // [tokens, channels] twice, [tokens, size] twice, and [channels, size]
  float *out, *states;              // [tokens, channels] and [slots, channels, size]
  int64_t channels, size;
};

struct Convolution {
  const float *x, *weight, *bias;  // [tokens, channels], [channels, width] and [channels], or null
  float *out, *states;             // [tokens, channels] and [slots, width - 1, channels]
  int64_t channels, width;
};

constexpr int64_t MOST_NEIGHBOURS = 8;
constexpr int64_t MOST_QUERIES = 128;  // of a token that have one key
