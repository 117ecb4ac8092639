#define MONTESSORI_SIMD_BITS 128
#include "rows_kernel.h"

namespace montessori {
const Kernel& kernel_baseline() { return kKernel; }
}  // namespace montessori
