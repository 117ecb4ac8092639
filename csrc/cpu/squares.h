// Squared norms of per-example gradients without the gradients.
#pragma once

#include "kernel.h"
#include "packing.h"

namespace montessori {

// ‖dY_bᵀ X_b‖² = Σ_st (x_s · x_t)(dy_s · dy_t) of every example, to squares [B]. x [T, I], dy [T, O], offsets [B+1] as
// in LinearProblem. The order of additions depends on the example and the kernel alone.
void example_squares(const Rows& x, int64_t in, const Rows& dy, int64_t out, const int64_t* offsets, int64_t examples,
                     const Kernel& kernel, Parallel parallel, double* squares);

}  // namespace montessori
