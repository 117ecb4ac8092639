// What the host knows of the fused linear kernels. Dimensions: B examples, T tokens, O out, I in, K sets.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>

namespace montessori {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Array {
  const void* data;
  Dtype dtype;
};

// Σ q · ((m + a g) / (sqrt(v + s g²) + ε) + decay θ) per example and set, g = dYᵀX (Eq. 1 and 5 over a constant).
struct LinearProblem {
  Array x;               // [T, I], bfloat16 or float16, 16-byte aligned rows
  Array dy;              // [T, O], of the same dtype
  const int64_t* spans;  // [B, 2]: rows of each example, padding may lie between them
  Array q;               // [K, O, I]
  Array exp_avg;         // [O, I]
  Array exp_avg_sq;      // [O, I]
  Array param;           // [O, I], read only where decay is not 0
  float* partial;        // [K, B+1, parts]; row B takes the decay, which all examples share
  int64_t tokens;
  int examples, sets, out, in;
  float a, s, eps, decay;
};

// Sets a, s, ε and decay from (a1 m + a2 g) / (sqrt(s1 v + s2 g²) + ε) + decay θ, and returns the constant that the two
// differ by. a1 and s1 are positive.
inline double fold_constants(LinearProblem& p, double a1, double a2, double s1, double s2, double eps, double decay) {
  const double constant = a1 / std::sqrt(s1);
  p.a = static_cast<float>(a2 / a1);
  p.s = static_cast<float>(s2 / s1);
  p.eps = static_cast<float>(eps / std::sqrt(s1));
  p.decay = static_cast<float>(decay / constant);
  return constant;
}

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// How a kernel cuts the problem: tiles of (block_o, block_i), each worked on by `blocks` blocks together, of which each
// gives `parts_per_block` partial scores.
struct Cut {
  int block_o, block_i, blocks, parts_per_block;
};

inline int64_t num_tiles(const LinearProblem& p, const Cut& cut) {
  return ceil_div(p.out, cut.block_o) * ceil_div(p.in, cut.block_i);
}

constexpr int kChooseSplits = 0;
constexpr int64_t kMostSplits = 16;  // where they are chosen

// Shares of the examples, `at_a_time` of which run side by side: as asked for, at most one for each example, or else
// enough that the last round is not a lone one, few enough that reading the state of a tile for each share, as long as
// the products of some 2,000 tokens, does not outweigh it.
inline int splits_for(const LinearProblem& p, int asked, int64_t tiles, int at_a_time) {
  if (asked != kChooseSplits) return std::max(1, std::min(asked, p.examples));
  constexpr int64_t kStateTokens = 2048;
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= std::min<int64_t>(kMostSplits, p.examples); ++splits) {
    const int64_t longest = ceil_div(ceil_div(p.examples, splits) * p.tokens, p.examples);
    const int64_t cost = ceil_div(tiles * splits, std::max(at_a_time, 1)) * (longest + kStateTokens);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return static_cast<int>(best);
}

// A positive number that is asked of the runtime once for each device: such calls may wait for copies under way.
class PerDevice {
 public:
  template <typename Ask>
  cudaError_t get(int* value, Ask ask) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    std::atomic<int>& known = known_[device % kSlots];
    if (device < kSlots && (*value = known.load()) > 0) return cudaSuccess;
    const cudaError_t error = ask(value);
    if (error == cudaSuccess && device < kSlots) known = *value;
    return error;
  }

 private:
  static constexpr int kSlots = 64;
  std::atomic<int> known_[kSlots] = {};
};

// State that is bfloat16 throughout is held so, and leaves room for a tile twice as wide.
inline bool holds_bfloat16(const LinearProblem& p) {
  return p.q.dtype == Dtype::kBFloat16 && p.exp_avg.dtype == Dtype::kBFloat16 && p.exp_avg_sq.dtype == Dtype::kBFloat16;
}

// mma.sync with cp.async: compute capability 8.0 and later.
Cut mma_cut(const LinearProblem& p);
cudaError_t launch_linear_mma(const LinearProblem& p, int splits, cudaStream_t stream);

// wgmma with TMA, warp-specialised: compute capability 9.0.
Cut wgmma_cut(const LinearProblem& p);
cudaError_t launch_linear_wgmma(const LinearProblem& p, int splits, cudaStream_t stream);

// The same in clusters of four or eight blocks, which fetch each operand once for all that share it.
Cut wgmma_cluster_cut(const LinearProblem& p);
cudaError_t launch_linear_wgmma_cluster(const LinearProblem& p, int splits, cudaStream_t stream);

// Row B of partial: decay · Σ q_k · θ in `parts` stretches, 0 without decay.
cudaError_t launch_decay(const LinearProblem& p, int64_t parts, cudaStream_t stream);

// scores [B, K] float64: partial[k, b] and the shared row partial[k, B], each added up in a fixed order, times scale.
cudaError_t launch_sum_partials(const float* partial, int64_t parts, int examples, int sets, double scale,
                                double* scores, cudaStream_t stream);

}  // namespace montessori
