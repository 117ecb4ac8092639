// The optimizer's map on the accumulators of one thread, and the state it keeps in shared memory.
//
// Both kernels leave their accumulators in the fragment of the m16n8 family: a thread has pairs of neighbours in a
// row. Each thread keeps exp_avg, exp_avg_sq and q of its own pairs in slots of its own, so no access conflicts and
// none needs a barrier but the one after loading.
#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "linear.h"

namespace montessori {

// Calls `use` with the pairs of `array` and what widens one to float32: decided once, so that no branch stands between
// loads and many are on their way at a time. Rows have an even length, so a pair never spans two.
template <typename Use>
__device__ inline void with_pairs(const Array& array, Use use) {
  switch (array.dtype) {
    case Dtype::kBFloat16:
      use(static_cast<const __nv_bfloat162*>(array.data), [](__nv_bfloat162 pair) { return __bfloat1622float2(pair); });
      break;
    case Dtype::kFloat16:
      use(static_cast<const __half2*>(array.data), [](__half2 pair) { return __half22float2(pair); });
      break;
    default:
      use(static_cast<const float2*>(array.data), [](float2 pair) { return pair; });
  }
}

template <typename State>
struct Pair;
template <>
struct Pair<float> {
  using type = float2;
  __device__ static type pack(float2 value) { return value; }
  __device__ static float2 unpack(type value) { return value; }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  __device__ static type pack(float2 value) { return __float22bfloat162_rn(value); }
  __device__ static float2 unpack(type value) { return widen_pair(value); }
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ inline bool is_inside(const LinearProblem& p, int2 at) { return at.x < p.out && at.y < p.in; }

__device__ inline float adam_update(const LinearProblem& p, float grad, float exp_avg, float exp_avg_sq) {
  const float momentum = fmaf(p.a, grad, exp_avg);
  const float second = fmaf(p.s * grad, grad, exp_avg_sq);
  return momentum * fast_reciprocal(fast_sqrt(second) + p.eps);
}

// State of one tile: PAIRS pairs in each of THREADS threads. `Position` maps a pair of this thread to (row, column).
template <typename State, int PAIRS, int THREADS>
struct TileState {
  using Slot = typename Pair<State>::type;
  static constexpr int kBytes = 3 * PAIRS * THREADS * static_cast<int>(sizeof(Slot));

  Slot* slots;
  int thread;

  __device__ Slot& slot(int array, int pair) const { return slots[(array * PAIRS + pair) * THREADS + thread]; }

  // COUNT pairs from `first` on, from global memory. Outside the parameter v = 1, so that 0 / 0 does not arise with
  // ε = 0.
  template <int COUNT, typename Position>
  __device__ void load(const LinearProblem& p, Position position, int first) const {
    fill<COUNT>(p, 0, p.exp_avg, 0.f, position, first);
    fill<COUNT>(p, 1, p.exp_avg_sq, 1.f, position, first);
    fill<COUNT>(p, 2, p.q, 0.f, position, first);
  }

  template <int COUNT, typename Position>
  __device__ void fill(const LinearProblem& p, int array, const Array& source, float outside, Position position,
                       int first) const {
    const auto take = [&](const auto* pairs, auto widen) {
      fill_from<COUNT>(p, array, pairs, widen, outside, position, first);
    };
    if constexpr (std::is_same_v<State, __nv_bfloat16>) {
      take(static_cast<const __nv_bfloat162*>(source.data), widen_pair);
    } else {
      with_pairs(source, take);
    }
  }

  template <int COUNT, typename Given, typename Widen, typename Position>
  __device__ void fill_from(const LinearProblem& p, int array, const Given* pairs, Widen widen, float outside,
                            Position position, int first) const {
    constexpr int kBatch = COUNT < 16 ? COUNT : 16;
    static_assert(COUNT % kBatch == 0);
#pragma unroll 1
    for (int base = first; base < first + COUNT; base += kBatch) {
      // From the first pair of the batch on, so that what follows is known to the compiler.
      const int2 from = position(base);
      const Position here{from.x, from.y};
      Given given[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int2 at = here(i);
        given[i] = pairs[is_inside(p, at) ? static_cast<int64_t>(at.x) * (p.in / 2) + at.y / 2 : 0];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool inside = is_inside(p, here(i));
        slot(array, base + i) = Pair<State>::pack(inside ? widen(given[i]) : make_float2(outside, outside));
      }
    }
  }

  // Gradients become updates in place; returns this thread's Σ q · update for the first set.
  __device__ float apply(const LinearProblem& p, float (&grad)[2 * PAIRS]) const {
    float sum = 0.f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      const float2 m = Pair<State>::unpack(slot(0, pair)), v = Pair<State>::unpack(slot(1, pair));
      const float2 q = Pair<State>::unpack(slot(2, pair));
      grad[2 * pair] = adam_update(p, grad[2 * pair], m.x, v.x);
      grad[2 * pair + 1] = adam_update(p, grad[2 * pair + 1], m.y, v.y);
      sum = fmaf(q.x, grad[2 * pair], sum);
      sum = fmaf(q.y, grad[2 * pair + 1], sum);
    }
    return sum;
  }

  // Σ q_k · update of a further set, whose q comes from global memory.
  template <typename Position>
  __device__ float further_set(const LinearProblem& p, Position position, int k,
                               const float (&update)[2 * PAIRS]) const {
    if constexpr (std::is_same_v<State, __nv_bfloat16>) {
      const auto* pairs = static_cast<const __nv_bfloat162*>(p.q.data);
      return set_sum(p, pairs, [](__nv_bfloat162 pair) { return __bfloat1622float2(pair); }, position, k, update);
    } else {
      float sum = 0.f;
      with_pairs(p.q, [&](const auto* pairs, auto widen) { sum = set_sum(p, pairs, widen, position, k, update); });
      return sum;
    }
  }

  // Outside the parameter updates are 0, so any q will do there.
  template <typename Given, typename Widen, typename Position>
  __device__ static float set_sum(const LinearProblem& p, const Given* pairs, Widen widen, Position position, int k,
                                  const float (&update)[2 * PAIRS]) {
    pairs += static_cast<int64_t>(k) * p.out * p.in / 2;
    constexpr int kBatch = 8;
    float sum = 0.f;
#pragma unroll
    for (int base = 0; base < PAIRS; base += kBatch) {
      compute_here(position.row);
      compute_here(position.column);
      Given given[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int2 at = position(base + i);
        given[i] = pairs[static_cast<int64_t>(min(at.x, p.out - 1)) * (p.in >> 1) + (min(at.y, p.in - 2) >> 1)];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float2 q = widen(given[i]);
        sum = fmaf(q.x, update[2 * (base + i)], fmaf(q.y, update[2 * (base + i) + 1], sum));
      }
    }
    return sum;
  }
};

// Score of one warp's part of a tile, into partial[k, row, part].
__device__ inline void store_partial(const LinearProblem& p, int64_t parts, int k, int row, int64_t part, float sum) {
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) p.partial[(static_cast<int64_t>(k) * (p.examples + 1) + row) * parts + part] = sum;
}

// Tiles in an order in which those that run at one time form a near-square patch and share operands in the L2 cache.
struct TilePosition {
  int first_o, first_i;
};

template <int BLOCK_O, int BLOCK_I>
__device__ inline TilePosition tile_position(const LinearProblem& p, int tile) {
  constexpr int kGroup = 8;
  const int tiles_o = (p.out + BLOCK_O - 1) / BLOCK_O, tiles_i = (p.in + BLOCK_I - 1) / BLOCK_I;
  const int in_group = kGroup * tiles_i, group_o = tile / in_group * kGroup;
  const int height = min(tiles_o - group_o, kGroup), rest = tile % in_group;
  return {(group_o + rest % height) * BLOCK_O, rest / height * BLOCK_I};
}

// Examples first..last-1 of one of `splits` shares.
struct Share {
  int first, last;
};

__device__ inline Share share_of(int examples, int splits, int split) {
  const int64_t all = examples;
  return {static_cast<int>(all * split / splits), static_cast<int>(all * (split + 1) / splits)};
}

}  // namespace montessori
