#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#pragma GCC target("avx2,fma")
#define MONTESSORI_SIMD_BITS 256
#include "rows_kernel.h"

namespace montessori {
const Kernel& kernel_avx2() { return kKernel; }
}  // namespace montessori
#endif
