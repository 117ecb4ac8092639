// What the tiles of a parameter share, and the sums over them.
#include "epilogue.cuh"

namespace montessori {
namespace {

constexpr int kThreads = 256;

// The order of the sum depends on `parts` alone: strided per thread, then a tree over the block.
__device__ double block_sum(const float* row, int64_t parts) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t part = threadIdx.x; part < parts; part += kThreads) sum += row[part];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  sum = sums[0];
  __syncthreads();
  return sum;
}

__global__ void sum_partials_kernel(const float* partial, int64_t parts, int examples, int sets, double scale,
                                    double* scores) {
  const int b = blockIdx.x, k = blockIdx.y;
  const float* rows = partial + static_cast<int64_t>(k) * (examples + 1) * parts;
  const double own = block_sum(rows + b * parts, parts), shared = block_sum(rows + examples * parts, parts);
  if (threadIdx.x == 0) scores[static_cast<int64_t>(b) * sets + k] = scale * (own + shared);
}

// decay · Σ q_k · θ, the part of the step that no example changes: a warp for each of `parts` equal stretches.
__global__ void decay_kernel(const __grid_constant__ LinearProblem p, int64_t parts) {
  const int64_t part = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (part >= parts) return;
  const int64_t pairs = static_cast<int64_t>(p.out) * p.in / 2, share = (pairs + parts - 1) / parts;
  const int64_t first = part * share, last = min(first + share, pairs), set = blockIdx.y * pairs;
  float sum = 0.f;
  if (p.decay != 0.f) {
    with_pairs(p.q, [&](const auto* q, auto widen_q) {
      with_pairs(p.param, [&](const auto* param, auto widen_param) {
#pragma unroll 8
        for (int64_t pair = first + threadIdx.x % 32; pair < last; pair += 32) {
          const float2 a = widen_q(q[set + pair]), b = widen_param(param[pair]);
          sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
        }
      });
    });
  }
  store_partial(p, parts, blockIdx.y, p.examples, part, p.decay * sum);
}

}  // namespace

cudaError_t launch_decay(const LinearProblem& p, int64_t parts, cudaStream_t stream) {
  constexpr int kWarps = kThreads / 32;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((parts + kWarps - 1) / kWarps), p.sets);
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, decay_kernel, p, parts);
}

cudaError_t launch_sum_partials(const float* partial, int64_t parts, int examples, int sets, double scale,
                                double* scores, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(examples, sets);
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sum_partials_kernel, partial, parts, examples, sets, scale, scores);
}

}  // namespace montessori
