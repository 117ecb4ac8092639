// The CUDA runtime and driver as far as the launchers of csrc/cuda call them: a launch is handed to `on_launch`.
//
// Linked with what nvcc makes of the sources, so that grids, shared memory, clusters and tensor maps are the real ones.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "linear.h"

namespace {

using OnLaunch = int (*)(const char* kernel, const unsigned* sizes, void** parameters);

OnLaunch on_launch;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
std::map<const void*, int> shared_allowed;
constexpr int kSharedByDefault = 48 * 1024, kSharedMost = 227 * 1024, kProcessors = 2;

// What tests/ptx_machine reads of a CUtensorMap.
struct TensorMap {
  int64_t data, width, rows, box_rows;
};

// As the driver, refuses what the hardware does not take.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const bool taken = (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
                     rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] == 2 * sizes[0] &&
                     strides[0] % 16 == 0 && sizes[0] > 0 && sizes[1] > 0 && sizes[0] < uint64_t{1} << 32 &&
                     sizes[1] < uint64_t{1} << 32 && box[0] == 64 && box[1] > 0 && box[1] <= 256 && steps[0] == 1 &&
                     steps[1] == 1 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                     reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!taken) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap written{reinterpret_cast<int64_t>(data), static_cast<int64_t>(sizes[0]),
                          static_cast<int64_t>(sizes[1]), static_cast<int64_t>(box[1])};
  std::memcpy(map, &written, sizeof written);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = kProcessors, cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kSharedMost) return cudaErrorInvalidValue;
  shared_allowed[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  return *clusters = kProcessors, cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** parameters) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  }
  const int allowed = shared_allowed.count(kernel) ? shared_allowed[kernel] : kSharedByDefault;
  if (config->dynamicSmemBytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
  if (config->gridDim.x == 0 || config->gridDim.x % cluster != 0 || cluster > 8) return cudaErrorInvalidValue;
  const unsigned sizes[] = {config->gridDim.x, config->gridDim.y, config->blockDim.x, cluster,
                            static_cast<unsigned>(config->dynamicSmemBytes)};
  return static_cast<cudaError_t>(on_launch(names().at(kernel).c_str(), sizes, parameters));
}

// `arrays`: x, dy, q, exp_avg, exp_avg_sq, param with their `dtypes`; `sizes` T, B, K, O, I.
static montessori::LinearProblem problem_of(const void* const* arrays, const int* dtypes, const int64_t* spans,
                                            const int* sizes) {
  using namespace montessori;
  const auto array = [&](int i) { return Array{arrays[i], static_cast<Dtype>(dtypes[i])}; };
  LinearProblem p{};
  p.x = array(0), p.dy = array(1), p.q = array(2), p.exp_avg = array(3), p.exp_avg_sq = array(4), p.param = array(5);
  p.spans = spans;
  p.tokens = sizes[0], p.examples = sizes[1], p.sets = sizes[2], p.out = sizes[3], p.in = sizes[4];
  return p;
}

static montessori::Cut cut_of(const std::string& kernel, const montessori::LinearProblem& p) {
  using namespace montessori;
  if (kernel == "wgmma") return wgmma_cut(p);
  if (kernel == "wgmma_cluster") return wgmma_cluster_cut(p);
  return mma_cut(p);
}

int64_t count_parts(const char* kernel, const void* const* arrays, const int* dtypes, const int* sizes) {
  const montessori::LinearProblem p = problem_of(arrays, dtypes, nullptr, sizes);
  const montessori::Cut cut = cut_of(kernel, p);
  return montessori::num_tiles(p, cut) * cut.blocks * cut.parts_per_block;
}

// Scores as the operator of register.cpp computes them. `partial` [K, B + 1, parts] with the `parts` of `count_parts`;
// `splits` 0 leaves the choice to the kernel.
int run_linear(OnLaunch launched, const char* kernel, const void* const* arrays, const int* dtypes,
               const int64_t* spans, const int* sizes, const float* constants, int splits, double scale, float* partial,
               int64_t parts, double* scores) {
  using namespace montessori;
  on_launch = launched;
  LinearProblem p = problem_of(arrays, dtypes, spans, sizes);
  scale *= fold_constants(p, constants[0], constants[1], constants[2], constants[3], constants[4], constants[5]);
  p.partial = partial;
  auto launch = launch_linear_mma;
  if (std::string(kernel) == "wgmma") launch = launch_linear_wgmma;
  if (std::string(kernel) == "wgmma_cluster") launch = launch_linear_wgmma_cluster;
  if (const cudaError_t error = launch(p, splits, nullptr)) return error;
  if (const cudaError_t error = launch_decay(p, parts, nullptr)) return error;
  return launch_sum_partials(partial, parts, p.examples, p.sets, scale, scores, nullptr);
}
}
