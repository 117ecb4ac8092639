#include "linear.h"

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

}  // namespace

cudaError_t launch_sum_partials(const float* partial, int64_t parts, int examples, int sets, double scale,
                                double* scores, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(examples, sets);
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sum_partials_kernel, partial, parts, examples, sets, scale, scores);
}

}  // namespace montessori
