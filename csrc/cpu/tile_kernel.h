// One weight tile against one example: the gradient tile lives in registers only.
//
//   g[o, i] = Σ_t dy[t, o] x[t, i]                                          (Eq. 5)
//   score  += Σ_{o, i} q[o, i] (m[o, i] + a g) / (2 sqrt(v[o, i] + s g²) + ε)   (Eq. 1, constants folded)
//
// Included as simd.h is. Dimensions: T tokens, MR rows and NR vectors of a register tile, K reference sets.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace {

using montessori::kSmallestFastEps;
using montessori::Step;
using montessori::TileJob;

// One wide sum per reference set, on the stack for the usual few.
class Sums {
 public:
  explicit Sums(int64_t sets) : sets_(sets), sums_(sets <= kFew ? few_ : new WideSum[sets]) {}
  Sums(const Sums&) = delete;
  ~Sums() {
    if (sums_ != few_) delete[] sums_;
  }

  WideSum& operator[](int64_t k) { return sums_[k]; }
  void add_to(double* scores) const {
    for (int64_t k = 0; k < sets_; ++k) scores[k] += sums_[k].total();
  }

 private:
  static constexpr int64_t kFew = 4;
  WideSum few_[kFew];
  int64_t sets_;
  WideSum* sums_;
};

// The update of one vector of gradients; the step changes the weight by -lr times it.
template <Step step, bool kFast>
inline Vector update(Vector g, const float* m, const float* v, const TileJob& job) {
  if constexpr (step == Step::kSgd) return job.a * g;
  return quotient<kFast>(load(m) + job.a * g, load(v) + (job.s * g) * g, job.eps);
}

// How a cell of x and of dy enter a product.
struct Floats {
  static Vector multiply_add(Vector sum, const void* dy, const void* x) {
    return sum + *static_cast<const float*>(dy) * load(static_cast<const float*>(x));
  }
};

#ifdef MONTESSORI_SIMD_BF16
struct Pairs {
  static Vector multiply_add(Vector sum, const void* dy, const void* x) {
    const __m512i row = _mm512_set1_epi32(*static_cast<const int32_t*>(dy));
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)row);
  }
};
#endif

// The update of the gradient of some rows, whose elements begin at `base`, in its place, and Σ q·u into sums.
template <Step step, bool kFast, int rows>
inline void add_scores(const TileJob& job, Vector (&acc)[rows][kVectors], int64_t base, Sums& sums) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = base + r * kColumns + c * kLanes;
      acc[r][c] = update<step, kFast>(acc[r][c], job.m + at, job.v + at, job);
    }
  for (int64_t k = 0; k < job.sets; ++k) {
    const float* q = job.q + k * job.rows * kColumns + base;
    Vector sum{};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) sum += load(q + r * kColumns + c * kLanes) * acc[r][c];
    sums[k].add(sum);
  }
}

// The gradient of register tile `tile`, its update, and Σ q·u into sums.
template <Step step, bool kFast, typename Cell>
void register_tile(const TileJob& job, const char* x, const char* dy, int64_t steps, const float* start, int64_t tile,
                   Sums& sums) {
  Vector acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) acc[r][c] = start ? load(start + r * kColumns + c * kLanes) : Vector{};
  for (int64_t t = 0; t < steps; ++t, x += kColumns * 4, dy += kRows * 4) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) acc[r][c] = Cell::multiply_add(acc[r][c], dy + r * 4, x + c * kBytes);
  }
  add_scores<step, kFast>(job, acc, tile * kRows * kColumns, sums);
}

template <Step step, bool kFast, typename Cell>
void score_tiles(const TileJob& job, const void* x, const void* dy, int64_t dy_stride, int64_t steps,
                 const float* const* starts, double* scores) {
  Sums sums(job.sets);
  for (int64_t tile = 0; tile < job.rows / kRows; ++tile)
    register_tile<step, kFast, Cell>(job, static_cast<const char*>(x),
                                     static_cast<const char*>(dy) + tile * dy_stride * 4, steps, starts[tile], tile,
                                     sums);
  sums.add_to(scores);
}

template <Step step, typename Cell>
void score_example(const TileJob& job, const void* x, const void* dy, int64_t dy_stride, int64_t steps,
                   const float* const* starts, double* scores) {
  const bool fast = job.eps >= kSmallestFastEps;
  (fast ? score_tiles<step, true, Cell> : score_tiles<step, false, Cell>)(job, x, dy, dy_stride, steps, starts, scores);
}

}  // namespace
