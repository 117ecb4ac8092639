// Kernels over contiguous rows: ready gradients, and the cross-entropy of logits. Included as simd.h is.
#pragma once

#include "dots_kernel.h"
#include "kernel.h"
#include "simd.h"
#include "tile_kernel.h"

namespace {

template <Step step, bool kFast>
void score_row(const TileJob& job, const float* grad, int64_t columns, double* scores) {
  Sums sums(job.sets);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Vector g = grad ? load(grad + i) : Vector{};
    const Vector u = update<step, kFast>(g, job.m + i, job.v + i, job);
    for (int64_t k = 0; k < job.sets; ++k) sums[k].add(load(job.q + k * columns + i) * u);
  }
  sums.add_to(scores);
}

template <Step step>
void score_dense(const TileJob& job, const float* grad, int64_t columns, double* scores) {
  (job.eps >= kSmallestFastEps ? score_row<step, true> : score_row<step, false>)(job, grad, columns, scores);
}

template <Step step, bool kFast>
void step_row(const TileJob& job, const float* grad, const float* base, float lr, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; i += kLanes)
    store(out + i, load(base + i) - lr * update<step, kFast>(load(grad + i), job.m + i, job.v + i, job));
}

template <Step step>
void take_step(const TileJob& job, const float* grad, const float* base, float lr, int64_t columns, float* out) {
  (job.eps >= kSmallestFastEps ? step_row<step, true> : step_row<step, false>)(job, grad, base, lr, columns, out);
}

void widen(const void* from, bool narrow, int64_t count, float factor, float* to) {
  if (narrow) {
    const auto* bits = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      float value;
      __builtin_memcpy(&value, &wide, sizeof(value));
      to[i] = value * factor;
    }
  } else {
    const auto* values = static_cast<const float*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = values[i] * factor;
  }
}

// exp(x) for x <= 0 to about 1 unit in the last place; below -87 it stays at exp(-87), NaN stays NaN.
inline Vector exp_nonpositive(Vector x) {
  constexpr float kShift = 12582912.f;  // 1.5 · 2^23: adding it rounds to an integer
  x = x < -87.f ? splat(-87.f) : x;
  const Vector shifted = x * 1.44269504f + kShift;
  const Vector n = shifted - kShift;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const Integers exponent = ((Integers)shifted) << 23;
  // A NaN of any bits: the exponent would take some of them in.
  return x != x ? x : (Vector)((Integers)p + exponent);
}

inline float largest(const float* logits, int64_t columns) {
  Vector best = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Vector value = load(logits + i);
    best = value > best ? value : best;
  }
  float most = best[0];
  for (int lane = 1; lane < kLanes; ++lane) most = best[lane] > most ? best[lane] : most;
  for (; i < columns; ++i) most = logits[i] > most ? logits[i] : most;
  return most;
}

double cross_entropy(float* logits, int64_t columns, int64_t target, float weight) {
  const float most = largest(logits, columns);
  const float of_target = logits[target];
  WideSum sum;
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vector e = exp_nonpositive(load(logits + i) - most);
    store(logits + i, e);
    sum.add(e);
  }
  Vector rest{};
  for (int64_t i = whole; i < columns; ++i) rest[i - whole] = logits[i] - most;
  rest = exp_nonpositive(rest);
  double total = sum.total();
  for (int64_t i = whole; i < columns; ++i) total += logits[i] = rest[i - whole];
  const float factor = static_cast<float>(weight / total);
  int64_t i = 0;
  for (; i < whole; i += kLanes) store(logits + i, load(logits + i) * factor);
  for (; i < columns; ++i) logits[i] *= factor;
  logits[target] -= weight;
  return __builtin_log(total) + static_cast<double>(most) - static_cast<double>(of_target);
}

constexpr montessori::Format kFloats{kRows,
                                     1,
                                     score_example<Step::kAdamW, Floats>,
                                     score_example<Step::kSgd, Floats>,
                                     add_dots<FloatDots>,
                                     nullptr,
                                     nullptr,
                                     nullptr};
#ifdef MONTESSORI_SIMD_BF16
constexpr montessori::Format kPairs{
    kRows,   1,      score_example<Step::kAdamW, Pairs>, score_example<Step::kSgd, Pairs>, add_dots<PairDots>, nullptr,
    nullptr, nullptr};
#else
constexpr montessori::Format kPairs{kRows, 1, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
#endif

constexpr montessori::Kernel kKernel{kColumns,
                                     kLanes,
                                     kFloats,
                                     kPairs,
                                     score_dense<Step::kAdamW>,
                                     score_dense<Step::kSgd>,
                                     take_step<Step::kAdamW>,
                                     take_step<Step::kSgd>,
                                     widen,
                                     cross_entropy};

}  // namespace
