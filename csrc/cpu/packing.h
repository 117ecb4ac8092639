// Arrays in memory, and the packed copies of them that the kernels read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "kernel.h"

namespace montessori {

// Element type of an array in memory; packing widens it to float32.
enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Array {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

constexpr int64_t kCacheLine = 64;

// Memory that begins on a cache line, so that no vector lies across two.
template <typename Element>
struct OnLine {
  using value_type = Element;
  OnLine() = default;
  template <typename Other>
  OnLine(const OnLine<Other>&) {}
  Element* allocate(std::size_t count) {
    return static_cast<Element*>(::operator new(count * sizeof(Element), std::align_val_t{kCacheLine}));
  }
  void deallocate(Element* data, std::size_t) { ::operator delete(data, std::align_val_t{kCacheLine}); }
  friend bool operator==(const OnLine&, const OnLine&) { return true; }
  friend bool operator!=(const OnLine&, const OnLine&) { return false; }
};
using Floats = std::vector<float, OnLine<float>>;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Calls run(begin, end, context) over [0, jobs) on the threads it likes.
using Parallel = void (*)(int64_t jobs, void (*run)(int64_t, int64_t, void*), void* context);

// Calls body(begin, end) through `parallel`.
template <typename Body>
void for_all(Parallel parallel, int64_t jobs, Body& body) {
  parallel(jobs, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// to[i] = factor · from[at + i], widened to float32.
void widen(const Array& from, int64_t at, int64_t count, float factor, float* to);

// to[i] += factor · from[at + i].
void widen_add(const Array& from, int64_t at, int64_t count, float factor, float* to);

// to[at + i] = from[i], rounded to `dtype`.
void narrow(const float* from, int64_t count, Dtype dtype, int64_t at, void* to);

// to[r, c] = factor · from[offset + rows[r] · stride + columns[c]], padded to [height, width] with `fill`.
void pack_tile(const Array& from, int64_t offset, int64_t stride, Span rows, Span columns, int64_t height,
               int64_t width, float factor, float fill, Widen widen, float* to);

// Asks for the same lines of memory to be brought to the cache meanwhile.
void prefetch_tile(const Array& from, int64_t offset, int64_t stride, Span rows, Span columns);

// First step of every example [B+1], a multiple of `group`: a step is one token, or two of the same example when
// `pairs`.
std::vector<int64_t> step_bounds(const int64_t* offsets, int64_t examples, bool pairs, int64_t group);

// Rows of a matrix in memory [N, width] that stand for the T tokens of a batch: all in order, or those named.
struct Rows {
  Array from;
  const int64_t* positions = nullptr;
  int64_t at(int64_t token) const { return positions ? positions[token] : token; }
};

// Memory that this thread keeps for its next call, given back when it is no longer used or what it was for fails.
class Cells {
 public:
  explicit Cells(std::size_t bytes);
  Cells(const Cells&) = delete;
  ~Cells();
  uint32_t* data() const { return data_; }

 private:
  std::size_t bytes_;  // of the memory, which may be more than was asked for
  uint32_t* data_;
};

// A matrix [T, width] cut into panels of `columns` columns: panel p is [steps, columns] cells at p · stride,
// so that a kernel reads one example's part of a panel front to back. Columns beyond the last are zero, and steps
// beyond an example's tokens. Pairs are bfloat16, float32 rounded to it.
class Panels {
 public:
  // How cells come to lie: `pack` writes pairs, in groups if `grouped`; null for code that any processor runs.
  struct Layout {
    int64_t columns;
    bool pairs;
    PackPairs pack;
    bool grouped;
  };

  Panels(const Rows& from, int64_t width, const Layout& layout, const int64_t* offsets,
         const std::vector<int64_t>& steps, Parallel parallel);

  // Example that begins at `step`, panel `panel`.
  const uint32_t* at(int64_t panel, int64_t step) const { return cells_.data() + panel * stride_ + step * columns_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t columns_, stride_;
  Cells cells_;
};

}  // namespace montessori
