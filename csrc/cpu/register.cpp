// The operators of the CPU library, in torch's stable ABI: one binary for torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "tiles.h"

namespace {

using montessori::Array;
using montessori::Dtype;
using montessori::Selection;
using montessori::StepConstants;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Strata of a score over all tiles: work for this many threads, and sums of this many parts.
constexpr int64_t kParts = 256;

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

Array array_of(const MaybeTensor& tensor, const char* name) {
  return tensor.has_value() ? array_of(*tensor, name) : Array{};
}

const int64_t* indices_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long, name,
                  ": expected a contiguous int64 CPU tensor");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

void parallel(int64_t jobs, void (*run)(int64_t, int64_t, void*), void* context) {
  if (jobs == 0) return;
  torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
}

const montessori::Kernel& kernel() {
  const char* simd = std::getenv("MONTESSORI_SIMD");
  const montessori::Kernel* chosen = montessori::choose_kernel(simd ? simd : "");
  STD_TORCH_CHECK(chosen, "MONTESSORI_SIMD=", simd,
                  ": expected avx512bf16, avx512, avx2 or baseline, as this processor has them");
  return *chosen;
}

StepConstants constants_of(bool adamw, double a1, double a2, double s1, double s2, double eps, double decay,
                           double on_param, double on_exp_avg) {
  const auto step = adamw ? montessori::Step::kAdamW : montessori::Step::kSgd;
  const auto narrow = [](double value) { return static_cast<float>(value); };
  return {step,        narrow(a1),    narrow(a2),       narrow(s1),        narrow(s2),
          narrow(eps), narrow(decay), narrow(on_param), narrow(on_exp_avg)};
}

montessori::State state_of(const Tensor& q, const MaybeTensor& exp_avg, const MaybeTensor& exp_avg_sq,
                           const MaybeTensor& param) {
  return {array_of(q, "q"), array_of(exp_avg, "exp_avg"), array_of(exp_avg_sq, "exp_avg_sq"), array_of(param, "param"),
          q.size(0)};
}

// All tiles in order, in parts of nearly the same size.
struct AllTiles {
  std::vector<int64_t> tiles, bounds, population;

  explicit AllTiles(int64_t count) : tiles(count) {
    std::iota(tiles.begin(), tiles.end(), int64_t{0});
    const int64_t parts = std::min(count, kParts);
    for (int64_t part = 0; part <= parts; ++part) bounds.push_back(parts ? count * part / parts : 0);
    for (int64_t part = 0; part < parts; ++part) population.push_back(bounds[part + 1] - bounds[part]);
  }

  Selection selection() const {
    return {tiles.data(), bounds.data(), population.data(), static_cast<int64_t>(population.size()), false};
  }
};

std::tuple<Tensor, Tensor> linear_scores(const Tensor& x, const Tensor& dy, const Tensor& offsets,
                                         const MaybeTensor& positions, const Tensor& q, const MaybeTensor& exp_avg,
                                         const MaybeTensor& exp_avg_sq, const MaybeTensor& param,
                                         const MaybeTensor& row_ids, const MaybeTensor& row_grad,
                                         const MaybeTensor& row_offsets, const MaybeTensor& tiles,
                                         const MaybeTensor& bounds, const MaybeTensor& population, double a1, double a2,
                                         double s1, double s2, double eps, double decay, double on_param,
                                         double on_exp_avg, bool round_products) {
  montessori::LinearProblem p{};
  p.round_products = round_products;
  p.x = array_of(x, "x");
  p.dy = array_of(dy, "dy");
  p.offsets = indices_of(offsets, "offsets");
  if (positions.has_value()) p.positions = indices_of(*positions, "positions");
  p.state = state_of(q, exp_avg, exp_avg_sq, param);
  p.constants = constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg);
  if (row_ids.has_value() && row_grad.has_value() && row_offsets.has_value()) {
    p.row_ids = indices_of(*row_ids, "row_ids");
    p.row_grad = array_of(*row_grad, "row_grad");
    p.row_offsets = indices_of(*row_offsets, "row_offsets");
  }
  p.examples = offsets.numel() - 1;
  p.out = q.size(1);
  p.in = q.size(2);
  Tensor scores = torch::stable::new_zeros(q, {p.examples, p.state.sets}, ScalarType::Double);
  Tensor variance = torch::stable::new_zeros(q, {p.examples, p.state.sets}, ScalarType::Double);
  const AllTiles all(montessori::tiling_of(kernel(), p.out, p.in, p.state.sets).count());
  Selection selection = all.selection();
  if (tiles.has_value() && bounds.has_value() && population.has_value()) {
    selection = {indices_of(*tiles, "tiles"), indices_of(*bounds, "bounds"), indices_of(*population, "population"),
                 population->numel(), true};
    const int64_t count = static_cast<int64_t>(all.tiles.size());
    for (int64_t i = 0; i < tiles->numel(); ++i)
      STD_TORCH_CHECK(selection.tiles[i] >= 0 && selection.tiles[i] < count, "tiles: expected 0 to ", count - 1,
                      ", the tiles of this weight, got ", selection.tiles[i], "; draw them for this q");
  }
  montessori::score_linear(p, selection, kernel(), parallel, static_cast<double*>(scores.mutable_data_ptr()),
                           static_cast<double*>(variance.mutable_data_ptr()));
  return {scores, variance};
}

Tensor tile_norms(const Tensor& q) {
  const int64_t sets = q.size(0), out = q.size(1), in = q.size(2);
  const int64_t tiles = montessori::tiling_of(kernel(), out, in, sets).count();
  Tensor norms = torch::stable::new_zeros(q, {sets, tiles}, ScalarType::Double);
  montessori::tile_norms(array_of(q, "q"), sets, out, in, kernel(), parallel,
                         static_cast<double*>(norms.mutable_data_ptr()));
  return norms;
}

Tensor dense_scores(const MaybeTensor& grad, const Tensor& q, const MaybeTensor& exp_avg, const MaybeTensor& exp_avg_sq,
                    const MaybeTensor& param, double a1, double a2, double s1, double s2, double eps, double decay,
                    double on_param, double on_exp_avg) {
  const int64_t examples = grad.has_value() ? grad->size(0) : 1;
  Tensor scores = torch::stable::new_zeros(q, {examples, q.size(0)}, ScalarType::Double);
  montessori::score_dense(array_of(grad, "grad"), examples, q.size(1), state_of(q, exp_avg, exp_avg_sq, param),
                          constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg),
                          kernel(), parallel, static_cast<double*>(scores.mutable_data_ptr()));
  return scores;
}

void step_(Tensor param, const Tensor& source, const Tensor& grad, const MaybeTensor& exp_avg,
           const MaybeTensor& exp_avg_sq, double lr, double a1, double a2, double s1, double s2, double eps,
           double decay, double on_param, double on_exp_avg) {
  const Array from = array_of(source, "source");
  STD_TORCH_CHECK(array_of(param, "param").dtype == from.dtype, "param: expected the dtype of source");
  const montessori::State state{{}, array_of(exp_avg, "exp_avg"), array_of(exp_avg_sq, "exp_avg_sq"), from, 0};
  montessori::take_step(
      param.mutable_data_ptr(), from, array_of(grad, "grad"), state, param.numel(), static_cast<float>(lr),
      constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg), kernel(), parallel);
}

Tensor cross_entropy_(Tensor logits, const Tensor& targets, const Tensor& weights) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float,
                  "logits: expected a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(array_of(weights, "weights").dtype == Dtype::kFloat32, "weights: expected float32");
  const int64_t* target = indices_of(targets, "targets");
  const auto* weight = static_cast<const float*>(weights.const_data_ptr());
  Tensor losses = torch::stable::new_zeros(logits, {logits.size(0)}, ScalarType::Double);
  auto* loss = static_cast<double*>(losses.mutable_data_ptr());
  auto* values = static_cast<float*>(logits.mutable_data_ptr());
  const int64_t columns = logits.size(1);
  const auto row = kernel().cross_entropy;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loss[i] = row(values + i * columns, columns, target[i], weight[i]);
  };
  montessori::for_all(parallel, logits.size(0), run);
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY(montessori, library) {
  library.def(
      "linear_scores(Tensor x, Tensor dy, Tensor offsets, Tensor? positions, Tensor q, Tensor? exp_avg, Tensor? "
      "exp_avg_sq, "
      "Tensor? param, Tensor? row_ids, Tensor? row_grad, Tensor? row_offsets, Tensor? tiles, Tensor? bounds, "
      "Tensor? population, float a1, float a2, float s1, float s2, float eps, float decay, float on_param, float "
      "on_exp_avg, bool round_products) -> (Tensor, Tensor)");
  library.def("tile_norms(Tensor q) -> Tensor");
  library.def(
      "dense_scores(Tensor? grad, Tensor q, Tensor? exp_avg, Tensor? exp_avg_sq, Tensor? param, float a1, float a2, "
      "float s1, float s2, float eps, float decay, float on_param, float on_exp_avg) -> Tensor");
  library.def(
      "step_(Tensor(a!) param, Tensor source, Tensor grad, Tensor? exp_avg, Tensor? exp_avg_sq, float lr, float a1, "
      "float a2, float s1, float s2, float eps, float decay, float on_param, float on_exp_avg) -> ()");
  library.def("cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(montessori, CPU, library) {
  library.impl("linear_scores", TORCH_BOX(&linear_scores));
  library.impl("tile_norms", TORCH_BOX(&tile_norms));
  library.impl("dense_scores", TORCH_BOX(&dense_scores));
  library.impl("step_", TORCH_BOX(&step_));
  library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
