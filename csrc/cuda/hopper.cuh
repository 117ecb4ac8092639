// The instructions of compute capability 9.0 that the kernel uses: barriers, bulk tensor copies, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace montessori::hopper {

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine; a block barrier must follow.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready%=;\n"
      "bra again%=;\n"
      "ready%=:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Barrier among `threads` threads of the block that name the same `id`.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same barrier for threads that do not wait there.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same barrier in block `rank` of the cluster.
__device__ inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// One box of a two-dimensional tensor to shared memory; counts its bytes, zeros included, on `barrier`.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same to the same place, and counted on the same barrier, in every block of the cluster that is in `blocks`.
__device__ inline void copy_box_to(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row,
                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// 16 bytes.
__device__ inline void store_zeros(uint32_t to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// Ordinary stores to shared memory become visible to the tensor cores.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across the asynchronous products.
template <int COUNT>
__device__ inline void hold_in_place(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// An operand stored token by token: boxes of 64 columns, each token one row of 128 bytes, permuted by the 128-byte
// swizzle. The long dimension is contiguous ("MN-major"): 8 tokens further is 1024 bytes, 64 columns further is `box`.
__device__ inline uint64_t operand_descriptor(uint32_t address, int box) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(address) | field(box) << 16 | field(1024) << 32 | kSwizzle128 << 62;
}

#define MONTESSORI_8(d, i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MONTESSORI_32(d, i) MONTESSORI_8(d, i), MONTESSORI_8(d, i + 8), MONTESSORI_8(d, i + 16), MONTESSORI_8(d, i + 24)

// d += A B for 16 tokens, 64 rows of A and 128 columns of B, both token by token (transposed flags 1, 1).
#define MONTESSORI_WGMMA(TYPES)                                                                                    \
  asm volatile(                                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES                                                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "     \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "  \
      "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, 1, 1, 1, 1, 1;"                                                                                   \
      : MONTESSORI_32(d, 0), MONTESSORI_32(d, 32)                                                                  \
      : "l"(a), "l"(b))

template <typename Operand>
struct Product;
template <>
struct Product<__nv_bfloat16> {
  __device__ static void add(float* d, uint64_t a, uint64_t b) { MONTESSORI_WGMMA("bf16.bf16"); }
};
template <>
struct Product<__half> {
  __device__ static void add(float* d, uint64_t a, uint64_t b) { MONTESSORI_WGMMA("f16.f16"); }
};

#undef MONTESSORI_8
#undef MONTESSORI_32
#undef MONTESSORI_WGMMA

}  // namespace montessori::hopper
