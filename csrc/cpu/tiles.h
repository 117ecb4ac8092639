// Cutting a weight into tiles and running them on all threads.
#pragma once

#include <cstdint>
#include <string>

#include "kernel.h"
#include "packing.h"

namespace montessori {

// Eq. 1 with its constants folded: the update is (m exp_avg + a g) / (2 sqrt(v exp_avg_sq + s g²) + eps), or a·g of
// SGD; `decay` is λ where weight decay is part of the gradient (Adam with L2). Every example's score has Σ q·(on_param
// θ + on_exp_avg exp_avg) beside the kernel's sum.
struct StepConstants {
  Step step;
  float m, v, a, s, eps, decay, on_param, on_exp_avg;
};

// A parameter's optimizer state: q [K, n], exp_avg, exp_avg_sq and param [n], contiguous; SGD has no
// exp_avg_sq, and exp_avg only with momentum.
struct State {
  Array q, exp_avg, exp_avg_sq, param;
  int64_t sets;
};

// A linear layer's batch, all contiguous: x [T, I], dy [T, O], offsets [B+1], state of [O, I]; with positions [T], x
// and dy have more rows, of which these are the batch. Sparse rows that are added to the gradient: per example sorted
// row_ids [R] with row_grad [R, I] and row_offsets [B+1], or null. `round_products`: float32 x and dy may be rounded to
// bfloat16 where the processor multiplies that faster.
struct LinearProblem {
  Array x, dy, row_grad;
  State state;
  StepConstants constants;
  const int64_t* offsets;
  const int64_t* positions = nullptr;
  const int64_t* row_ids = nullptr;
  const int64_t* row_offsets = nullptr;
  int64_t examples, out, in;
  bool round_products = false;
};

// Tiles to score: stratum h has tiles[bounds[h]..bounds[h+1]-1], drawn from population[h] of them. Where
// `from_zero`, a tile counts by what it adds to its score at gradient 0.
struct Selection {
  const int64_t* tiles;
  const int64_t* bounds;
  const int64_t* population;
  int64_t strata;
  bool from_zero;
};

// Rows and columns of the tiles that a weight [O, I] is cut into, numbered along the columns first.
struct Tiling {
  int64_t rows, columns, row_tiles, column_tiles;
  int64_t count() const { return row_tiles * column_tiles; }
};

// "amx", "avx512bf16", "avx512", "avx2" or "baseline"; the widest that this processor runs when `name` is empty. Null
// when the processor cannot run the one named.
const Kernel* choose_kernel(const std::string& name);

Tiling tiling_of(const Kernel& kernel, int64_t out, int64_t in, int64_t sets);

// Root of the sum of squares of q [sets, out, in] over each tile, to norms [sets, tiles].
void tile_norms(const Array& q, int64_t sets, int64_t out, int64_t in, const Kernel& kernel, Parallel parallel,
                double* norms);

// Adds Σ q·u of every example, as estimated from the selection, to scores [B, K], and the variance of the
// estimate to variance [B, K]. The order of additions depends on the shape of the weight, the kernel and the
// selection alone.
void score_linear(const LinearProblem& problem, const Selection& selection, const Kernel& kernel, Parallel parallel,
                  double* scores, double* variance);

// Adds Σ q·u of ready gradients grad [B, n] to scores [B, K]; without data in grad, of one gradient 0.
void score_dense(const Array& grad, int64_t examples, int64_t elements, const State& state,
                 const StepConstants& constants, const Kernel& kernel, Parallel parallel, double* scores);

// param = source + the step on grad, all [n]; param may be source. `state` has exp_avg and exp_avg_sq.
void take_step(void* param, const Array& source, const Array& grad, const State& state, int64_t elements, float lr,
               const StepConstants& constants, const Kernel& kernel, Parallel parallel);

}  // namespace montessori
