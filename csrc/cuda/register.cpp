// The operators of the CUDA library, in torch's stable ABI: one binary for torch 2.11 and later.
//
// The stream comes from Python, which knows torch's current one; this library needs nothing of torch's CUDA parts and
// loads where there is no driver.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <string>

#include "../checks.h"
#include "linear.h"

namespace {

using montessori::Array;
using montessori::check_shape;
using montessori::Cut;
using montessori::Dtype;
using montessori::kAny;
using montessori::LinearProblem;
using montessori::ScalarType;
using montessori::Tensor;
using torch::stable::accelerator::DeviceIndex;

// What kernels hold in int: numbers of tokens and examples, and up to a tile beyond; elements in up to 31 rows of x and
// dy.
constexpr int64_t kMostCount = int64_t{1} << 30, kMostWidth = int64_t{1} << 26;
constexpr int64_t kMostSets = 65535;  // gridDim.y

void check_place(const Tensor& tensor, const char* name, DeviceIndex device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, ": expected a contiguous CUDA tensor");
  STD_TORCH_CHECK(tensor.get_device_index() == device, name, ": expected cuda:", device,
                  ", as x, got cuda:", tensor.get_device_index());
}

Array array_of(const Tensor& tensor, const char* name, DeviceIndex device) {
  check_place(tensor, name, device);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name, ": expected 16-byte alignment");
  return {tensor.const_data_ptr(), montessori::dtype_of<Dtype>(tensor, name)};
}

int count_of(int64_t number, int64_t most, const char* counted) {
  STD_TORCH_CHECK(number <= most, counted, ": expected at most ", most, ", got ", number);
  return static_cast<int>(number);
}

void check_launch(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

#define MONTESSORI_TEXT(...) #__VA_ARGS__
#define MONTESSORI_TEXT_OF(...) MONTESSORI_TEXT(__VA_ARGS__)

struct Kernel {
  Cut (*cut)(const LinearProblem&);
  cudaError_t (*launch)(const LinearProblem&, int, cudaStream_t);
};

Kernel kernel_named(const std::string& name) {
  if (name == "mma") return {montessori::mma_cut, montessori::launch_linear_mma};
#ifndef MONTESSORI_WITHOUT_WGMMA
  if (name == "wgmma") return {montessori::wgmma_cut, montessori::launch_linear_wgmma};
  if (name == "wgmma_cluster") return {montessori::wgmma_cluster_cut, montessori::launch_linear_wgmma_cluster};
#endif
  STD_TORCH_CHECK(false, "kernel '", name,
                  "' is not in this build: expected mma, or wgmma or wgmma_cluster where 90a was built");
}

// The rows that `spans` name are trusted to be among those of x: reading them here would wait for the device.
LinearProblem problem_of(const Tensor& x, const Tensor& dy, const Tensor& spans, const Tensor& q, const Tensor& exp_avg,
                         const Tensor& exp_avg_sq, const Tensor& param) {
  check_shape(q, "q", "[K, O, I]", {kAny, kAny, kAny});
  const int64_t out = q.size(1), in = q.size(2);
  check_shape(x, "x", "[T, I]", {kAny, in});
  check_shape(dy, "dy", "[T, O]", {x.size(0), out});
  check_shape(spans, "spans", "[B, 2]", {kAny, 2});
  check_shape(exp_avg, "exp_avg", "[O, I]", {out, in});
  check_shape(exp_avg_sq, "exp_avg_sq", "[O, I]", {out, in});
  check_shape(param, "param", "[O, I]", {out, in});
  STD_TORCH_CHECK(out % 8 == 0 && in % 8 == 0, "param: expected sizes divisible by 8, got [", out, ", ", in, "]");
  STD_TORCH_CHECK(x.size(0) > 0 && out > 0 && in > 0, "x and param: expected a token and an element at least, got x [",
                  x.size(0), ", ", in, "] and param [", out, ", ", in, "]");

  const DeviceIndex device = x.get_device_index();
  LinearProblem p{};
  p.x = array_of(x, "x", device);
  p.dy = array_of(dy, "dy", device);
  p.q = array_of(q, "q", device);
  p.exp_avg = array_of(exp_avg, "exp_avg", device);
  p.exp_avg_sq = array_of(exp_avg_sq, "exp_avg_sq", device);
  p.param = array_of(param, "param", device);
  STD_TORCH_CHECK(p.x.dtype == p.dy.dtype && p.x.dtype != Dtype::kFloat32,
                  "x and dy: expected the same dtype, bfloat16 or float16, got ", x.scalar_type(), " and ",
                  dy.scalar_type());
  check_place(spans, "spans", device);
  STD_TORCH_CHECK(spans.scalar_type() == ScalarType::Long, "spans: expected int64, got ", spans.scalar_type());
  p.spans = static_cast<const int64_t*>(spans.const_data_ptr());
  p.tokens = count_of(x.size(0), kMostCount, "tokens");
  p.examples = count_of(spans.size(0), kMostCount, "examples");
  p.sets = count_of(q.size(0), kMostSets, "sets");
  p.out = count_of(out, kMostWidth, "out");
  p.in = count_of(in, kMostWidth, "in");
  return p;
}

Tensor linear_scores(const Tensor& x, const Tensor& dy, const Tensor& spans, const Tensor& q, const Tensor& exp_avg,
                     const Tensor& exp_avg_sq, const Tensor& param, double a1, double a2, double s1, double s2,
                     double eps, double decay, double lr, std::string kernel, int64_t stream_address) {
  LinearProblem p = problem_of(x, dy, spans, q, exp_avg, exp_avg_sq, param);
  STD_TORCH_CHECK(a1 > 0 && s1 > 0, "expected beta1 > 0 and beta2 > 0, got moments times ", a1, " and ", s1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const double constant = montessori::fold_constants(p, a1, a2, s1, s2, eps, decay);
  const Kernel chosen = kernel_named(kernel);
  const Cut cut = chosen.cut(p);
  const int64_t tiles = montessori::num_tiles(p, cut), parts = tiles * cut.blocks * cut.parts_per_block;
  count_of(tiles * montessori::kMostSplits, std::numeric_limits<int>::max(), "tiles × splits");
  const Tensor scores = torch::stable::new_empty(q, {p.examples, p.sets}, ScalarType::Double);
  if (scores.numel() == 0) return scores;
  const Tensor partial = torch::stable::new_empty(q, {p.sets, p.examples + 1, parts}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  const std::string what = "linear_scores, kernel " + kernel + ", " + std::to_string(p.tokens) + " tokens, param [" +
                           std::to_string(p.out) + ", " + std::to_string(p.in) + "]";
  check_launch(chosen.launch(p, montessori::kChooseSplits, stream), what.c_str());
  check_launch(montessori::launch_decay(p, parts, stream), "decay");
  check_launch(montessori::launch_sum_partials(p.partial, parts, p.examples, p.sets, -lr * constant,
                                               static_cast<double*>(scores.mutable_data_ptr()), stream),
               "sum_partials");
  return scores;
}

}  // namespace

// Capabilities that this library has machine code for, such as "80,90a".
extern "C" __attribute__((visibility("default"))) const char* montessori_cuda_archs() {
  return MONTESSORI_TEXT_OF(MONTESSORI_ARCHS);
}

// Why the driver will not run this library, which brings its own CUDA runtime; null where it will.
extern "C" __attribute__((visibility("default"))) const char* montessori_cuda_refusal() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY(montessori_cuda, library) {
  library.def(
      "linear_scores(Tensor x, Tensor dy, Tensor spans, Tensor q, Tensor exp_avg, Tensor exp_avg_sq, Tensor param, "
      "float a1, float a2, float s1, float s2, float eps, float decay, float lr, str kernel, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(montessori_cuda, CUDA, library) { library.impl("linear_scores", TORCH_BOX(&linear_scores)); }
