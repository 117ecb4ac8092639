// One weight tile against one example after the other: the gradient tile lives in registers only.
//
//   g[o, i] = Σ_t dy[t, o] x[t, i]                                          (Eq. 5)
//   score  += Σ_{o, i} q[o, i] (m[o, i] + a2 g) / (sqrt(v[o, i] + s2 g²) + ε)   (Eq. 1, constants folded)
//
// Included once per instruction set, after its target pragma and with MONTESSORI_SIMD_BITS set; everything
// is in an anonymous namespace so that the copies stay apart. Dimensions: T tokens, MR rows and NR vectors of a
// register tile, K reference sets.
#pragma once

#include "tile_job.h"

namespace {

using montessori::Step;
using montessori::TileJob;

#if MONTESSORI_SIMD_BITS == 512
constexpr int kBytes = 64, kRows = 8, kVectors = 3;
#elif MONTESSORI_SIMD_BITS == 256
constexpr int kBytes = 32, kRows = 4, kVectors = 3;
#else
constexpr int kBytes = 16, kRows = 4, kVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kBytes), aligned(4)));
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kColumns = kLanes * kVectors;

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }

inline Vector root(Vector w) {
#if MONTESSORI_SIMD_BITS == 512
  return (Vector)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)w);
#elif MONTESSORI_SIMD_BITS == 256
  return (Vector)_mm256_sqrt_ps((__m256)w);
#else
  for (int lane = 0; lane < kLanes; ++lane) w[lane] = __builtin_sqrtf(w[lane]);
  return w;
#endif
}

// Lane sums in float64, in a fixed order: the result does not depend on threads or batch.
inline double lane_sum(Vector value) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(value[lane]);
  return sum;
}

template <Step step>
inline Vector update(Vector g, const float* m, const float* v, const TileJob& job) {
  if constexpr (step == Step::kSgd) return g;
  const Vector numerator = load(m) + job.a2 * g;
  const Vector second = load(v) + job.s2 * (g * g);
  return numerator / (root(second) + job.eps);
}

// Register tile `rows` (a multiple of kRows) of one example; x [T, kColumns] and dy [T, kRows] packed.
template <Step step>
void register_tile(const TileJob& job, const float* x, const float* dy, int64_t tokens, const float* start,
                   int64_t tile_row, double* scores) {
  Vector acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) acc[r][c] = start ? load(start + r * kColumns + c * kLanes) : Vector{};
  for (int64_t t = 0; t < tokens; ++t) {
    Vector columns[kVectors];
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) columns[c] = load(x + t * kColumns + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float row = dy[t * kRows + r];
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) acc[r][c] += row * columns[c];
    }
  }
  const int64_t base = tile_row * kColumns;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int c = 0; c < kVectors; ++c) {
      const int64_t at = base + r * kColumns + c * kLanes;
      acc[r][c] = update<step>(acc[r][c], job.m + at, job.v + at, job);
    }
  for (int64_t k = 0; k < job.sets; ++k) {
    const float* q = job.q + k * job.rows * kColumns + base;
    Vector sum{};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) sum += load(q + r * kColumns + c * kLanes) * acc[r][c];
    scores[k] += lane_sum(sum);
  }
}

template <Step step>
void score_example(const TileJob& job, const float* x, const float* dy, int64_t dy_stride, int64_t tokens,
                   const float* const* starts, double* scores) {
  for (int64_t tile = 0; tile < job.rows / kRows; ++tile)
    register_tile<step>(job, x, dy + tile * dy_stride, tokens, starts[tile], tile * kRows, scores);
}

constexpr montessori::Kernel kKernel{kRows, kColumns, score_example<Step::kAdamW>, score_example<Step::kSgd>};

}  // namespace
