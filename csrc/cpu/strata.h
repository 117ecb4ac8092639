// Estimating a sum over tiles from some of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace montessori {

// One stratum: the estimate of its total and the variance of that (simple random sampling within it).
class Stratum {
 public:
  explicit Stratum(int64_t size) : one_(size), sum_(size), squares_(size) {}

  void start() {
    std::fill(sum_.begin(), sum_.end(), 0.0);
    std::fill(squares_.begin(), squares_.end(), 0.0);
  }

  double* tile() {
    std::fill(one_.begin(), one_.end(), 0.0);
    return one_.data();
  }

  void add(const double* at_zero, int64_t sets) {
    for (size_t i = 0; i < one_.size(); ++i) {
      const double value = one_[i] - (at_zero ? at_zero[i % sets] : 0.0);
      sum_[i] += value;
      squares_[i] += value * value;
    }
  }

  void finish(int64_t drawn, int64_t population, double* scores, double* variance) const {
    if (drawn == 0) return;
    const double n = static_cast<double>(drawn), all = static_cast<double>(population);
    for (size_t i = 0; i < sum_.size(); ++i) {
      scores[i] += sum_[i] * (all / n);
      if (drawn == population || drawn < 2) continue;
      const double spread = std::max(0.0, squares_[i] - sum_[i] * sum_[i] / n) / (n - 1);
      variance[i] += all * all * (1 - n / all) * spread / n;
    }
  }

 private:
  std::vector<double> one_, sum_, squares_;
};

}  // namespace montessori
