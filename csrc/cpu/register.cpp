// The operators of the CPU library, in torch's stable ABI: one binary for torch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "squares.h"
#include "tiles.h"

namespace {

using montessori::Array;
using montessori::check_bounds;
using montessori::check_shape;
using montessori::check_within;
using montessori::Dtype;
using montessori::Indices;
using montessori::kAny;
using montessori::MaybeTensor;
using montessori::ScalarType;
using montessori::Selection;
using montessori::Sizes;
using montessori::StepConstants;
using montessori::Tensor;

// Strata of a score over all tiles: work for this many threads, and sums of this many parts.
constexpr int64_t kParts = 256;

Array array_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, ": expected a contiguous CPU tensor");
  return {tensor.const_data_ptr(), montessori::dtype_of<Dtype>(tensor, name)};
}

Array array_of(const MaybeTensor& tensor, const char* name) {
  return tensor.has_value() ? array_of(*tensor, name) : Array{};
}

Indices indices_of(const Tensor& tensor, const char* name, const char* legend, int64_t size = kAny) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long, name,
                  ": expected a contiguous int64 CPU tensor");
  check_shape(tensor, name, legend, {size});
  return {static_cast<const int64_t*>(tensor.const_data_ptr()), tensor.numel()};
}

// Whether all of them are given; some alone are refused.
bool are_given(const char* names, const MaybeTensor& a, const MaybeTensor& b, const MaybeTensor& c) {
  const int given = a.has_value() + b.has_value() + c.has_value();
  STD_TORCH_CHECK(given == 0 || given == 3, names, ": expected all three or none, got ", given, " of them");
  return given == 3;
}

void parallel(int64_t jobs, void (*run)(int64_t, int64_t, void*), void* context) {
  if (jobs == 0) return;
  torch::stable::parallel_for(0, jobs, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
}

const montessori::Kernel& kernel() {
  const char* simd = std::getenv("MONTESSORI_SIMD");
  const montessori::Kernel* chosen = montessori::choose_kernel(simd ? simd : "");
  STD_TORCH_CHECK(chosen, "MONTESSORI_SIMD=", simd,
                  ": this processor, or its system, does not run that one of amx, avx512bf16, avx512, avx2, baseline; "
                  "unset it, and the best that runs is taken");
  return *chosen;
}

StepConstants constants_of(bool adamw, double a1, double a2, double s1, double s2, double eps, double decay,
                           double on_param, double on_exp_avg) {
  const auto narrow = [](double value) { return static_cast<float>(value); };
  // Of AdamW both sides of the fraction twice, which spares the kernels a product.
  const double by = adamw ? 2 : 1;
  return {adamw ? montessori::Step::kAdamW : montessori::Step::kSgd,
          narrow(by * a1),
          narrow(s1),
          narrow(by * a2),
          narrow(s2),
          narrow(by * eps),
          narrow(decay),
          narrow(on_param),
          narrow(on_exp_avg)};
}

// What the step reads is there: kernels do not ask again.
void check_given(const StepConstants& c, bool exp_avg, bool param) {
  STD_TORCH_CHECK(exp_avg || (c.step == montessori::Step::kSgd && c.on_exp_avg == 0.f),
                  "exp_avg: expected a tensor, as exp_avg_sq is given or on_exp_avg is not 0, got None");
  STD_TORCH_CHECK(param || (c.decay == 0.f && c.on_param == 0.f),
                  "param: expected a tensor, as decay or on_param is not 0, got None");
}

montessori::State state_of(const Tensor& q, const MaybeTensor& exp_avg, const MaybeTensor& exp_avg_sq,
                           const MaybeTensor& param, const StepConstants& constants) {
  check_given(constants, exp_avg.has_value(), param.has_value());
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

// The tiles drawn of a weight that is cut into `count`.
Selection selection_of(const Tensor& tiles, const Tensor& bounds, const Tensor& population, int64_t count) {
  const Indices drawn = indices_of(tiles, "tiles", "[n]"), all = indices_of(population, "population", "[H]");
  const Indices strata = indices_of(bounds, "bounds", "[H+1]", all.size + 1);
  check_within(drawn, "tiles", count, "the tiles of this weight; draw them for this q");
  check_bounds(strata, "bounds", drawn.size, "the tiles drawn");
  for (int64_t h = 0; h < all.size; ++h) {
    const int64_t from_this = strata.data[h + 1] - strata.data[h];
    STD_TORCH_CHECK(all.data[h] >= from_this, "population: expected at least the ", from_this,
                    " tiles drawn from stratum ", h, ", got ", all.data[h]);
  }
  const int64_t total = std::accumulate(all.begin(), all.end(), int64_t{0});
  STD_TORCH_CHECK(total == count, "population: expected a sum of ", count, ", the tiles of this weight, got ", total);
  return {drawn.data, strata.data, all.data, all.size, true};
}

// The batch: rows of x and dy, and which of them each example has.
void set_batch(montessori::LinearProblem& p, const Tensor& x, const Tensor& dy, const Tensor& offsets,
               const MaybeTensor& positions) {
  check_shape(x, "x", "[T, I]", {kAny, p.in});
  const int64_t rows = x.size(0);
  check_shape(dy, "dy", "[T, O]", {rows, p.out});
  p.x = array_of(x, "x");
  p.dy = array_of(dy, "dy");
  const Indices ends = indices_of(offsets, "offsets", "[B+1]");
  if (positions.has_value()) {
    const Indices taken = indices_of(*positions, "positions", "[T]");
    check_within(taken, "positions", rows, "the rows of x");
    check_bounds(ends, "offsets", taken.size, "the positions given");
    p.positions = taken.data;
  } else {
    check_bounds(ends, "offsets", rows, "the rows of x");
  }
  p.offsets = ends.data;
  p.examples = ends.size - 1;
}

// The embedding's rows of the batch's examples; a tile bisects them, so they are sorted.
void set_rows(montessori::LinearProblem& p, const Tensor& row_ids, const Tensor& row_grad, const Tensor& row_offsets) {
  const Indices ids = indices_of(row_ids, "row_ids", "[R]");
  const Indices ends = indices_of(row_offsets, "row_offsets", "[B+1]", p.examples + 1);
  check_shape(row_grad, "row_grad", "[R, I]", {ids.size, p.in});
  check_within(ids, "row_ids", p.out, "the rows of the weight");
  check_bounds(ends, "row_offsets", ids.size, "the rows given");
  for (int64_t b = 0; b < p.examples; ++b) {
    const int64_t* end = ids.data + ends.data[b + 1];
    const int64_t* fall = std::is_sorted_until(ids.data + ends.data[b], end);
    STD_TORCH_CHECK(fall == end, "row_ids: expected sorted ids in each example, got ", fall[-1], " then ", fall[0],
                    " in example ", b);
  }
  p.row_ids = ids.data;
  p.row_grad = array_of(row_grad, "row_grad");
  p.row_offsets = ends.data;
}

std::tuple<Tensor, Tensor> linear_scores(const Tensor& x, const Tensor& dy, const Tensor& offsets,
                                         const MaybeTensor& positions, const Tensor& q, const MaybeTensor& exp_avg,
                                         const MaybeTensor& exp_avg_sq, const MaybeTensor& param,
                                         const MaybeTensor& row_ids, const MaybeTensor& row_grad,
                                         const MaybeTensor& row_offsets, const MaybeTensor& tiles,
                                         const MaybeTensor& bounds, const MaybeTensor& population, double a1, double a2,
                                         double s1, double s2, double eps, double decay, double on_param,
                                         double on_exp_avg, bool round_products) {
  montessori::LinearProblem p{};
  check_shape(q, "q", "[K, O, I]", {kAny, kAny, kAny});
  p.out = q.size(1);
  p.in = q.size(2);
  check_shape(exp_avg, "exp_avg", "[O, I]", {p.out, p.in});
  check_shape(exp_avg_sq, "exp_avg_sq", "[O, I]", {p.out, p.in});
  check_shape(param, "param", "[O, I]", {p.out, p.in});
  p.constants = constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg);
  p.state = state_of(q, exp_avg, exp_avg_sq, param, p.constants);
  p.round_products = round_products;
  set_batch(p, x, dy, offsets, positions);
  if (are_given("row_ids, row_grad, row_offsets", row_ids, row_grad, row_offsets))
    set_rows(p, *row_ids, *row_grad, *row_offsets);
  const AllTiles all(montessori::tiling_of(kernel(), p.out, p.in, p.state.sets).count());
  Selection selection = all.selection();
  if (are_given("tiles, bounds, population", tiles, bounds, population))
    selection = selection_of(*tiles, *bounds, *population, static_cast<int64_t>(all.tiles.size()));
  Tensor scores = torch::stable::new_zeros(q, {p.examples, p.state.sets}, ScalarType::Double);
  Tensor variance = torch::stable::new_zeros(q, {p.examples, p.state.sets}, ScalarType::Double);
  montessori::score_linear(p, selection, kernel(), parallel, static_cast<double*>(scores.mutable_data_ptr()),
                           static_cast<double*>(variance.mutable_data_ptr()));
  return {scores, variance};
}

Tensor example_squares(const Tensor& x, const Tensor& dy, const Tensor& offsets, const MaybeTensor& positions) {
  montessori::LinearProblem p{};
  check_shape(x, "x", "[T, I]", {kAny, kAny});
  check_shape(dy, "dy", "[T, O]", {kAny, kAny});
  p.in = x.size(1);
  p.out = dy.size(1);
  set_batch(p, x, dy, offsets, positions);
  Tensor squares = torch::stable::new_zeros(x, {p.examples}, ScalarType::Double);
  montessori::example_squares({p.x, p.positions}, p.in, {p.dy, p.positions}, p.out, p.offsets, p.examples, kernel(),
                              parallel, static_cast<double*>(squares.mutable_data_ptr()));
  return squares;
}

Tensor tile_norms(const Tensor& q) {
  check_shape(q, "q", "[K, O, I]", {kAny, kAny, kAny});
  const int64_t sets = q.size(0), out = q.size(1), in = q.size(2);
  const int64_t tiles = montessori::tiling_of(kernel(), out, in, sets).count();
  Tensor norms = torch::stable::new_zeros(q, {sets, tiles}, ScalarType::Double);
  montessori::tile_norms(array_of(q, "q"), sets, out, in, kernel(), parallel,
                         static_cast<double*>(norms.mutable_data_ptr()));
  return norms;
}

// Of a parameter of any shape.
void check_elements(const MaybeTensor& tensor, const char* name, int64_t elements) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->numel() == elements, name, ": expected n = ", elements, " elements, got ", tensor->numel());
}

Tensor dense_scores(const MaybeTensor& grad, const Tensor& q, const MaybeTensor& exp_avg, const MaybeTensor& exp_avg_sq,
                    const MaybeTensor& param, double a1, double a2, double s1, double s2, double eps, double decay,
                    double on_param, double on_exp_avg) {
  check_shape(q, "q", "[K, n]", {kAny, kAny});
  const int64_t elements = q.size(1);
  check_shape(grad, "grad", "[B, n]", {kAny, elements});
  check_elements(exp_avg, "exp_avg", elements);
  check_elements(exp_avg_sq, "exp_avg_sq", elements);
  check_elements(param, "param", elements);
  const auto constants = constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg);
  const int64_t examples = grad.has_value() ? grad->size(0) : 1;
  Tensor scores = torch::stable::new_zeros(q, {examples, q.size(0)}, ScalarType::Double);
  montessori::score_dense(array_of(grad, "grad"), examples, elements,
                          state_of(q, exp_avg, exp_avg_sq, param, constants), constants, kernel(), parallel,
                          static_cast<double*>(scores.mutable_data_ptr()));
  return scores;
}

void step_(Tensor param, const Tensor& source, const Tensor& grad, const MaybeTensor& exp_avg,
           const MaybeTensor& exp_avg_sq, double lr, double a1, double a2, double s1, double s2, double eps,
           double decay, double on_param, double on_exp_avg) {
  const Sizes shape = source.sizes();
  check_shape(param, "param", "source.shape", shape);
  check_shape(grad, "grad", "source.shape", shape);
  check_shape(exp_avg, "exp_avg", "source.shape", shape);
  check_shape(exp_avg_sq, "exp_avg_sq", "source.shape", shape);
  const Array from = array_of(source, "source");
  STD_TORCH_CHECK(array_of(param, "param").dtype == from.dtype, "param: expected ", source.scalar_type(),
                  ", the dtype of source, got ", param.scalar_type());
  const auto constants = constants_of(exp_avg_sq.has_value(), a1, a2, s1, s2, eps, decay, on_param, on_exp_avg);
  check_given(constants, exp_avg.has_value(), true);
  const montessori::State state{{}, array_of(exp_avg, "exp_avg"), array_of(exp_avg_sq, "exp_avg_sq"), from, 0};
  montessori::take_step(param.mutable_data_ptr(), from, array_of(grad, "grad"), state, param.numel(),
                        static_cast<float>(lr), constants, kernel(), parallel);
}

Tensor cross_entropy_(Tensor logits, const Tensor& targets, const Tensor& weights) {
  STD_TORCH_CHECK(logits.is_cpu() && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float,
                  "logits: expected a contiguous float32 CPU tensor");
  check_shape(logits, "logits", "[n, V]", {kAny, kAny});
  const int64_t rows = logits.size(0), columns = logits.size(1);
  check_shape(weights, "weights", "[n]", {rows});
  STD_TORCH_CHECK(array_of(weights, "weights").dtype == Dtype::kFloat32, "weights: expected float32, got ",
                  weights.scalar_type());
  const Indices target = indices_of(targets, "targets", "[n]", rows);
  check_within(target, "targets", columns, "the columns of logits");
  const auto* weight = static_cast<const float*>(weights.const_data_ptr());
  Tensor losses = torch::stable::new_zeros(logits, {rows}, ScalarType::Double);
  auto* loss = static_cast<double*>(losses.mutable_data_ptr());
  auto* values = static_cast<float*>(logits.mutable_data_ptr());
  const auto row = kernel().cross_entropy;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loss[i] = row(values + i * columns, columns, target.data[i], weight[i]);
  };
  montessori::for_all(parallel, rows, run);
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
  library.def("example_squares(Tensor x, Tensor dy, Tensor offsets, Tensor? positions) -> Tensor");
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
  library.impl("example_squares", TORCH_BOX(&example_squares));
  library.impl("tile_norms", TORCH_BOX(&tile_norms));
  library.impl("dense_scores", TORCH_BOX(&dense_scores));
  library.impl("step_", TORCH_BOX(&step_));
  library.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
