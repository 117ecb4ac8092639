// Stands in for csrc/cuda/instructions.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.h"

namespace montessori {

inline float fast_sqrt(float value) { return std::sqrt(value); }
inline float fast_reciprocal(float value) { return 1.f / value; }
inline void compute_here(int&) {}
inline float2 widen_pair(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
inline unsigned char* dynamic_shared() { return emulated::block->base + 128; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::block->base);
}

inline void copy_async(uint32_t to, const void* from, bool given) {
  given ? std::memcpy(emulated::block->base + to, from, 16) : std::memset(emulated::block->base + to, 0, 16);
}

inline void commit_copies() {}
template <int PENDING>
void wait_for_copies() {}

template <typename Operand>
float widen(uint16_t bits);
template <>
inline float widen<__nv_bfloat16>(uint16_t bits) {
  return __bfloat162float(__ushort_as_bfloat16(bits));
}
template <>
inline float widen<__half>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

inline uint16_t shared_bits(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, emulated::block->base + address, 2);
  return bits;
}

// Matrix i has its rows at the addresses of lanes 8i..8i+7; transposed, a lane gets two neighbours of a column.
inline void load_transposed(uint32_t (&fragment)[4], uint32_t address) {
  emulated::exchange(&address, 1, [&](auto& all) {
    const int row = emulated::lane() % 4 * 2, column = emulated::lane() / 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = shared_bits(all[8 * i + row][0] + 2 * column);
      fragment[i] = low | static_cast<uint32_t>(shared_bits(all[8 * i + row + 1][0] + 2 * column)) << 16;
    }
  });
}

// Fragments of m16n8k16 as the manual of the instruction set has them.
template <typename Operand>
void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t given[] = {a[0], a[1], a[2], a[3], b0, b1};
  emulated::exchange(given, 6, [&](auto& all) {
    const auto half = [](uint32_t word, int k) { return widen<Operand>(static_cast<uint16_t>(word >> (k % 2 * 16))); };
    for (int j = 0; j < 4; ++j) {
      const int m = emulated::lane() / 4 + j / 2 * 8, n = emulated::lane() % 4 * 2 + j % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t from_a = all[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
        d[j] += half(from_a, k) * half(all[n * 4 + k % 8 / 2][4 + k / 8], k);
      }
    }
  });
}

}  // namespace montessori
