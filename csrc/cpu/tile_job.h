// What the tile kernels of all instruction sets share: their contract, in packed float32 arrays.
#pragma once

#include <cstdint>

namespace montessori {

enum class Step { kAdamW, kSgd };

// One weight tile of `rows` × columns (padded), constants of the step folded in by the packing:
// m = a1·exp_avg and v = s1·exp_avg_sq are [rows, columns], q is [sets, rows, columns]. Padding holds
// m = q = 0 and v = 1.
struct TileJob {
  const float* m;
  const float* v;
  const float* q;
  int64_t rows;
  int64_t sets;
  float a2, s2, eps;
};

// Adds Σ q·u of one example to scores [sets]. x is [T, columns]; register tile r of dy is [T, kernel rows]
// at r · dy_stride; starts[r] is null or a gradient [kernel rows, columns] that register tile r starts from.
using ScoreExample = void (*)(const TileJob& job, const float* x, const float* dy, int64_t dy_stride, int64_t tokens,
                              const float* const* starts, double* scores);

struct Kernel {
  int64_t rows;     // of a register tile
  int64_t columns;  // of a weight tile
  ScoreExample adamw;
  ScoreExample sgd;
};

const Kernel& kernel_avx512();
const Kernel& kernel_avx2();
const Kernel& kernel_baseline();

}  // namespace montessori
