// Stands in for csrc/cuda/hopper.cuh.
#pragma once

#include <cuda.h>

#include "instructions.cuh"

// What the emulated driver writes into a CUtensorMap.
struct EmulatedMap {
  const uint16_t* data;
  int64_t columns, rows;
  int box_columns, box_rows;
};

namespace montessori::hopper {

using emulated::block;

inline void barrier_init(uint32_t barrier, int arrivals) { block->phase(barrier).init(arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint32_t barrier) { block->phase(barrier).arrive(1, 0); }
inline void barrier_expect(uint32_t barrier, int bytes) { block->phase(barrier).arrive(1, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { block->phase(barrier).wait(parity); }
inline void named_barrier(int id, int threads) { block->named[id].arrive(threads, true); }
inline void named_barrier_arrive(int id, int threads) { block->named[id].arrive(threads, false); }
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  emulated::cluster->blocks[rank]->phase(barrier).arrive(1, 0);
}
inline uint32_t cluster_rank() { return emulated::rank; }
inline void cluster_sync() {
  const size_t threads = emulated::cluster->blocks.size() * block->threads;
  emulated::cluster->barrier.arrive(static_cast<int>(threads), true);
}

// The 128-byte swizzle: bits 7 to 9 of an address onto bits 4 to 6.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box_to(uint32_t to, const CUtensorMap* encoded, uint32_t barrier, int column, int row,
                        uint16_t blocks) {
  EmulatedMap map;
  std::memcpy(&map, encoded, sizeof map);
  for (size_t rank = 0; rank < emulated::cluster->blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    emulated::Block& target = *emulated::cluster->blocks[rank];
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_columns; ++c) {
        const bool inside = row + r < map.rows && column + c < map.columns;
        const uint16_t value = inside ? map.data[(row + r) * map.columns + column + c] : 0;
        std::memcpy(target.base + swizzled(to + (r * map.box_columns + c) * 2), &value, 2);
      }
    }
    target.phase(barrier).arrive(0, -2 * map.box_rows * map.box_columns);
  }
}

inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  copy_box_to(to, map, barrier, column, row, static_cast<uint16_t>(1 << emulated::rank));
}

inline void store_zeros(uint32_t to) { std::memset(block->base + to, 0, 16); }
inline void fence_async_proxy() {}
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
// Products are done at once; but no lane of a warp goes on before the others are.
template <int PENDING>
void wgmma_wait() {
  emulated::warp().barrier.arrive(32, true);
}
template <int COUNT>
void hold_in_place(float (&)[COUNT]) {}

inline uint64_t operand_descriptor(uint32_t address, int box) { return address | static_cast<uint64_t>(box) << 32; }

// Element (long, token) of an operand stored token by token: 64 columns of 128 bytes per token, boxes one after
// another.
inline uint16_t operand_bits(uint64_t descriptor, int column, int token) {
  const uint32_t address = static_cast<uint32_t>(descriptor), box = static_cast<uint32_t>(descriptor >> 32);
  return shared_bits(swizzled(address + column / 64 * box + token / 8 * 1024 + token % 8 * 128 + column % 64 * 2));
}

template <typename Operand>
struct Product {
  static void add(float* d, uint64_t a, uint64_t b) {
    const int warp = threadIdx.x % 128 / 32, lane = emulated::lane();
    for (int i = 0; i < 64; ++i) {
      const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int token = 0; token < 16; ++token) {
        d[i] += widen<Operand>(operand_bits(a, row, token)) * widen<Operand>(operand_bits(b, column, token));
      }
    }
  }
};

}  // namespace montessori::hopper
