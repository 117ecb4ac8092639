// Entry point for ctypes, and the few driver and runtime functions that the launchers call.
#include <limits>
#include <string>

#include "hopper.cuh"
#include "linear.h"

namespace {

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* data, const cuuint64_t* sizes,
                const cuuint64_t*, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const EmulatedMap emulated{static_cast<const uint16_t*>(data), static_cast<int64_t>(sizes[0]),
                             static_cast<int64_t>(sizes[1]), static_cast<int>(box[0]), static_cast<int>(box[1])};
  std::memcpy(map, &emulated, sizeof emulated);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

extern "C" cudaError_t cudaSetDevice(int) { return cudaSuccess; }

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}

// scores [B, K] float64. dtypes of x and dy, q, exp_avg, exp_avg_sq, param as in `Dtype`; sizes T, B, K, O, I; `splits`
// 0 leaves the choice to the kernel.
extern "C" int emulate(const char* kernel, const void* const* arrays, const int* dtypes, const int64_t* spans,
                       const int* sizes, const float* constants, int splits, double scale, double* scores) {
  using namespace montessori;
  const auto array = [&](int i) { return Array{arrays[i], static_cast<Dtype>(dtypes[i])}; };
  LinearProblem p{};
  p.x = array(0), p.dy = array(1), p.q = array(2), p.exp_avg = array(3), p.exp_avg_sq = array(4), p.param = array(5);
  p.spans = spans;
  p.tokens = sizes[0], p.examples = sizes[1], p.sets = sizes[2], p.out = sizes[3], p.in = sizes[4];
  scale *= fold_constants(p, constants[0], constants[1], constants[2], constants[3], constants[4], constants[5]);
  const std::string name = kernel;
  const Cut cut = name == "mma" ? mma_cut(p) : name == "wgmma" ? wgmma_cut(p) : wgmma_cluster_cut(p);
  const auto launch = name == "mma"     ? launch_linear_mma
                      : name == "wgmma" ? launch_linear_wgmma
                                        : launch_linear_wgmma_cluster;
  const int64_t parts = num_tiles(p, cut) * cut.blocks * cut.parts_per_block;
  // A part that nobody writes shows as NaN.
  std::vector<float> partial(p.sets * (p.examples + 1) * parts, std::numeric_limits<float>::quiet_NaN());
  p.partial = partial.data();
  if (const cudaError_t error = launch(p, splits, nullptr)) return error;
  if (const cudaError_t error = launch_decay(p, parts, nullptr)) return error;
  return launch_sum_partials(p.partial, parts, p.examples, p.sets, scale, scores, nullptr);
}
