// Plain vector code that every x86-64 and arm64 processor runs.
#define MONTESSORI_SIMD_BITS 128
#include "tile_kernel.h"

namespace montessori {
const Kernel& kernel_baseline() { return kKernel; }
}  // namespace montessori
