// What low-rank adapters add to products, for one instruction set: included once for each, inside of a namespace.

// Outputs [first, last) of some rows: out = gain * (out + z b) + share * shift, of each its own adapter's; gain and
// shift may be null.
constexpr int64_t FAR = 512;  // bytes: how far ahead of each row

template <class Weight>
void expand(const LowRank<Weight>& part, const int32_t* slot, int64_t rows, int64_t slots, int64_t rank, float share,
            int64_t first, int64_t last) {
  for (int64_t t = 0; t < rows; t++) {
    if (slot[t] < 0 || slot[t] >= slots) continue;
    const Weight* b = part.b + slot[t] * rank * part.columns;
    const float *z = part.z + t * rank, *gain = part.gain, *shift = part.shift;
    if (gain) gain += slot[t] * part.columns, shift += slot[t] * part.columns;
    float* out = part.out + t * part.columns;
    const int64_t vectors = first + (last - first) / LANES * LANES;
    in_steps<4 * LANES, LANES>(first, vectors, [&](int64_t n, auto size) {
      constexpr int COUNT = size / LANES;
      Float total[COUNT];
      for (int i = 0; i < COUNT; i++) total[i] = load(out + n + i * LANES);
      for (int64_t r = 0; r < rank; r++) {
        // Each row is a stream of its own, which is more than the hardware follows.
        __builtin_prefetch((const char*)(b + r * part.columns + n) + FAR);
        for (int i = 0; i < COUNT; i++) total[i] += z[r] * load(b + r * part.columns + n + i * LANES);
      }
      for (int i = 0; i < COUNT; i++) {
        const int64_t at = n + i * LANES;
        store(out + at, gain ? load(gain + at) * total[i] + share * load(shift + at) : total[i]);
      }
    });
    for (int64_t n = vectors; n < last; n++) {
      float total = out[n];
      for (int64_t r = 0; r < rank; r++) total += z[r] * to_float(b[r * part.columns + n]);
      out[n] = gain ? gain[n] * total + share * shift[n] : total;
    }
  }
}
