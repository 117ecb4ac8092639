// What the kernels of all instruction sets share: their contract, in packed float32 arrays.
#pragma once

#include <cstdint>

namespace montessori {

enum class Step { kAdamW, kSgd };

// One weight tile of `rows` × columns (padded), constants of the step folded in by the packing: the update is
// (m + a g) / (2 sqrt(v + s g²) + eps) with m and v [rows, columns]; q is [sets, rows, columns]. Padding holds
// m = q = 0 and v = 1. SGD has neither m nor v; its update is a·g.
struct TileJob {
  const float* m;
  const float* v;
  const float* q;
  int64_t rows;
  int64_t sets;
  float a, s, eps;
};

// With an eps far above the root of the smallest normal number, v is that at least (`keep_normal`), and kernels need
// not look for 0.
constexpr float kSmallestFastEps = 1e-12f, kSmallestNormal = 1.17549435e-38f;

// Adds Σ q·u of one example to scores [sets]. A cell is four bytes: one token's float32, or two tokens'
// bfloat16 in the kernels for pairs, the earlier one low. x is [steps, columns] cells; register tile r of dy, at
// r · dy_stride, is [steps / group, rows, group] cells, rows and group as in Format; starts[r] is null or a
// gradient [rows, columns] that register tile r starts from.
using ScoreExample = void (*)(const TileJob& job, const void* x, const void* dy, int64_t dy_stride, int64_t steps,
                              const float* const* starts, double* scores);

// Adds Σ q·u of a ready gradient [1, columns] (null: of gradient 0) to scores [sets]; columns is a multiple
// of Kernel::lanes and job.rows is 1.
using ScoreDense = void (*)(const TileJob& job, const float* grad, int64_t columns, double* scores);

// out = base - lr · update of a ready gradient [1, columns], all padded to a multiple of Kernel::lanes; q is not read.
using StepRow = void (*)(const TileJob& job, const float* grad, const float* base, float lr, int64_t columns,
                         float* out);

// to[i] = factor · from[i] of float32 or (`narrow`) bfloat16.
using Widen = void (*)(const void* from, bool narrow, int64_t count, float factor, float* to);

// Cross-entropy of one row of logits [columns], which it replaces by their gradient times `weight`.
using CrossEntropy = double (*)(float* logits, int64_t columns, int64_t target, float weight);

// Rows a[0..rows) and b[0..before+rows) of one matrix, a[i] the same as b[before + i].
struct RowPairs {
  const char* const* a;
  const char* const* b;
  int64_t rows, before, stride;
};

// Adds the products of `bytes` of a[i] and b[j], of kDotFeatures values at most, to dots[i · stride + j], of those with
// j <= before + i at least.
constexpr int64_t kDotFeatures = 512;
using AddDots = void (*)(const RowPairs& pairs, int64_t bytes, float* dots);

// Writes the cells of pairs of tokens: values column to column + live - 1 of rows[0..tokens), bfloat16 or (`floats`)
// float32, which is rounded to it; the rest of [steps, columns] is 0. As x has them, or (`grouped`) as dy.
using PackPairs = void (*)(const void* const* rows, int64_t tokens, bool floats, bool grouped, int64_t column,
                           int64_t live, int64_t steps, uint32_t* to);

// What a processor holds beside its usual registers, for one thread: `saved` is what was there before.
using Enter = void (*)(unsigned char (&saved)[64]);
using Leave = void (*)(const unsigned char (&saved)[64]);

// Products of one kind of cell.
struct Format {
  int64_t rows;   // of a register tile
  int64_t group;  // steps that dy has side by side; examples have a multiple of it
  ScoreExample adamw, sgd;
  AddDots dots;
  PackPairs pack;  // null: packed by code for any processor, in groups of 1
  Enter enter;     // around all calls of the functions above (OwnRegisters), or null
  Leave leave;
};

struct Kernel {
  int64_t columns;  // of a weight tile
  int64_t lanes;
  Format floats;
  Format pairs;  // without functions where the processor has no bfloat16 products
  ScoreDense dense_adamw, dense_sgd;
  StepRow step_adamw, step_sgd;
  Widen widen;
  CrossEntropy cross_entropy;
};

// While it lives, this thread's special registers are those of the format.
class OwnRegisters {
 public:
  explicit OwnRegisters(const Format& format) : format_(format) {
    if (format_.enter) format_.enter(saved_);
  }
  OwnRegisters(const OwnRegisters&) = delete;
  ~OwnRegisters() {
    if (format_.leave) format_.leave(saved_);
  }

 private:
  const Format& format_;
  unsigned char saved_[64];
};

// Null where this system or its compiler has no matrix registers.
const Kernel* kernel_amx();
const Kernel& kernel_avx512bf16();
const Kernel& kernel_avx512();
const Kernel& kernel_avx2();
const Kernel& kernel_baseline();

}  // namespace montessori
