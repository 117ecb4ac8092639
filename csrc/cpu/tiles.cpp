#include "tiles.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

namespace montessori {
namespace {

// Columns of a job in kernel tiles: dy is packed once for all of them.
constexpr int64_t kPanels = 4;

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return 512 * 1024;
}

// Rows of a job: its share of m, v and q fills about a third of the second-level cache, the rest is for
// the operands that stream through.
int64_t job_rows(const Kernel& kernel, const LinearProblem& p) {
  const int64_t per_row = (2 + p.sets) * kPanels * kernel.columns * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = l2_bytes() / 3 / per_row;
  return std::clamp(round_up(fitting, kernel.rows), kernel.rows, 16 * kernel.rows);
}

template <typename F>
void with_type(Dtype dtype, F body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<const float*>(nullptr));
    case Dtype::kBFloat16:
      return body(static_cast<const torch::headeronly::BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return body(static_cast<const torch::headeronly::Half*>(nullptr));
  }
}

// to[i] = from[at + i], widened to float32.
void widen(const Array& from, int64_t at, int64_t count, float* to) {
  with_type(from.dtype, [&](auto* tag) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    auto* source = static_cast<decltype(tag)>(from.data) + at;
    if constexpr (std::is_same_v<Element, float>)
      std::memcpy(to, source, count * sizeof(float));
    else
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(source[i]);
  });
}

// to[r, c] = factor · from[rows[r], columns[c]], padded to [height, width] with `fill`.
void pack_tile(const Array& from, int64_t offset, int64_t stride, Span rows, Span columns, int64_t height,
               int64_t width, float factor, float fill, float* to) {
  for (int64_t r = 0; r < height; ++r, to += width) {
    const int64_t live = r < rows.size() ? columns.size() : 0;
    if (live) widen(from, offset + (rows.begin + r) * stride + columns.begin, live, to);
    if (factor != 1.f)
      for (int64_t c = 0; c < live; ++c) to[c] *= factor;
    std::fill(to + live, to + width, fill);
  }
}

// Floats between two register tiles of packed dy: an odd number of cache lines, so that the tiles do not
// fall on the same sets of the cache.
int64_t dy_stride(int64_t tokens, int64_t kernel_rows) { return round_up(tokens * kernel_rows, 32) + 16; }

template <int64_t kRows>
void interleave(const float* line, int64_t tiles, int64_t stride, float* to) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    std::memcpy(to + tile * stride, line + tile * kRows, kRows * sizeof(float));
}

// to[tile · stride + t · kernel_rows + r] = dy[tokens[t], rows[tile · kernel_rows + r]], zero beyond the
// last row. Token by token: dy is read once, in order.
void pack_dy(const Array& dy, int64_t width, Span tokens, Span rows, int64_t kernel_rows, float* to) {
  const int64_t stride = dy_stride(tokens.size(), kernel_rows);
  const int64_t whole = rows.size() / kernel_rows, rest = rows.size() - whole * kernel_rows;
  std::vector<float> buffer(dy.dtype == Dtype::kFloat32 ? 0 : rows.size());
  for (int64_t t = 0; t < tokens.size(); ++t, to += kernel_rows) {
    const int64_t at = (tokens.begin + t) * width + rows.begin;
    const float* line = static_cast<const float*>(dy.data) + at;
    if (!buffer.empty()) {
      widen(dy, at, rows.size(), buffer.data());
      line = buffer.data();
    }
    // Copies of a fixed size compile to a few moves.
    (kernel_rows == 8 ? interleave<8> : interleave<4>)(line, whole, stride, to);
    if (rest) {
      float* last = to + whole * stride;
      std::copy(line + whole * kernel_rows, line + rows.size(), last);
      std::fill(last + rest, last + kernel_rows, 0.f);
    }
  }
}

// Everything one thread needs for its jobs, allocated once.
class Worker {
 public:
  Worker(const LinearProblem& problem, const Kernel& kernel, int64_t rows)
      : p_(problem), kernel_(kernel), rows_(rows), tile_(rows * kernel.columns) {
    int64_t longest = 0;
    for (int64_t b = 0; b < p_.examples; ++b) longest = std::max(longest, p_.offsets[b + 1] - p_.offsets[b]);
    m_.resize(kPanels * tile_);
    v_.resize(kPanels * tile_);
    q_.resize(kPanels * p_.sets * tile_);
    x_.resize(longest * kernel.columns);
    dy_.resize(dy_stride(longest, kernel.rows) * (rows / kernel.rows));
    starts_.resize(rows / kernel.rows);
    if (p_.row_ids) start_values_.resize(tile_);
  }

  // Adds the scores of one job to scores [B, K].
  void run(Span rows, Span columns, double* scores) {
    rows_span_ = rows;
    height_ = round_up(rows.size(), kernel_.rows);
    const int64_t panels = round_up(columns.size(), kernel_.columns) / kernel_.columns;
    for (int64_t panel = 0; panel < panels; ++panel) pack_state(panel, panel_columns(columns, panel));
    for (int64_t b = 0; b < p_.examples; ++b) {
      const Span tokens{p_.offsets[b], p_.offsets[b + 1]};
      pack_dy(p_.dy, p_.out, tokens, rows, kernel_.rows, dy_.data());
      for (int64_t panel = 0; panel < panels; ++panel)
        score_panel(b, tokens, panel, panel_columns(columns, panel), scores + b * p_.sets);
    }
  }

 private:
  Span panel_columns(Span columns, int64_t panel) const {
    const int64_t begin = columns.begin + panel * kernel_.columns;
    return {begin, std::min(columns.end, begin + kernel_.columns)};
  }

  void pack_state(int64_t panel, Span columns) {
    const auto pack = [&](const Array& from, int64_t offset, float factor, float fill, float* to) {
      pack_tile(from, offset, p_.in, rows_span_, columns, height_, kernel_.columns, factor, fill, to);
    };
    if (p_.step == Step::kAdamW) {
      pack(p_.exp_avg, 0, p_.a1, 0.f, m_.data() + panel * tile_);
      pack(p_.exp_avg_sq, 0, p_.s1, 1.f, v_.data() + panel * tile_);
    }
    for (int64_t k = 0; k < p_.sets; ++k)
      pack(p_.q, k * p_.out * p_.in, 1.f, 0.f, q_.data() + panel * p_.sets * tile_ + k * height_ * kernel_.columns);
  }

  void score_panel(int64_t b, Span tokens, int64_t panel, Span columns, double* scores) {
    pack_tile(p_.x, 0, p_.in, tokens, columns, tokens.size(), kernel_.columns, 1.f, 0.f, x_.data());
    find_starts(b, columns);
    const TileJob job{m_.data() + panel * tile_,
                      v_.data() + panel * tile_,
                      q_.data() + panel * p_.sets * tile_,
                      height_,
                      p_.sets,
                      p_.a2,
                      p_.s2,
                      p_.eps};
    const auto score = p_.step == Step::kAdamW ? kernel_.adamw : kernel_.sgd;
    score(job, x_.data(), dy_.data(), dy_stride(tokens.size(), kernel_.rows), tokens.size(), starts_.data(), scores);
  }

  // Register tiles that an embedding row of this example falls into start from that row's gradient.
  void find_starts(int64_t b, Span columns) {
    std::fill(starts_.begin(), starts_.end(), nullptr);
    if (!p_.row_ids) return;
    const int64_t* end = p_.row_ids + p_.row_offsets[b + 1];
    const int64_t* id = std::lower_bound(p_.row_ids + p_.row_offsets[b], end, rows_span_.begin);
    for (; id < end && *id < rows_span_.end; ++id) {
      const int64_t row = *id - rows_span_.begin;
      const int64_t tile = row / kernel_.rows, size = kernel_.rows * kernel_.columns;
      float* values = start_values_.data() + tile * size;
      if (!starts_[tile]) std::fill(values, values + size, 0.f);
      starts_[tile] = values;
      add_row(id - p_.row_ids, columns, values + (row % kernel_.rows) * kernel_.columns);
    }
  }

  void add_row(int64_t entry, Span columns, float* to) const {
    with_type(p_.row_grad.dtype, [&](auto* tag) {
      auto* line = static_cast<decltype(tag)>(p_.row_grad.data) + entry * p_.in + columns.begin;
      for (int64_t c = 0; c < columns.size(); ++c) to[c] += static_cast<float>(line[c]);
    });
  }

  const LinearProblem& p_;
  const Kernel& kernel_;
  int64_t rows_, tile_, height_ = 0;
  Span rows_span_{0, 0};
  std::vector<float> m_, v_, q_, x_, dy_, start_values_;
  std::vector<const float*> starts_;
};

struct Run {
  const LinearProblem& problem;
  const Kernel& kernel;
  int64_t rows, columns, column_jobs;
  double* partial;

  void operator()(int64_t begin, int64_t end) const {
    Worker worker(problem, kernel, rows);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / column_jobs * rows, column = job % column_jobs * columns;
      worker.run({row, std::min(problem.out, row + rows)}, {column, std::min(problem.in, column + columns)},
                 partial + job * problem.examples * problem.sets);
    }
  }
};

}  // namespace

const Kernel* choose_kernel(const std::string& name) {
  const bool any = name.empty();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && (any || name == "avx512")) return &kernel_avx512();
  if (avx2 && (any || name == "avx2")) return &kernel_avx2();
#endif
  return any || name == "baseline" ? &kernel_baseline() : nullptr;
}

void score_linear(const LinearProblem& problem, const Kernel& kernel, Parallel parallel, double* scores) {
  const int64_t rows = job_rows(kernel, problem), columns = kPanels * kernel.columns;
  const int64_t row_jobs = (problem.out + rows - 1) / rows, column_jobs = (problem.in + columns - 1) / columns;
  const int64_t jobs = row_jobs * column_jobs, size = problem.examples * problem.sets;
  std::vector<double> partial(jobs * size, 0.0);
  Run run{problem, kernel, rows, columns, column_jobs, partial.data()};
  parallel(jobs, [](int64_t begin, int64_t end, void* context) { (*static_cast<Run*>(context))(begin, end); }, &run);
  for (int64_t job = 0; job < jobs; ++job)
    for (int64_t i = 0; i < size; ++i) scores[i] += partial[job * size + i];
}

}  // namespace montessori
