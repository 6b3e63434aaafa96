// XLA FFI handlers of the CPU kernels. What they compute is said in __init__.py; how, in micro.h.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

#define INLINE inline __attribute__((always_inline))

namespace {

struct bf16 {
  uint16_t bits;
};

struct nibbles {  // of int4
  uint8_t bits;
};

struct Groups {  // of columns that have one scale: scales [N, K / size]
  const float* scales;
  int64_t size;
};

constexpr int64_t AHEAD = 4096;      // bytes: how far ahead weights are fetched
constexpr int64_t MANY = 16;        // tokens, from which on activations may be rounded
constexpr int64_t SMALL = 1 << 16;  // products that are done before another thread has woken up
constexpr int64_t EXACT = 1024;  // products of int8 whose sum float32 has exactly: 1024 * 127 * 128 < 2**24

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
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

// Runs `call(0)` to `call(tasks - 1)` on XLA's own threads and this one, and returns when all are done. A thread that
// comes too late, because it was busy with something else, finds nothing to do.
struct Threads {
  explicit Threads(ffi::ThreadPool pool) : pool(pool), count(std::max<int64_t>(pool.num_threads(), 1)) {}

  void run(int64_t tasks, std::function<void(int64_t)> call) {
    struct Shared {
      Shared(int64_t tasks, std::function<void(int64_t)> call) : tasks(tasks), call(std::move(call)) {}
      void work() {
        for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
          call(i);
          done.fetch_add(1);
        }
      }
      const int64_t tasks;
      const std::function<void(int64_t)> call;
      std::atomic<int64_t> next{0}, done{0};
    };
    auto shared = std::make_shared<Shared>(tasks, std::move(call));
    for (int64_t i = 1; i < std::min(count, tasks); i++) pool.Schedule([shared] { shared->work(); });
    shared->work();
    while (shared->done.load() < tasks) std::this_thread::yield();
  }

  ffi::ThreadPool pool;
  int64_t count;
};

struct Attention {
  const float* q;  // [rows, kv_heads, group, dim]
  float* out;
  const float *k_scales, *v_scales;  // [pages, kv_heads, page_size], or null
  const int32_t *pages, *kv_len;     // [rows, table] and [rows]
  int64_t kv_heads, group, dim, page_size, table, window;
  float scale;
};

constexpr int64_t MOST_QUERIES = 128;  // that have one key

namespace portable {
#define LEVEL 0
#define LANES 4
#include "micro.h"
#include "attention.h"
#undef LEVEL
#undef LANES
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LEVEL 1
#define LANES 8
#include "micro.h"
#include "attention.h"
#undef LEVEL
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")
namespace avx512 {
#define LEVEL 2
#define LANES 16
#include "micro.h"
#include "attention.h"
#undef LEVEL
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif


int level_of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> level{level_of_machine()};

template <class X, class Weight, class Out, class Kept>
ffi::Error product(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, Kept w,
                   ffi::Result<ffi::AnyBuffer> out, Groups groups = {}) {
  const int64_t tokens = x.dimensions()[0], depth = x.dimensions()[1], columns = w.dimensions()[0];
  Threads threads(pool);
  if (tokens * depth * columns < SMALL) threads.count = 1;
  auto with = [&](auto call) {
    call(threads, (const X*)x.untyped_data(), tokens, (const Weight*)w.untyped_data(), depth,
         (Out*)out->untyped_data(), columns, rounds, groups);
  };
#if defined(__x86_64__)
  if (level == 2) return with(avx512::product<X, Weight, Out>), ffi::Error::Success();
  if (level == 1) return with(avx2::product<X, Weight, Out>), ffi::Error::Success();
#endif
  return with(portable::product<X, Weight, Out>), ffi::Error::Success();
}

ffi::Error dot(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, ffi::AnyBuffer w,
               ffi::Result<ffi::AnyBuffer> out) {
  using ffi::DataType;
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2 || x.dimensions()[1] != w.dimensions()[1])
    return ffi::Error::InvalidArgument("jaxinfer_dot: x must be [T, K] and w [N, K]");
  const auto types = std::make_pair(x.element_type(), w.element_type());
  auto are = [&](DataType a, DataType b) { return types == std::make_pair(a, b); };
  if (are(DataType::S8, DataType::S8)) return product<int8_t, int8_t, int32_t>(pool, rounds, x, w, out);
  if (are(DataType::F32, DataType::S8)) return product<float, int8_t, float>(pool, rounds, x, w, out);
  if (are(DataType::F32, DataType::BF16)) return product<float, bf16, float>(pool, rounds, x, w, out);
  if (are(DataType::F32, DataType::F32)) return product<float, float, float>(pool, rounds, x, w, out);
  if (are(DataType::BF16, DataType::S8)) return product<bf16, int8_t, float>(pool, rounds, x, w, out);
  if (are(DataType::BF16, DataType::BF16)) return product<bf16, bf16, float>(pool, rounds, x, w, out);
  return ffi::Error::InvalidArgument("jaxinfer_dot: there is no product of these types");
}

ffi::Error dot_int4(ffi::ThreadPool pool, bool rounds, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w,
                    ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> out) {
  const auto in = x.dimensions(), held = w.dimensions(), some = scales.dimensions();
  if (in.size() != 2 || held.size() != 2 || some.size() != 2 || in[1] != 2 * held[1] || some[0] != held[0] ||
      some[1] < 1 || in[1] % some[1] || in[1] / some[1] % 32)
    return ffi::Error::InvalidArgument("jaxinfer_dot_int4: x must be [T, K], w [N, K/2] and scales [N, K/(32 n)]");
  const Groups groups{scales.typed_data(), in[1] / some[1]};
  if (x.element_type() == ffi::DataType::F32) return product<float, nibbles, float>(pool, rounds, x, w, out, groups);
  if (x.element_type() == ffi::DataType::BF16) return product<bf16, nibbles, float>(pool, rounds, x, w, out, groups);
  return ffi::Error::InvalidArgument("jaxinfer_dot_int4: x must be float32 or bfloat16");
}

template <class T>
void attend(Threads& threads, const Attention& a, const void* keys, const void* values, int64_t rows) {
  threads.run(rows * a.kv_heads, [&](int64_t i) {
    const int64_t row = i / a.kv_heads;
    if (a.kv_len[row] <= 0) return;
    auto with = [&](auto call) { call(a, (const T*)keys, (const T*)values, row, i % a.kv_heads); };
#if defined(__x86_64__)
    if (level == 2) return with(avx512::attend<T>);
    if (level == 1) return with(avx2::attend<T>);
#endif
    with(portable::attend<T>);
  });
}

ffi::Error attention(ffi::ThreadPool pool, float scale, int64_t window, ffi::Buffer<ffi::F32> q,
                     ffi::Buffer<ffi::S32> pages, ffi::Buffer<ffi::S32> kv_len, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::RemainingArgs scales, ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = keys.dimensions(), queries = q.dimensions();
  if (shape.size() != 4 || queries.size() != 4 || shape[3] % 16 || queries[3] != shape[3] || queries[1] != shape[1] ||
      queries[2] > MOST_QUERIES)
    return ffi::Error::InvalidArgument("jaxinfer_attend: q must be [R, K, G, d], and pages [P, K, size, d]");
  Attention a{q.typed_data(),      out->typed_data(), nullptr,    nullptr,
              pages.typed_data(),  kv_len.typed_data(), shape[1], queries[2],
              shape[3],            shape[2],          pages.dimensions()[1], window,
              scale};
  if (scales.size() == 2) {
    a.k_scales = scales.get<ffi::Buffer<ffi::F32>>(0)->typed_data();
    a.v_scales = scales.get<ffi::Buffer<ffi::F32>>(1)->typed_data();
  }
  std::memset(a.out, 0, out->size_bytes());
  Threads threads(pool);
  auto with = [&](auto call) {
    call(threads, a, keys.untyped_data(), values.untyped_data(), queries[0]);
    return ffi::Error::Success();
  };
  if (keys.element_type() == ffi::DataType::F32) return with(attend<float>);
  if (keys.element_type() == ffi::DataType::BF16) return with(attend<bf16>);
  if (keys.element_type() == ffi::DataType::S8) return with(attend<int8_t>);
  return ffi::Error::InvalidArgument("jaxinfer_attend: there is none for keys of this type");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot, dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("rounds")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot_int4, dot_int4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("rounds")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attend, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// The instruction set that is used, 0 to 2; set to at most `wanted`.
extern "C" int jaxinfer_level(int wanted) { return level = std::min(wanted, level_of_machine()); }
