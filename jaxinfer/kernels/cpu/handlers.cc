// XLA FFI handlers of the CPU kernels. What they compute is said in __init__.py; how, in micro.h.

#include <algorithm>
#include <array>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
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
#define APART __attribute__((noinline))

namespace {
#include "types.h"

#include "threads.h"

namespace portable {
#define LEVEL 0
#define LANES 4
#include "micro.h"
#include "attention.h"
#include "low_rank.h"
#include "recurrence.h"
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
#include "low_rank.h"
#include "recurrence.h"
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
#include "low_rank.h"
#include "recurrence.h"
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

// Calls `call` of the best level: avx512::name, avx2::name or portable::name.
#if defined(__x86_64__)
#define AT_LEVEL(...) (level == 2 ? avx512::__VA_ARGS__ : level == 1 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define AT_LEVEL(...) portable::__VA_ARGS__
#endif

using Floats = ffi::Buffer<ffi::F32>;

#include "product_calls.h"

#include "adapter_calls.h"
#include "attention_calls.h"
#include "recurrence_calls.h"
#include "row_calls.h"

auto binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("rounds"); }
auto int4_binding() { return binding().Attr<Table>("table"); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot, dot, binding().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_dot_int4, dot_int4,
                              int4_binding().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_grouped_dot, grouped,
                              binding().Arg<ffi::AnyBuffer>().Arg<Sizes>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_grouped_dot_int4, grouped_int4,
                              int4_binding().Arg<ffi::AnyBuffer>().Arg<Sizes>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_take, take,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_argmax, argmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_low_rank, low_rank,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("share")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_adapted_dot, adapted_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("rounds")
                                  .Attr<bool>("scaled")
                                  .Attr<float>("share")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

// Of states, rows and `more` arrays.
template <int MORE>
auto recurrence_binding() {
  if constexpr (MORE == 0)
    return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Ints>().Arg<Ints>().Arg<Ints>();
  else
    return recurrence_binding<MORE - 1>().template Arg<Floats>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_linear_attention, linear_attention,
                              recurrence_binding<4>().RemainingArgs().Ret<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_selective_scan, selective_scan,
                              recurrence_binding<5>().Ret<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_convolution, convolution,
                              recurrence_binding<3>().Ret<Floats>().Ret<Floats>());

auto attention_binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("scale").Attr<float>("soft_cap").Attr<int64_t>("window");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention, attention,
                              attention_binding()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxinfer_attention_rows, attention_rows,
                              attention_binding()
                                  .Attr<bool>("causal")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// The instruction set that is used, 0 to 2; set to at most `wanted`.
extern "C" int jaxinfer_level(int wanted) { return level = std::min(wanted, level_of_machine()); }

// Bytes of experts' weights that grouped products have read, and of no other expert's: a count for tests.
extern "C" int64_t jaxinfer_experts_read() { return experts_read; }
