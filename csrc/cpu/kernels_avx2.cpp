// The kernels for AVX2 with FMA and F16C. Everything from other headers is included before the
// target changes: only what has internal linkage may be compiled for it.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "plan.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define LOWCONTEXT_ISA_AVX2 1
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace lowcontext {

const KernelTable* kernels_avx2() {
  __builtin_cpu_init();
  const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
  return supported ? &kTable : nullptr;
}

}  // namespace lowcontext
#else
namespace lowcontext {

const KernelTable* kernels_avx2() { return nullptr; }

}  // namespace lowcontext
#endif
