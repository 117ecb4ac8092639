// The operators of the CPU library, in torch's stable ABI: one binary for torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>

#include "tiles.h"

namespace {

using montessori::Array;
using montessori::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Array array_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, ": expected a contiguous CPU tensor");
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

const int64_t* indices_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long, name,
                  ": expected a contiguous int64 CPU tensor");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

void parallel(int64_t jobs, void (*run)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
}

Tensor linear_scores(const Tensor& x, const Tensor& dy, const Tensor& offsets, const Tensor& q,
                     const std::optional<Tensor>& exp_avg, const std::optional<Tensor>& exp_avg_sq,
                     const std::optional<Tensor>& row_ids, const std::optional<Tensor>& row_grad,
                     const std::optional<Tensor>& row_offsets, double a1, double a2, double s1, double s2, double eps) {
  montessori::LinearProblem p{};
  p.x = array_of(x, "x");
  p.dy = array_of(dy, "dy");
  p.q = array_of(q, "q");
  p.offsets = indices_of(offsets, "offsets");
  p.step = exp_avg.has_value() ? montessori::Step::kAdamW : montessori::Step::kSgd;
  if (exp_avg.has_value() && exp_avg_sq.has_value()) {
    p.exp_avg = array_of(*exp_avg, "exp_avg");
    p.exp_avg_sq = array_of(*exp_avg_sq, "exp_avg_sq");
  }
  if (row_ids.has_value() && row_grad.has_value() && row_offsets.has_value()) {
    p.row_ids = indices_of(*row_ids, "row_ids");
    p.row_grad = array_of(*row_grad, "row_grad");
    p.row_offsets = indices_of(*row_offsets, "row_offsets");
  }
  p.examples = offsets.numel() - 1;
  p.sets = q.size(0);
  p.out = q.size(1);
  p.in = q.size(2);
  p.a1 = static_cast<float>(a1);
  p.a2 = static_cast<float>(a2);
  p.s1 = static_cast<float>(s1);
  p.s2 = static_cast<float>(s2);
  p.eps = static_cast<float>(eps);
  Tensor scores = torch::stable::new_zeros(q, {p.examples, p.sets}, ScalarType::Double);
  const char* simd = std::getenv("MONTESSORI_SIMD");
  const montessori::Kernel* kernel = montessori::choose_kernel(simd ? simd : "");
  STD_TORCH_CHECK(kernel, "MONTESSORI_SIMD=", simd, ": expected avx512, avx2 or baseline, as this processor has them");
  montessori::score_linear(p, *kernel, parallel, static_cast<double*>(scores.mutable_data_ptr()));
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY(montessori, library) {
  library.def(
      "linear_scores(Tensor x, Tensor dy, Tensor offsets, Tensor q, Tensor? exp_avg, Tensor? exp_avg_sq, "
      "Tensor? row_ids, Tensor? row_grad, Tensor? row_offsets, float a1, float a2, float s1, float s2, float eps) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(montessori, CPU, library) { library.impl("linear_scores", TORCH_BOX(&linear_scores)); }
