#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma")
#define MONTESSORI_SIMD_BITS 512
#define MONTESSORI_SIMD_BF16
#include "rows_kernel.h"

namespace montessori {
const Kernel& kernel_avx512bf16() { return kKernel; }
}  // namespace montessori
#endif
