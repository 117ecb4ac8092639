// Vectors of float32 for one instruction set. Included once per instruction set, after its target pragma
// and with MONTESSORI_SIMD_BITS set; everything is in an anonymous namespace so that the copies stay apart.
#pragma once

#include <cstdint>

namespace {

#if MONTESSORI_SIMD_BITS == 512
constexpr int kBytes = 64, kRows = 8, kVectors = 3;
#elif MONTESSORI_SIMD_BITS == 256
constexpr int kBytes = 32, kRows = 4, kVectors = 3;
#else
constexpr int kBytes = 16, kRows = 4, kVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(kBytes), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kBytes), aligned(4)));
typedef float Half __attribute__((vector_size(kBytes / 2)));
typedef double Doubles __attribute__((vector_size(kBytes), aligned(8)));
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kColumns = kLanes * kVectors;

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector value) { *reinterpret_cast<Vector*>(p) = value; }
inline Vector splat(float value) { return Vector{} + value; }

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

// numerator / (2 sqrt(w) + eps). Where the processor has 14-bit seeds, one Newton step each takes the place of
// the square root and of the division, within 2.5 units in the last place: the divider needs 16 cycles a vector on
// Intel's processors. kFast is for w among the normal numbers (TileJob).
template <bool kFast>
inline Vector quotient(Vector numerator, Vector w, float eps) {
#if MONTESSORI_SIMD_BITS == 512
  if constexpr (kFast) {
    const Vector seed = (Vector)_mm512_rsqrt14_ps((__m512)w);
    const Vector near = w * seed;
    const Vector below = near * (3.f - near * seed) + eps;
    const Vector inverse = (Vector)_mm512_rcp14_ps((__m512)below);
    return numerator * inverse * (2.f - below * inverse);
  }
#endif
  return numerator / (2.f * root(w) + eps);
}

// Sum of all lanes in float64, in a fixed order.
struct WideSum {
  Doubles low{}, high{};

  void add(Vector value) {
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    low += __builtin_convertvector(halves[0], Doubles);
    high += __builtin_convertvector(halves[1], Doubles);
  }

  double total() const {
    const Doubles both = low + high;
    double sum = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) sum += both[lane];
    return sum;
  }
};

}  // namespace
