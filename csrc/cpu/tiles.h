// Cutting a weight into tiles, packing what a tile needs, and running all tiles on all threads.
#pragma once

#include <cstdint>
#include <string>

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

// "avx512", "avx2" or "baseline"; the widest that this processor runs when `name` is empty. Null when the
// processor cannot run the one named.
const Kernel* choose_kernel(const std::string& name);

// Calls run(begin, end, context) over [0, jobs) on the threads it likes.
using Parallel = void (*)(int64_t jobs, void (*run)(int64_t, int64_t, void*), void* context);

// Adds Σ q·u of every example to scores [B, K], in an order of additions that depends on the shape of the
// weight and the kernel alone.
void score_linear(const LinearProblem& problem, const Kernel& kernel, Parallel parallel, double* scores);

}  // namespace montessori
