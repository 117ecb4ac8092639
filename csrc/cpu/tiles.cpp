#include "tiles.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "strata.h"

namespace montessori {
namespace {

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return 512 * 1024;
}

// See kSmallestFastEps; NaN stays NaN.
void keep_normal(float* v, int64_t count, float eps) {
  if (eps < kSmallestFastEps) return;
  for (int64_t i = 0; i < count; ++i) v[i] = v[i] < kSmallestNormal ? kSmallestNormal : v[i];
}

// m, v, q of one tile, widened, with the constants folded in.
class TileState {
 public:
  TileState(const State& state, const StepConstants& constants, int64_t elements, const Kernel& kernel)
      : s_(state), c_(constants), widen_(kernel.widen) {
    if (c_.step == Step::kAdamW) {
      m_.resize(elements);
      v_.resize(elements);
    }
    q_.resize(s_.sets * elements);
    if (c_.decay != 0.f) decay_.resize(elements);
  }

  // Rows and columns of a matrix [matrix_rows, stride], padded to [height, width].
  void load(int64_t matrix_rows, int64_t stride, Span rows, Span columns, int64_t height, int64_t width) {
    const auto pack = [&](const Array& from, int64_t offset, float factor, float fill, float* to) {
      pack_tile(from, offset, stride, rows, columns, height, width, factor, fill, widen_, to);
    };
    if (c_.step == Step::kAdamW) {
      pack(s_.exp_avg, 0, c_.m, 0.f, m_.data());
      pack(s_.exp_avg_sq, 0, c_.v, 1.f, v_.data());
      keep_normal(v_.data(), height * width, c_.eps);
    }
    for (int64_t k = 0; k < s_.sets; ++k)
      pack(s_.q, k * matrix_rows * stride, 1.f, 0.f, q_.data() + k * height * width);
    if (!decay_.empty()) pack(s_.param, 0, c_.decay, 0.f, decay_.data());
    constant_.assign(s_.sets, 0.0);
    if (c_.on_param != 0.f) add_constant(s_.param, c_.on_param, pack, height * width);
    if (c_.on_exp_avg != 0.f) add_constant(s_.exp_avg, c_.on_exp_avg, pack, height * width);
  }

  void prefetch(int64_t matrix_rows, int64_t stride, Span rows, Span columns) const {
    if (c_.step == Step::kAdamW) {
      prefetch_tile(s_.exp_avg, 0, stride, rows, columns);
      prefetch_tile(s_.exp_avg_sq, 0, stride, rows, columns);
    }
    for (int64_t k = 0; k < s_.sets; ++k) prefetch_tile(s_.q, k * matrix_rows * stride, stride, rows, columns);
  }

  TileJob job(int64_t rows) const { return {m_.data(), v_.data(), q_.data(), rows, s_.sets, c_.a, c_.s, c_.eps}; }
  // λθ, which every gradient starts from; null without.
  const float* decay() const { return decay_.empty() ? nullptr : decay_.data(); }
  // The part of every example's score that no gradient changes, [K].
  const double* constant() const { return constant_.data(); }

 private:
  template <typename Pack>
  void add_constant(const Array& from, float factor, const Pack& pack, int64_t elements) {
    scratch_.resize(elements);
    pack(from, 0, factor, 0.f, scratch_.data());
    for (int64_t k = 0; k < s_.sets; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < elements; ++i) sum += static_cast<double>(q_[k * elements + i]) * scratch_[i];
      constant_[k] += sum;
    }
  }

  const State& s_;
  const StepConstants& c_;
  Widen widen_;
  Floats m_, v_, q_, decay_, scratch_;
  std::vector<double> constant_;
};

// A batch packed for the kernels.
struct PackedBatch {
  bool pairs;
  const Format& format;
  std::vector<int64_t> steps;
  Panels x, dy;

  static bool use_pairs(const LinearProblem& p, const Kernel& kernel) {
    const auto fits = [&](const Array& array) {
      return array.dtype == Dtype::kBFloat16 || (p.round_products && array.dtype == Dtype::kFloat32);
    };
    return kernel.pairs.adamw && fits(p.x) && fits(p.dy);
  }

  PackedBatch(const LinearProblem& p, const Kernel& kernel, Parallel parallel)
      : pairs(use_pairs(p, kernel)),
        format(pairs ? kernel.pairs : kernel.floats),
        steps(step_bounds(p.offsets, p.examples, pairs, format.group)),
        x({p.x, p.positions}, p.in, {kernel.columns, pairs, format.pack, false}, p.offsets, steps, parallel),
        dy({p.dy, p.positions}, p.out, {format.rows, pairs, format.pack, true}, p.offsets, steps, parallel) {}
};

// Everything one thread needs for its tiles, allocated once.
class Worker {
 public:
  Worker(const LinearProblem& problem, const PackedBatch& batch, const Kernel& kernel, const Tiling& tiling)
      : p_(problem),
        batch_(batch),
        own_registers_(batch.format),
        unit_(batch.format.rows),
        tiling_(tiling),
        state_(problem.state, problem.constants, tiling.rows * tiling.columns, kernel),
        starts_(tiling.rows / unit_) {
    if (p_.row_ids) start_values_.resize(tiling.rows * tiling.columns);
    score_ = p_.constants.step == Step::kAdamW ? batch.format.adamw : batch.format.sgd;
  }

  // Adds the scores of one tile to scores [B, K], and the score at gradient 0 to at_zero [K] if wanted. The
  // state of tile `next` (none below 0) is on its way meanwhile.
  void run(int64_t tile, int64_t next, double* scores, double* at_zero) {
    panel_ = tile % tiling_.column_tiles;
    rows_ = rows_of(tile);
    columns_ = columns_of(tile);
    height_ = round_up(rows_.size(), unit_);
    state_.load(p_.out, p_.in, rows_, columns_, height_, tiling_.columns);
    for (int64_t b = 0; b < p_.examples; ++b) {
      if (next >= 0) prefetch(next, b);
      find_starts(b);
      score(batch_.steps[b], batch_.steps[b + 1] - batch_.steps[b], scores + b * p_.state.sets);
      for (int64_t k = 0; k < p_.state.sets; ++k) scores[b * p_.state.sets + k] += state_.constant()[k];
    }
    if (!at_zero) return;
    std::copy(state_.constant(), state_.constant() + p_.state.sets, at_zero);
    clear_starts();
    score(0, 0, at_zero);
  }

 private:
  Span rows_of(int64_t tile) const {
    const int64_t row = tile / tiling_.column_tiles * tiling_.rows;
    return {row, std::min(p_.out, row + tiling_.rows)};
  }

  Span columns_of(int64_t tile) const {
    const int64_t column = tile % tiling_.column_tiles * tiling_.columns;
    return {column, std::min(p_.in, column + tiling_.columns)};
  }

  // The share of example b of the state of tile `next`: all of it at once is more than the processor keeps track of.
  void prefetch(int64_t next, int64_t b) const {
    const Span rows = rows_of(next);
    const Span share{rows.begin + rows.size() * b / p_.examples, rows.begin + rows.size() * (b + 1) / p_.examples};
    state_.prefetch(p_.out, p_.in, share, columns_of(next));
  }

  void score(int64_t step, int64_t steps, double* scores) const {
    const uint32_t* dy = batch_.dy.at(rows_.begin / unit_, step);
    score_(state_.job(height_), batch_.x.at(panel_, step), dy, batch_.dy.stride(), steps, starts_.data(), scores);
  }

  int64_t start_size() const { return unit_ * tiling_.columns; }

  void clear_starts() {
    const float* decay = state_.decay();
    for (size_t tile = 0; tile < starts_.size(); ++tile) starts_[tile] = decay ? decay + tile * start_size() : nullptr;
  }

  // Register tiles that an embedding row of this example falls into start from that row's gradient.
  void find_starts(int64_t b) {
    clear_starts();
    if (!p_.row_ids) return;
    const int64_t* end = p_.row_ids + p_.row_offsets[b + 1];
    const int64_t* id = std::lower_bound(p_.row_ids + p_.row_offsets[b], end, rows_.begin);
    for (; id < end && *id < rows_.end; ++id) {
      const int64_t row = *id - rows_.begin, tile = row / unit_;
      float* values = start_values_.data() + tile * start_size();
      begin_start(tile, values);
      widen_add(p_.row_grad, (id - p_.row_ids) * p_.in + columns_.begin, columns_.size(), 1.f,
                values + row % unit_ * tiling_.columns);
    }
  }

  void begin_start(int64_t tile, float* values) {
    if (starts_[tile] == values) return;
    if (starts_[tile])
      std::copy(starts_[tile], starts_[tile] + start_size(), values);
    else
      std::fill(values, values + start_size(), 0.f);
    starts_[tile] = values;
  }

  const LinearProblem& p_;
  const PackedBatch& batch_;
  OwnRegisters own_registers_;
  int64_t unit_;  // rows of a register tile
  const Tiling& tiling_;
  TileState state_;
  ScoreExample score_;
  int64_t panel_ = 0, height_ = 0;
  Span rows_{0, 0}, columns_{0, 0};
  Floats start_values_;
  std::vector<const float*> starts_;
};

// Rows of a tile, a multiple of `unit` between half of `most` and `most`: those that leave the last tile fullest,
// since threads share tiles by their number.
int64_t even_rows(int64_t out, int64_t unit, int64_t most) {
  int64_t best = most, least = std::numeric_limits<int64_t>::max();
  for (int64_t rows = most; rows >= std::max(unit, most / 2); rows -= unit) {
    const int64_t padded = round_up(out, rows);
    if (padded < least) {
      least = padded;
      best = rows;
    }
  }
  return best;
}

// Elements of a ready gradient that one job covers.
constexpr int64_t kDenseBlock = 4096;

}  // namespace

const Kernel* choose_kernel(const std::string& name) {
  const bool any = name.empty();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && kernel_amx() && (any || name == "amx")) return kernel_amx();
  if (bf16 && (any || name == "avx512bf16")) return &kernel_avx512bf16();
  if (avx512 && (any || name == "avx512")) return &kernel_avx512();
  if (avx2 && (any || name == "avx2")) return &kernel_avx2();
#endif
  return any || name == "baseline" ? &kernel_baseline() : nullptr;
}

Tiling tiling_of(const Kernel& kernel, int64_t out, int64_t in, int64_t sets) {
  // m, v and q of a tile fill about an eighth of the second-level cache; the operands that stream through and
  // the neighbouring tile's, which they share, have the rest.
  const int64_t per_row = (2 + sets) * kernel.columns * static_cast<int64_t>(sizeof(float));
  const int64_t unit = std::max(kernel.floats.rows, kernel.pairs.rows);
  const int64_t most = std::clamp(round_up(l2_bytes() / 8 / per_row, unit), 2 * unit, 16 * kernel.floats.rows);
  const int64_t rows = even_rows(out, unit, most);
  return {rows, kernel.columns, (out + rows - 1) / rows, (in + kernel.columns - 1) / kernel.columns};
}

void tile_norms(const Array& q, int64_t sets, int64_t out, int64_t in, const Kernel& kernel, Parallel parallel,
                double* norms) {
  const Tiling tiling = tiling_of(kernel, out, in, sets);
  auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> row(in);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t set = job / tiling.row_tiles, first = job % tiling.row_tiles * tiling.rows;
      double* to = norms + job * tiling.column_tiles;
      for (int64_t r = first; r < std::min(out, first + tiling.rows); ++r) {
        widen(q, (set * out + r) * in, in, 1.f, row.data());
        for (int64_t i = 0; i < in; ++i) to[i / tiling.columns] += static_cast<double>(row[i]) * row[i];
      }
      for (int64_t c = 0; c < tiling.column_tiles; ++c) to[c] = std::sqrt(to[c]);
    }
  };
  for_all(parallel, sets * tiling.row_tiles, run);
}

void score_linear(const LinearProblem& problem, const Selection& selection, const Kernel& kernel, Parallel parallel,
                  double* scores, double* variance) {
  const Tiling tiling = tiling_of(kernel, problem.out, problem.in, problem.state.sets);
  const PackedBatch batch(problem, kernel, parallel);
  const int64_t size = problem.examples * problem.state.sets;
  // Estimate and variance per stratum; added up in order afterwards.
  std::vector<double> partial(selection.strata * 2 * size, 0.0);
  auto run = [&](int64_t begin, int64_t end) {
    Worker worker(problem, batch, kernel, tiling);
    Stratum stratum(size);
    std::vector<double> at_zero(problem.state.sets);
    for (int64_t h = begin; h < end; ++h) {
      stratum.start();
      for (int64_t i = selection.bounds[h]; i < selection.bounds[h + 1]; ++i) {
        std::fill(at_zero.begin(), at_zero.end(), 0.0);
        double* zero = selection.from_zero ? at_zero.data() : nullptr;
        const int64_t next = i + 1 < selection.bounds[end] ? selection.tiles[i + 1] : -1;
        worker.run(selection.tiles[i], next, stratum.tile(), zero);
        stratum.add(zero, problem.state.sets);
      }
      double* to = partial.data() + h * 2 * size;
      stratum.finish(selection.bounds[h + 1] - selection.bounds[h], selection.population[h], to, to + size);
    }
  };
  for_all(parallel, selection.strata, run);
  for (int64_t h = 0; h < selection.strata; ++h)
    for (int64_t i = 0; i < size; ++i) {
      scores[i] += partial[h * 2 * size + i];
      variance[i] += partial[(h * 2 + 1) * size + i];
    }
}

void score_dense(const Array& grad, int64_t examples, int64_t elements, const State& state,
                 const StepConstants& constants, const Kernel& kernel, Parallel parallel, double* scores) {
  const int64_t blocks = (elements + kDenseBlock - 1) / kDenseBlock, size = examples * state.sets;
  std::vector<double> partial(blocks * size, 0.0);
  auto run = [&](int64_t begin, int64_t end) {
    TileState tile(state, constants, kDenseBlock, kernel);
    Floats values(kDenseBlock);
    const auto score = constants.step == Step::kAdamW ? kernel.dense_adamw : kernel.dense_sgd;
    for (int64_t block = begin; block < end; ++block) {
      const Span span{block * kDenseBlock, std::min(elements, (block + 1) * kDenseBlock)};
      const int64_t width = round_up(span.size(), kernel.lanes);
      tile.load(1, elements, {0, 1}, span, 1, width);
      for (int64_t b = 0; b < examples; ++b) {
        std::fill(values.begin(), values.begin() + width, 0.f);
        if (grad.data) widen(grad, b * elements + span.begin, span.size(), 1.f, values.data());
        if (tile.decay())
          for (int64_t i = 0; i < width; ++i) values[i] += tile.decay()[i];
        double* to = partial.data() + block * size + b * state.sets;
        score(tile.job(1), values.data(), width, to);
        for (int64_t k = 0; k < state.sets; ++k) to[k] += tile.constant()[k];
      }
    }
  };
  for_all(parallel, blocks, run);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < size; ++i) scores[i] += partial[block * size + i];
}

void take_step(void* param, const Array& source, const Array& grad, const State& state, int64_t elements, float lr,
               const StepConstants& c, const Kernel& kernel, Parallel parallel) {
  const bool adamw = c.step == Step::kAdamW;
  auto run = [&](int64_t begin, int64_t end) {
    Floats g(kDenseBlock), base(kDenseBlock), m(kDenseBlock), v(kDenseBlock, 1.f);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kDenseBlock, count = std::min(kDenseBlock, elements - at);
      widen(grad, at, count, 1.f, g.data());
      if (c.decay != 0.f) widen_add(source, at, count, c.decay, g.data());
      widen(source, at, count, 1.f - lr * c.on_param, base.data());
      if (c.on_exp_avg != 0.f) widen_add(state.exp_avg, at, count, -lr * c.on_exp_avg, base.data());
      if (adamw) {
        widen(state.exp_avg, at, count, c.m, m.data());
        widen(state.exp_avg_sq, at, count, c.v, v.data());
        keep_normal(v.data(), count, c.eps);
      }
      const TileJob job{m.data(), v.data(), nullptr, 1, 0, c.a, c.s, c.eps};
      (adamw ? kernel.step_adamw : kernel.step_sgd)(job, g.data(), base.data(), lr, round_up(count, kernel.lanes),
                                                    base.data());
      narrow(base.data(), count, source.dtype, at, param);
    }
  };
  for_all(parallel, (elements + kDenseBlock - 1) / kDenseBlock, run);
}

}  // namespace montessori
