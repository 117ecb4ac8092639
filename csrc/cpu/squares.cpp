#include "squares.h"

#include <algorithm>
#include <vector>

namespace montessori {
namespace {

// Tokens of one job, whose products with all tokens before them are held.
constexpr int64_t kStrip = 48;

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Some tokens of one example: `first` to `end` of those from `begin` on.
struct Strip {
  int64_t example, begin, first, end;
  int64_t rows() const { return end - first; }
  // Tokens that they are multiplied with.
  int64_t columns() const { return end - begin; }
};

std::vector<Strip> strips_of(const int64_t* offsets, int64_t examples) {
  std::vector<Strip> strips;
  for (int64_t b = 0; b < examples; ++b)
    for (int64_t first = offsets[b]; first < offsets[b + 1]; first += kStrip)
      strips.push_back({b, offsets[b], first, std::min(first + kStrip, offsets[b + 1])});
  return strips;
}

// Products of one strip's rows of a matrix [N, width]; what one thread needs for it.
class Products {
 public:
  Products(const Rows& from, int64_t width, const Kernel& kernel) : from_(from), width_(width) {
    const bool floats = from.from.dtype == Dtype::kFloat32, pairs = from.from.dtype == Dtype::kBFloat16;
    as_stored_ = floats || (pairs && kernel.pairs.dots);
    add_ = floats || !as_stored_ ? kernel.floats.dots : kernel.pairs.dots;
  }

  // [rows, columns] of the strip, those up to the diagonal.
  const float* of(const Strip& strip) {
    const int64_t columns = strip.columns();
    dots_.assign(strip.rows() * columns, 0.f);
    rows_.resize(columns);
    for (int64_t low = 0; low < width_; low += kDotFeatures) {
      const int64_t features = std::min(kDotFeatures, width_ - low);
      point_at(strip, low, features);
      const int64_t before = columns - strip.rows();
      const RowPairs pairs{rows_.data() + before, rows_.data(), strip.rows(), before, columns};
      add_(pairs, features * (as_stored_ ? bytes_of(from_.from.dtype) : 4), dots_.data());
    }
    return dots_.data();
  }

 private:
  // Where each token's `features` values from `low` on are.
  void point_at(const Strip& strip, int64_t low, int64_t features) {
    if (!as_stored_) wide_.resize(strip.columns() * features);
    for (int64_t t = 0; t < strip.columns(); ++t) {
      const int64_t at = from_.at(strip.begin + t) * width_ + low;
      if (as_stored_) {
        rows_[t] = static_cast<const char*>(from_.from.data) + at * bytes_of(from_.from.dtype);
      } else {
        widen(from_.from, at, features, 1.f, wide_.data() + t * features);
        rows_[t] = reinterpret_cast<const char*>(wide_.data() + t * features);
      }
    }
  }

  const Rows& from_;
  int64_t width_;
  bool as_stored_;
  AddDots add_;
  std::vector<float> dots_, wide_;
  std::vector<const char*> rows_;
};

// Σ over the strip's tokens s and all tokens t of their example: those before s count twice, for t and s as well.
double sum_of(const Strip& strip, const float* of_x, const float* of_dy) {
  const int64_t columns = strip.columns();
  double total = 0;
  for (int64_t row = 0; row < strip.rows(); ++row, of_x += columns, of_dy += columns) {
    const int64_t own = columns - strip.rows() + row;
    double sum = 0;
    for (int64_t t = 0; t < own; ++t) sum += static_cast<double>(of_x[t]) * of_dy[t];
    total += 2 * sum + static_cast<double>(of_x[own]) * of_dy[own];
  }
  return total;
}

}  // namespace

void example_squares(const Rows& x, int64_t in, const Rows& dy, int64_t out, const int64_t* offsets, int64_t examples,
                     const Kernel& kernel, Parallel parallel, double* squares) {
  const std::vector<Strip> strips = strips_of(offsets, examples);
  std::vector<double> partial(strips.size());
  auto run = [&](int64_t begin, int64_t end) {
    const OwnRegisters own_registers(kernel.pairs);
    Products of_x(x, in, kernel), of_dy(dy, out, kernel);
    for (int64_t job = begin; job < end; ++job)
      partial[job] = sum_of(strips[job], of_x.of(strips[job]), of_dy.of(strips[job]));
  };
  for_all(parallel, static_cast<int64_t>(strips.size()), run);
  for (size_t job = 0; job < strips.size(); ++job) squares[strips[job].example] += partial[job];
}

}  // namespace montessori
