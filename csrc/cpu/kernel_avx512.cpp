#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#define MONTESSORI_SIMD_BITS 512
#include "rows_kernel.h"

namespace montessori {
const Kernel& kernel_avx512() { return kKernel; }
}  // namespace montessori
#endif
