// What low-rank adapters add to products, for one instruction set: included once for each, inside of a namespace.

constexpr int64_t FAR = 512;  // bytes: how far ahead of each row

// Of each part z = x a transposed.
template <class Weight>
Stage shrink(const Threads& threads, const float* x, int64_t depth, const Parts<Weight, float>& parts) {
  return in_pieces(threads, parts, 2, 4, [=](const Part<Weight, float>& part, int64_t first, int64_t last) {
    gemv(x + part.token * depth, depth, part, first, last);
  });
}

// Outputs [first, last) of some tokens of one adapter: out = gain * (scale * out + z b) + share * shift, but what is
// null; of none only the scale.
template <int TOKENS, class Weight>
void expand(const LowRank<Weight>& part, int64_t t, int64_t slot, int64_t rank, float share, int64_t first,
            int64_t last) {
  const int64_t columns = part.columns;
  const Weight* b = part.b + std::max<int64_t>(slot, 0) * rank * columns;
  const float *z = part.z + t * rank, *scales = part.scales;
  const float* gain = part.gain && slot >= 0 ? part.gain + slot * columns : nullptr;
  const float* shift = gain ? part.shift + slot * columns : nullptr;
  if (slot < 0) rank = 0;
  float* out = part.out + t * columns;
  const int64_t vectors = first + (last - first) / LANES * LANES;
  in_steps<(TOKENS == 1 ? 4 : 2) * LANES, LANES>(first, vectors, [&](int64_t n, auto size) {
    constexpr int COUNT = size / LANES;
    Float total[TOKENS][COUNT];
    for (int k = 0; k < TOKENS; k++)
      for (int i = 0; i < COUNT; i++) {
        total[k][i] = load(out + k * columns + n + i * LANES);
        if (scales) total[k][i] *= load(scales + n + i * LANES);
      }
    for (int64_t r = 0; r < rank; r++) {
      const Weight* row = b + r * columns + n;
      __builtin_prefetch((const char*)row + FAR);  // each row is a stream: more than the hardware follows
      Float w[COUNT];
      for (int i = 0; i < COUNT; i++) w[i] = load(row + i * LANES);
      for (int k = 0; k < TOKENS; k++)
        for (int i = 0; i < COUNT; i++) total[k][i] += z[k * rank + r] * w[i];
    }
    for (int k = 0; k < TOKENS; k++)
      for (int i = 0; i < COUNT; i++) {
        const int64_t at = n + i * LANES;
        store(out + k * columns + at, gain ? load(gain + at) * total[k][i] + share * load(shift + at) : total[k][i]);
      }
  });
  for (int64_t n = vectors; n < last; n++)
    for (int k = 0; k < TOKENS; k++) {
      float total = out[k * columns + n] * (scales ? scales[n] : 1);
      for (int64_t r = 0; r < rank; r++) total += z[k * rank + r] * to_float(b[r * columns + n]);
      out[k * columns + n] = gain ? gain[n] * total + share * shift[n] : total;
    }
}

template <class Weight>
Stage expand(const Threads& threads, const std::vector<LowRank<Weight>>& parts, const std::vector<Neighbours>& all,
             int64_t rank, float share) {
  return in_pieces(threads, parts, 2, 64, [=, &all](const LowRank<Weight>& part, int64_t first, int64_t last) {
    for (const Neighbours& own : all)
      in_steps<4, 1>(own.first, own.last, [&](int64_t t, auto tokens) {
        expand<tokens>(part, t, own.slot, rank, share, first, last);
      });
  });
}
