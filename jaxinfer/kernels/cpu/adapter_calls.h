// Products with adapters beside them as XLA calls them.

// What is beside products [T, N] of x [T, K]: of each of them arguments a [S, R, K], b [S, R, N], and perhaps gain and
// shift [S, N], after `skip` others.
template <class Weight>
struct Adapters {
  Adapters(ffi::AnyBuffer x, float share) : x(x), share(share), tokens(x.dimensions()[0]), depth(x.dimensions()[1]) {}

  // Whether they fit. scaled: the last of the others are the scales [N] of products.
  bool read(ffi::Buffer<ffi::S32> slot, Arguments given, Results outs, size_t skip, bool scaled) {
    const size_t each = outs.size() ? given.size() / outs.size() : 0;
    if ((each != skip + 2 && each != skip + 4) || given.size() != each * outs.size() ||
        (int64_t)slot.element_count() != tokens || given.get<ffi::AnyBuffer>(skip)->dimensions().size() != 3)
      return false;
    const auto first = given.get<ffi::AnyBuffer>(skip)->dimensions();
    const int64_t slots = first[0];
    rank = first[1];
    low.resize(outs.size() * tokens * rank);
    for (size_t i = 0; i < outs.size(); i++) {
      const auto get = [&](size_t k) { return *given.get<ffi::AnyBuffer>(each * i + k); };
      const ffi::AnyBuffer out = **outs.get<ffi::AnyBuffer>(i), a = get(skip), b = get(skip + 1);
      const int64_t own = out.dimensions().back();
      const float* vectors[2] = {nullptr, nullptr};
      bool fits = (int64_t)out.element_count() == tokens * own && (int64_t)a.element_count() == slots * rank * depth &&
                  (int64_t)b.element_count() == slots * rank * own && a.element_type() == b.element_type();
      for (size_t k = skip + 2; k < each; k++) {
        fits &= (int64_t)get(k).element_count() == slots * own;
        vectors[k - skip - 2] = (const float*)get(k).untyped_data();
      }
      if (!fits || (scaled && (int64_t)get(skip - 1).element_count() != own)) return false;
      parts.push_back({(const Weight*)a.untyped_data(), (const Weight*)b.untyped_data(), vectors[0], vectors[1],
                       scaled ? (const float*)get(skip - 1).untyped_data() : nullptr, low.data() + i * tokens * rank,
                       (float*)out.untyped_data(), own});
      columns += own;
    }
    const int32_t* of = slot.typed_data();
    auto own = [&](int64_t t) { return of[t] < 0 || of[t] >= slots ? -1 : of[t]; };
    for (int64_t t = 0, end; t < tokens; t = end) {
      for (end = t + 1; end < tokens && end - t < MOST_NEIGHBOURS && own(end) == own(t);) end++;
      if (own(t) >= 0 || scaled) all.push_back({own(t), t, end});
      if (own(t) < 0) continue;
      used += end - t;
      for (const auto& part : parts)
        shrunk.push_back({part.a + of[t] * rank * depth, part.z + t * rank, rank, nullptr, nullptr, nullptr, nullptr, 0,
                          t, end - t});
    }
    return true;
  }

  Beside beside(const Threads& threads) const {
    return {AT_LEVEL(shrink<Weight>)(threads, (const float*)x.untyped_data(), depth, shrunk),
            AT_LEVEL(expand<Weight>)(threads, parts, all, rank, share)};
  }

  ffi::AnyBuffer x;
  float share;
  int64_t tokens, depth, rank = 0, columns = 0, used = 0;
  std::vector<float> low;
  std::vector<LowRank<Weight>> parts;
  std::vector<Neighbours> all;
  Parts<Weight, float> shrunk;
};

template <class Weight>
ffi::Error low_ranks(ffi::ThreadPool pool, float share, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slot, Arguments given,
                     Results outs) {
  Adapters<Weight> adapters(x, share);
  if (!adapters.read(slot, given, outs, 1, false))
    return wrong("jaxinfer_low_rank: base must be [T, N], a [S, R, K], b [S, R, N], gain and shift [S, N]");
  for (size_t i = 0; i < outs.size(); i++) {
    const auto base = *given.get<ffi::AnyBuffer>(i * (given.size() / outs.size()));
    void* out = (*outs.get<ffi::AnyBuffer>(i))->untyped_data();
    if (base.size_bytes() != (*outs.get<ffi::AnyBuffer>(i))->size_bytes())
      return wrong("jaxinfer_low_rank: base and what comes out must have one shape");
    if (out != base.untyped_data()) std::memcpy(out, base.untyped_data(), base.size_bytes());
  }
  Threads threads(pool);
  const int64_t sizes = adapters.depth * (int64_t)adapters.parts.size() + adapters.columns;
  if (adapters.used * adapters.rank * sizes < SMALL) threads.count = 1;
  const Beside beside = adapters.beside(threads);
  threads.run({beside.first, beside.last});
  return ffi::Error::Success();
}

// Products with weights of one kind, and perhaps their scales, and what is beside them: all at once.
template <class Weight>
ffi::Error adapted_dots(ffi::ThreadPool pool, bool rounds, bool scaled, float share, ffi::AnyBuffer x,
                        ffi::Buffer<ffi::S32> slot, Arguments given, Results outs) {
  Adapters<Weight> adapters(x, share);
  if (!adapters.read(slot, given, outs, scaled ? 2 : 1, scaled))
    return wrong("jaxinfer_adapted_dot: w must be [N, K], scales [N], a [S, R, K], b [S, R, N], gain and shift [S, N]");
  const Beside beside = adapters.beside(Threads(pool));
  return any_dot({pool, rounds, x, nullptr, 0, &beside}, given, outs);
}

// Calls `with` of the dtype that adapters are in, the `place`-th argument's.
template <class Call>
ffi::Error of_kind(ffi::AnyBuffer x, Arguments given, size_t place, const Call& with) {
  if (x.element_type() != ffi::DataType::F32 || x.dimensions().size() != 2 || given.size() <= place)
    return wrong("jaxinfer_low_rank: x must be [T, K], float32");
  const auto kind = given.get<ffi::AnyBuffer>(place)->element_type();
  if (kind == ffi::DataType::BF16) return with(bf16());
  if (kind == ffi::DataType::F32) return with(float());
  return wrong("jaxinfer_low_rank: adapters must be float32 or bfloat16");
}

ffi::Error low_rank(ffi::ThreadPool pool, float share, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slot, Arguments given,
                    Results outs) {
  return of_kind(x, given, 1, [&](auto kind) { return low_ranks<decltype(kind)>(pool, share, x, slot, given, outs); });
}

ffi::Error adapted_dot(ffi::ThreadPool pool, bool rounds, bool scaled, float share, ffi::AnyBuffer x,
                       ffi::Buffer<ffi::S32> slot, Arguments given, Results outs) {
  return of_kind(x, given, scaled ? 2 : 1, [&](auto kind) {
    return adapted_dots<decltype(kind)>(pool, rounds, scaled, share, x, slot, given, outs);
  });
}
