// Runs the CUDA kernels on the CPU: a thread of the machine per thread of a block, and barriers that really wait.
//
// For tests. It checks what a kernel computes and how its threads wait for each other, not the order in which real
// hardware makes memory visible, and not time. Included before everything else.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ static
#define __CUDA_ARCH_FEAT_SM90_ALL

using std::max;
using std::min;

namespace emulated {

// Named barrier: `count` arrivals, whether they wait or not.
class Barrier {
 public:
  void arrive(int count, bool wait) {
    std::unique_lock lock(mutex_);
    const uint64_t generation = generation_;
    if (++arrived_ == count) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    } else if (wait) {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  uint64_t generation_ = 0;
};

// Barrier in shared memory that also counts bytes; only the parity of its phase can be asked for.
class PhaseBarrier {
 public:
  void init(int arrivals) { arrivals_ = pending_ = arrivals; }
  void arrive(int arrivals, int64_t bytes) {
    std::lock_guard lock(mutex_);
    pending_ -= arrivals;
    bytes_ += bytes;
    if (pending_ == 0 && bytes_ == 0) {
      pending_ = arrivals_;
      ++phase_;
      changed_.notify_all();
    }
  }
  void wait(uint32_t parity) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return (phase_ & 1) != parity; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrivals_ = 0, pending_ = 0;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t values[32][8];
};

struct Block {
  Block(size_t bytes, int threads) : shared(bytes + 4096), warps((threads + 31) / 32), threads(threads) {
    // Addresses count from a multiple of 1024, and dynamic memory starts 128 bytes after one, as it may.
    base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 1023) / 1024 * 1024);
    std::memset(shared.data(), 0xff, shared.size());
  }
  std::vector<unsigned char> shared;
  unsigned char* base;
  std::vector<Warp> warps;
  int threads;
  Barrier named[16];
  std::mutex mutex;
  std::map<uint32_t, PhaseBarrier> phases;
  PhaseBarrier& phase(uint32_t address) {
    std::lock_guard lock(mutex);
    return phases[address];
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

inline thread_local Cluster* cluster;
inline thread_local Block* block;
inline thread_local uint32_t rank;

}  // namespace emulated

inline thread_local uint3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;

inline void __syncthreads() { emulated::block->named[0].arrive(emulated::block->threads, true); }

namespace emulated {

inline int lane() { return static_cast<int>(threadIdx.x % 32); }
inline Warp& warp() { return block->warps[threadIdx.x / 32]; }

// Every lane gives some words, then all lanes see all of them until the next exchange.
template <typename Use>
void exchange(const uint32_t* given, int words, Use use) {
  std::copy(given, given + words, warp().values[lane()]);
  warp().barrier.arrive(32, true);
  use(warp().values);
  warp().barrier.arrive(32, true);
}

}  // namespace emulated

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  emulated::exchange(&word, 1, [&](auto& all) { std::memcpy(&value, all[emulated::lane() ^ distance], 4); });
  return value;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}

// Clusters one after the other; all threads of a cluster at one time.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned side = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned first = 0; first < gridDim.x; first += side) {
      emulated::Cluster cluster;
      std::vector<std::thread> threads;
      for (unsigned rank = 0; rank < side; ++rank) {
        cluster.blocks.push_back(std::make_unique<emulated::Block>(config->dynamicSmemBytes, blockDim.x));
      }
      for (unsigned rank = 0; rank < side; ++rank) {
        for (unsigned thread = 0; thread < blockDim.x; ++thread) {
          threads.emplace_back([&, rank, thread] {
            emulated::cluster = &cluster;
            emulated::block = cluster.blocks[rank].get();
            emulated::rank = rank;
            threadIdx = {thread, 0, 0};
            blockIdx = {first + rank, y, 0};
            kernel(arguments...);
          });
        }
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
  return cudaSuccess;
}
