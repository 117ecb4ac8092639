// Products of rows with rows, which lie in memory as the products run: nothing is packed.
//
//   dots[i, j] += Σ_f a_i[f] b_j[f]
//
// Included as simd.h is. A tile of products is a vector of partial sums for each pair, added up over lanes at its end.
#pragma once

#include "kernel.h"
#include "simd.h"

namespace {

using montessori::RowPairs;

#if MONTESSORI_SIMD_BITS == 512
constexpr int kDotRows = 4, kDotColumns = 6;
#elif MONTESSORI_SIMD_BITS == 256
constexpr int kDotRows = 3, kDotColumns = 4;
#else
constexpr int kDotRows = 2, kDotColumns = 4;
#endif

inline float lane_sum(Vector value) {
#if MONTESSORI_SIMD_BITS == 512
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
#endif
}

// How kBytes of two rows enter a product.
struct FloatDots {
  static Vector multiply_add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};

#ifdef MONTESSORI_SIMD_BF16
struct PairDots {
  static Vector multiply_add(Vector sum, Vector a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// As a row of bfloat16 may begin: on two bytes.
typedef float Loose __attribute__((vector_size(kBytes), aligned(2), may_alias));

inline Vector load_bytes(const char* from) { return *reinterpret_cast<const Loose*>(from); }

inline Vector load_rest(const char* from, int64_t bytes) {
  Vector value{};
  __builtin_memcpy(&value, from, bytes);
  return value;
}

template <typename Cell>
void dot_tile(const char* const* a, const char* const* b, int64_t bytes, Vector (&acc)[kDotRows][kDotColumns]) {
  const int64_t whole = bytes / kBytes * kBytes, rest = bytes - whole;
#pragma GCC unroll 8
  for (int i = 0; i < kDotRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kDotColumns; ++j) acc[i][j] = Vector{};
  const auto step = [&](const auto& read) {
    Vector left[kDotRows];
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) left[i] = read(a[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kDotColumns; ++j) {
      const Vector right = read(b[j]);
#pragma GCC unroll 8
      for (int i = 0; i < kDotRows; ++i) acc[i][j] = Cell::multiply_add(acc[i][j], left[i], right);
    }
  };
  for (int64_t at = 0; at < whole; at += kBytes) step([at](const char* row) { return load_bytes(row + at); });
  if (rest) step([=](const char* row) { return load_rest(row + whole, rest); });
}

// Pairs beyond the diagonal are left as they are, or not: nobody reads them.
template <typename Cell>
void add_dots(const RowPairs& pairs, int64_t bytes, float* dots) {
  for (int64_t i = 0; i < pairs.rows; i += kDotRows) {
    const char* a[kDotRows];
    const int64_t rows = pairs.rows - i < kDotRows ? pairs.rows - i : kDotRows;
    for (int64_t r = 0; r < kDotRows; ++r) a[r] = pairs.a[i + (r < rows ? r : 0)];
    const int64_t end = pairs.before + i + rows;
    for (int64_t j = 0; j < end; j += kDotColumns) {
      const char* b[kDotColumns];
      const int64_t columns = end - j < kDotColumns ? end - j : kDotColumns;
      for (int64_t c = 0; c < kDotColumns; ++c) b[c] = pairs.b[j + (c < columns ? c : 0)];
      Vector acc[kDotRows][kDotColumns];
      dot_tile<Cell>(a, b, bytes, acc);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) dots[(i + r) * pairs.stride + j + c] += lane_sum(acc[r][c]);
    }
  }
}

}  // namespace
