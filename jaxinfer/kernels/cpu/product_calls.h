// Products as XLA calls them.

using Arguments = ffi::RemainingArgs;
using Table = ffi::Span<const float>;
using Results = ffi::RemainingRets;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// Of a call: x [T, K], and a weight [N, K] of each part, or experts [E, N, K] where there are sizes: how many tokens each
// expert has, which come in their order; what comes after them is nobody's.
struct Operands {
  ffi::ThreadPool pool;
  bool rounds;
  ffi::AnyBuffer x;
  const int32_t* sizes;
  int64_t experts;
  const Beside* beside = nullptr;
};

std::atomic<int64_t> experts_read{0};  // bytes of their weights, without scales

// Of parts with the weights of all experts, one for each that has tokens. Outputs of the others are zeros.
template <class Weight, class Out>
Parts<Weight, Out> of_experts(const Operands& call, const Parts<Weight, Out>& parts) {
  const int64_t depth = call.x.dimensions()[1], held = held_by_row<Weight>(depth);
  Parts<Weight, Out> owned;
  for (Part<Weight, Out> part : parts) {
    const int64_t tokens = part.tokens;
    part.token = 0;
    for (int64_t e = 0; e < call.experts; e++) {
      part.tokens = std::max(call.sizes[e], 0);
      if (part.tokens) owned.push_back(part);
      part.token += part.tokens;
      part.out += part.tokens * part.columns;
      part.w += part.columns * held;
      if (part.scales) part.scales += part.columns * (depth / part.group);
      if (part.exponents) part.exponents += part.columns * (depth / part.group);
      if (part.zeros) part.zeros += part.columns * (depth / part.group);
    }
    std::memset(part.out, 0, (tokens - part.token) * part.columns * sizeof(Out));
  }
  return owned;
}

// How many tokens come before those that end them and are zeros, as padding is.
template <class X>
int64_t before_zeros(const X* x, int64_t tokens, int64_t depth) {
  using Bits = std::conditional_t<sizeof(X) == 4, uint32_t, std::conditional_t<sizeof(X) == 2, uint16_t, uint8_t>>;
  const Bits sign = std::is_same_v<X, int8_t> ? 0 : Bits(1) << (8 * sizeof(X) - 1);  // which zeros may have
  constexpr int64_t STEP = 64;  // values: the first of them tell of most tokens
  for (; tokens > 0; tokens--)
    for (int64_t k = 0; k < depth; k += STEP) {
      Bits values[STEP] = {}, any = 0;
      std::memcpy(values, x + (tokens - 1) * depth + k, std::min(STEP, depth - k) * sizeof(X));
      for (Bits value : values) any |= value & ~sign;
      if (any) return tokens;
    }
  return 0;
}

// Leaves out the products of zeros, which are zeros. One token stays, where there is nothing else: others may wait for
// these products. Experts without any are not read.
template <class X, class Weight, class Out>
void leave_out_zeros(const Operands& call, const X* x, int64_t depth, Parts<Weight, Out>& parts) {
  std::map<int64_t, int64_t> found;  // of those that begin with a token
  for (auto& part : parts) {
    const auto [at, anew] = found.emplace(part.token, 0);
    if (anew) at->second = before_zeros(x + part.token * depth, part.tokens, depth);
    part.live = std::max<int64_t>(at->second, call.sizes ? 0 : std::min<int64_t>(part.tokens, 1));
    std::memset(part.out + part.live * part.columns, 0, (part.tokens - part.live) * part.columns * sizeof(Out));
  }
  if (!call.sizes) return;
  parts.erase(std::remove_if(parts.begin(), parts.end(), [](const auto& part) { return !part.live; }), parts.end());
  for (const auto& part : parts) experts_read += part.columns * held_by_row<Weight>(depth) * sizeof(Weight);
}

template <class X, class Weight, class Out>
ffi::Error product(const Operands& call, Parts<Weight, Out> parts) {
  const X* x = (const X*)call.x.untyped_data();
  const int64_t tokens = call.x.dimensions()[0], depth = call.x.dimensions()[1];
  int64_t columns = 0, used = call.sizes ? 0 : tokens;
  for (const auto& part : parts) columns += part.columns;
  for (int64_t e = 0; e < call.experts; e++) used += std::max(call.sizes[e], 0);
  if (used > tokens) return wrong("jaxinfer_grouped_dot: the sizes are of more tokens than there are");
  Threads threads(call.pool, call.beside);
  if (used * depth * columns < SMALL) threads.count = 1;
  if (call.sizes) parts = of_experts(call, parts);
  leave_out_zeros(call, x, depth, parts);
  AT_LEVEL(products<X, Weight, Out>)(threads, x, tokens, depth, parts, call.rounds);
  return ffi::Error::Success();
}

template <class X, class Weight, class Out>
ffi::Error with_weights(const Operands& call, Arguments weights, Results outs) {
  Parts<Weight, Out> parts;
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = *weights.get<ffi::AnyBuffer>(i * (weights.size() / outs.size()));
    parts.push_back({(const Weight*)w.untyped_data(), (Out*)(*outs.get<ffi::AnyBuffer>(i))->untyped_data(),
                     w.dimensions()[w.dimensions().size() - 2], nullptr, nullptr, nullptr, nullptr, 0, 0,
                     call.x.dimensions()[0]});
  }
  return product<X>(call, parts);
}

// Whether an array is [N, K], or [E, N, K] of as many experts as there are sizes.
bool fits(const Operands& call, ffi::AnyBuffer::Dimensions shape) {
  return shape.size() == (call.sizes ? 3 : 2) && (!call.sizes || shape[0] == call.experts);
}

// Of each output there is a weight, and perhaps something else after it.
ffi::Error any_dot(const Operands& call, Arguments weights, Results outs) {
  using ffi::DataType;
  const char* shapes = "jaxinfer_dot: x must be [T, K], each w [N, K] or [E, N, K], of one type, and what comes out [T, N]";
  const size_t each = outs.size() ? weights.size() / outs.size() : 0;
  if (each == 0 || weights.size() != each * outs.size()) return wrong(shapes);
  const DataType kind = weights.get<ffi::AnyBuffer>(0)->element_type(), of = call.x.element_type();
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = *weights.get<ffi::AnyBuffer>(i * each);
    const auto in = call.x.dimensions();
    if (in.size() != 2 || !fits(call, w.dimensions()) || in[1] != w.dimensions().back() || w.element_type() != kind ||
        (int64_t)(*outs.get<ffi::AnyBuffer>(i))->element_count() != in[0] * w.dimensions()[w.dimensions().size() - 2])
      return wrong(shapes);
  }
  auto are = [&](DataType a, DataType b) { return of == a && kind == b; };
  auto with = [&](auto each) { return each(call, weights, outs); };
  if (are(DataType::S8, DataType::S8)) return with(with_weights<int8_t, int8_t, int32_t>);
  if (are(DataType::F32, DataType::S8)) return with(with_weights<float, int8_t, float>);
  if (are(DataType::F32, DataType::BF16)) return with(with_weights<float, bf16, float>);
  if (are(DataType::F32, DataType::F8E4M3FN)) return with(with_weights<float, fp8, float>);
  if (are(DataType::F32, DataType::F32)) return with(with_weights<float, float, float>);
  if (are(DataType::BF16, DataType::S8)) return with(with_weights<bf16, int8_t, float>);
  if (are(DataType::BF16, DataType::BF16)) return with(with_weights<bf16, bf16, float>);
  if (are(DataType::BF16, DataType::F8E4M3FN)) return with(with_weights<bf16, fp8, float>);
  return wrong("jaxinfer_dot: there is no product of these types");
}

// Of each weight there are values, scales, and zeros if the scheme has them. table: what values stand for; empty:
// themselves, in two's complement.
ffi::Error any_dot_int4(const Operands& call, Table table, Arguments weights, Results outs) {
  const char* shapes = "jaxinfer_dot_int4: x must be [T, K], w [N, K/2] and scales (and zeros) [N, K/(32 n)], or [E, ...]";
  if (table.size() != 0 && table.size() != 16) return wrong("jaxinfer_dot_int4: a table must have 16 numbers");
  const size_t each = outs.size() ? weights.size() / outs.size() : 0;
  const auto in = call.x.dimensions();
  if (each < 2 || each > 3 || weights.size() != each * outs.size() || in.size() != 2) return wrong(shapes);
  Parts<nibbles, float> parts;
  for (size_t i = 0; i < outs.size(); i++) {
    const auto w = weights.get<ffi::Buffer<ffi::U8>>(i * each);
    const auto scales = weights.get<ffi::AnyBuffer>(i * each + 1);
    if (!w.has_value() || !scales.has_value()) return wrong(shapes);
    const bool powers = scales->element_type() == ffi::DataType::F8E8M0FNU;
    if (!powers && scales->element_type() != ffi::DataType::F32) return wrong(shapes);
    const auto held = w->dimensions(), some = scales->dimensions();
    if (!fits(call, held) || !fits(call, some)) return wrong(shapes);
    const int64_t rows = held[held.size() - 2], blocks = some.back();
    if (in[1] != 2 * held.back() || some[some.size() - 2] != rows || blocks < 1 || in[1] % blocks ||
        in[1] / blocks % 32)
      return wrong(shapes);
    const int8_t* zeros = nullptr;
    if (each == 3) {
      const auto given = weights.get<ffi::Buffer<ffi::S8>>(i * each + 2);
      if (!given.has_value() || given->element_count() != scales->element_count()) return wrong(shapes);
      zeros = given->typed_data();
    }
    parts.push_back({(const nibbles*)w->typed_data(), (float*)(*outs.get<ffi::AnyBuffer>(i))->untyped_data(), rows,
                     powers ? nullptr : (const float*)scales->untyped_data(),
                     powers ? (const uint8_t*)scales->untyped_data() : nullptr, zeros,
                     table.size() ? table.begin() : nullptr, in[1] / blocks, 0, in[0]});
  }
  if (call.x.element_type() == ffi::DataType::F32) return product<float>(call, parts);
  if (call.x.element_type() == ffi::DataType::BF16) return product<bf16>(call, parts);
  return wrong("jaxinfer_dot_int4: x must be float32 or bfloat16");
}

ffi::Error dot(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, Arguments weights, Results outs) {
  if (weights.size() != outs.size()) return wrong("jaxinfer_dot: there must be as many weights as products");
  return any_dot({pool, rounds, x, nullptr, 0}, weights, outs);
}

ffi::Error dot_int4(ffi::ThreadPool pool, bool rounds, Table table, ffi::AnyBuffer x, Arguments weights, Results outs) {
  return any_dot_int4({pool, rounds, x, nullptr, 0}, table, weights, outs);
}

using Sizes = ffi::Buffer<ffi::S32>;

ffi::Error grouped(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, Sizes sizes, Arguments weights, Results outs) {
  if (weights.size() != outs.size()) return wrong("jaxinfer_grouped_dot: there must be as many weights as products");
  return any_dot({pool, rounds, x, sizes.typed_data(), (int64_t)sizes.element_count()}, weights, outs);
}

ffi::Error grouped_int4(ffi::ThreadPool pool, bool rounds, Table table, ffi::AnyBuffer x, Sizes sizes,
                        Arguments weights, Results outs) {
  const auto count = (int64_t)sizes.element_count();
  return any_dot_int4({pool, rounds, x, sizes.typed_data(), count}, table, weights, outs);
}
