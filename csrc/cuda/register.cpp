// The operators of the CUDA library, in torch's stable ABI: one binary for torch 2.11 and later.
//
// The stream comes from Python, which knows torch's current one; this library needs nothing of torch's CUDA parts and
// loads where there is no driver.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "linear.h"

namespace {

using montessori::Array;
using montessori::Cut;
using montessori::Dtype;
using montessori::LinearProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Array array_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, ": expected a contiguous CUDA tensor");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name, ": expected 16-byte alignment");
  Dtype dtype = Dtype::kFloat32;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::BFloat16:
      dtype = Dtype::kBFloat16;
      break;
    case ScalarType::Half:
      dtype = Dtype::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
  return {tensor.const_data_ptr(), dtype};
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

Tensor linear_scores(const Tensor& x, const Tensor& dy, const Tensor& spans, const Tensor& q, const Tensor& exp_avg,
                     const Tensor& exp_avg_sq, const Tensor& param, double a1, double a2, double s1, double s2,
                     double eps, double decay, double lr, std::string kernel, int64_t stream_address) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  STD_TORCH_CHECK(spans.is_cuda() && spans.is_contiguous() && spans.scalar_type() == ScalarType::Long,
                  "spans: expected a contiguous int64 CUDA tensor [B, 2]");
  LinearProblem p{};
  p.x = array_of(x, "x");
  p.dy = array_of(dy, "dy");
  p.q = array_of(q, "q");
  p.exp_avg = array_of(exp_avg, "exp_avg");
  p.exp_avg_sq = array_of(exp_avg_sq, "exp_avg_sq");
  p.param = array_of(param, "param");
  STD_TORCH_CHECK(p.x.dtype == p.dy.dtype && p.x.dtype != Dtype::kFloat32, "x, dy: expected bfloat16 or float16, both");
  p.spans = static_cast<const int64_t*>(spans.const_data_ptr());
  p.tokens = x.size(0);
  p.examples = static_cast<int>(spans.size(0));
  p.sets = static_cast<int>(q.size(0));
  p.out = static_cast<int>(q.size(1));
  p.in = static_cast<int>(q.size(2));
  STD_TORCH_CHECK(p.out % 8 == 0 && p.in % 8 == 0, "param: expected sizes divisible by 8");
  STD_TORCH_CHECK(a1 > 0 && s1 > 0, "expected moments with weights above 0");
  const double constant = montessori::fold_constants(p, a1, a2, s1, s2, eps, decay);
  const Kernel chosen = kernel_named(kernel);
  const Cut cut = chosen.cut(p);
  const int64_t tiles = montessori::num_tiles(p, cut), parts = tiles * cut.blocks * cut.parts_per_block;
  const Tensor partial = torch::stable::new_empty(q, {p.sets, p.examples + 1, parts}, ScalarType::Float);
  const Tensor scores = torch::stable::new_empty(q, {p.examples, p.sets}, ScalarType::Double);
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
