// Cutting a weight into tiles, packing what a tile needs, and running all tiles on all threads.
#pragma once

#include <cstdint>

#include "tile_job.h"

namespace montessori {

// Element type of an array in memory; packing widens it to float32.
enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Array {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// A linear layer's packed batch and its optimizer state, all contiguous. x [T, I], dy [T, O], offsets
// [B+1], q [K, O, I], exp_avg and exp_avg_sq [O, I] (absent for SGD). Sparse rows that are added to the
// gradient: per example sorted row_ids [R] with row_grad [R, I] and row_offsets [B+1], or null.
struct LinearProblem {
  Array x, dy, q, exp_avg, exp_avg_sq, row_grad;
  const int64_t* offsets;
  const int64_t* row_ids = nullptr;
  const int64_t* row_offsets = nullptr;
  int64_t examples, out, in, sets;
  float a1, a2, s1, s2, eps;
  Step step;
};

// The widest kernel that this processor runs.
const Kernel& choose_kernel();

// scores [B, K] = Σ q·u of every example, in an order of additions that depends on the shape alone.
// `parallel(jobs, run)` calls run(begin, end) over [0, jobs) on the threads it likes.
void score_linear(const LinearProblem& problem, void (*parallel)(int64_t, void (*)(int64_t, int64_t, void*), void*),
                  double* scores);

}  // namespace montessori
