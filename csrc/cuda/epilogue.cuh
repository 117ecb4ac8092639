// The optimizer's map on the accumulators of one thread, and the state it keeps in shared memory.
//
// Both kernels leave their accumulators in the fragment of the m16n8 family: a thread has pairs of neighbours in a
// row. Each thread keeps exp_avg, exp_avg_sq and q of its own pairs in slots of its own, so no access conflicts and
// none needs a barrier but the one after loading.
#pragma once

#include "instructions.cuh"
#include "linear.h"

namespace montessori {

// Rows have an even length and pairs start at an even column, so one access takes both.
__device__ inline float2 read_pair(const Array& array, int64_t at) {
  switch (array.dtype) {
    case Dtype::kBFloat16:
      return __bfloat1622float2(
          *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(array.data) + at));
    case Dtype::kFloat16:
      return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(array.data) + at));
    default:
      return *reinterpret_cast<const float2*>(static_cast<const float*>(array.data) + at);
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
  __device__ static float2 unpack(type value) { return __bfloat1622float2(value); }
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ inline float adam_update(const LinearProblem& p, float grad, float exp_avg, float exp_avg_sq) {
  const float momentum = fmaf(p.a2, grad, p.a1 * exp_avg);
  const float second = fmaf(p.s2 * grad, grad, p.s1 * exp_avg_sq);
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

  // Pairs first..last-1 from global memory. Outside the parameter v = 1, so that 0 / 0 does not arise with ε = 0.
  template <typename Position>
  __device__ void load(const LinearProblem& p, Position position, int first, int last) const {
#pragma unroll 4
    for (int pair = first; pair < last; ++pair) {
      const int2 at = position(pair);
      const bool inside = at.x < p.out && at.y < p.in;
      const int64_t element = static_cast<int64_t>(at.x) * p.in + at.y;
      const float2 zero = make_float2(0.f, 0.f);
      slot(0, pair) = Pair<State>::pack(inside ? read_pair(p.exp_avg, element) : zero);
      slot(1, pair) = Pair<State>::pack(inside ? read_pair(p.exp_avg_sq, element) : make_float2(1.f, 1.f));
      slot(2, pair) = Pair<State>::pack(inside ? read_pair(p.q, element) : zero);
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
    const int64_t set = static_cast<int64_t>(k) * p.out * p.in;
    float sum = 0.f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
      const int2 at = position(pair);
      if (at.x < p.out && at.y < p.in) {
        const float2 q = read_pair(p.q, set + static_cast<int64_t>(at.x) * p.in + at.y);
        sum = fmaf(q.x, update[2 * pair], fmaf(q.y, update[2 * pair + 1], sum));
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

// decay · Σ q · θ over this thread's pairs, for every set, into the row that all examples share.
template <int PAIRS, typename Position>
__device__ void store_decay(const LinearProblem& p, Position position, int64_t parts, int64_t part) {
  for (int k = 0; k < p.sets; ++k) {
    const int64_t set = static_cast<int64_t>(k) * p.out * p.in;
    float sum = 0.f;
    if (p.decay != 0.f) {
      for (int pair = 0; pair < PAIRS; ++pair) {
        const int2 at = position(pair);
        if (at.x < p.out && at.y < p.in) {
          const int64_t element = static_cast<int64_t>(at.x) * p.in + at.y;
          const float2 q = read_pair(p.q, set + element), theta = read_pair(p.param, element);
          sum = fmaf(q.x, theta.x, fmaf(q.y, theta.y, sum));
        }
      }
    }
    store_partial(p, parts, k, p.examples, part, p.decay * sum);
  }
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
  const int size = (examples + splits - 1) / splits;
  return {min(split * size, examples), min((split + 1) * size, examples)};
}

}  // namespace montessori
