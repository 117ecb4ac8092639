#include "packing.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

namespace montessori {
namespace {

// Steps and columns that one packing job moves: both sides of the copy stay in the cache.
constexpr int64_t kJobSteps = 32, kJobColumns = 768;

int64_t panels_of(int64_t width, int64_t columns) { return (width + columns - 1) / columns; }

// Cells from one panel to the next: an odd number of cache lines, so that panels do not fall on the same sets of the
// cache.
int64_t stride_of(int64_t cells) {
  constexpr int64_t kLine = kCacheLine / sizeof(uint32_t);
  return round_up(cells, 2 * kLine) + kLine;
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

// Memory of earlier calls of this thread. Fresh pages cost as much as packing itself, and one layer follows
// the other in the same few sizes.
class Spare {
 public:
  ~Spare() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  void* take(size_t& bytes) {
    auto fits = [&](const Block& block) { return block.bytes >= bytes; };
    const auto found = std::find_if(blocks_.begin(), blocks_.end(), fits);
    if (found != blocks_.end()) {
      const Block block = *found;
      blocks_.erase(found);
      bytes = block.bytes;
      return block.data;
    }
    void* data = std::aligned_alloc(kCacheLine, bytes);
    if (!data) throw std::bad_alloc();
    return data;
  }

  void give(void* data, size_t bytes) {
    if (bytes > kMostKept) return std::free(data);
    if (blocks_.size() == kBlocks) {
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
    blocks_.push_back({data, bytes});
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static constexpr size_t kBlocks = 2, kMostKept = size_t{32} << 20;
  std::vector<Block> blocks_;
};

thread_local Spare spare;

// A run of steps within one example.
struct Chunk {
  int64_t step, steps;
  Span tokens;
};

std::vector<Chunk> chunks_of(const int64_t* offsets, const std::vector<int64_t>& bounds, bool pairs) {
  const int64_t per_step = pairs ? 2 : 1;
  std::vector<Chunk> chunks;
  for (size_t b = 0; b + 1 < bounds.size(); ++b)
    for (int64_t step = bounds[b]; step < bounds[b + 1]; step += kJobSteps) {
      const int64_t token = offsets[b] + (step - bounds[b]) * per_step;
      const int64_t steps = std::min(kJobSteps, bounds[b + 1] - step);
      const int64_t end = std::min(offsets[b + 1], token + steps * per_step);
      chunks.push_back({step, steps, {token, std::max(token, end)}});
    }
  return chunks;
}

// One panel of one chunk; `live` columns of it exist. A fixed kColumns turns the copies into a few moves.
template <int64_t kColumns>
void copy_floats(const Rows& rows, int64_t width, const Chunk& chunk, int64_t column, int64_t live, float* to) {
  const float* from = static_cast<const float*>(rows.from.data) + column;
  for (int64_t s = 0; s < chunk.steps; ++s, to += kColumns) {
    const float* row = from + rows.at(chunk.tokens.begin + s) * width;
    if (live == kColumns) {
      std::memcpy(to, row, kColumns * sizeof(float));
    } else {
      std::memcpy(to, row, live * sizeof(float));
      std::fill(to + live, to + kColumns, 0.f);
    }
  }
}

void widen_panel(const Rows& rows, int64_t width, const Chunk& chunk, int64_t column, int64_t live, int64_t columns,
                 float* to) {
  if (rows.from.dtype == Dtype::kFloat32) {
    switch (columns) {
      case 4:
        return copy_floats<4>(rows, width, chunk, column, live, to);
      case 8:
        return copy_floats<8>(rows, width, chunk, column, live, to);
      case 24:
        return copy_floats<24>(rows, width, chunk, column, live, to);
      case 48:
        return copy_floats<48>(rows, width, chunk, column, live, to);
    }
  }
  for (int64_t s = 0; s < chunk.steps; ++s, to += columns) {
    widen(rows.from, rows.at(chunk.tokens.begin + s) * width + column, live, 1.f, to);
    std::fill(to + live, to + columns, 0.f);
  }
}

uint32_t bfloat16_bits(uint16_t value) { return value; }

// Rounded to the nearest, ties to even; NaN stays NaN.
uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

template <typename Element>
void pair_elements(const Rows& rows, int64_t width, const Chunk& chunk, int64_t column, int64_t live, int64_t columns,
                   uint32_t* to) {
  const Element* from = static_cast<const Element*>(rows.from.data) + column;
  for (int64_t s = 0; s < chunk.steps; ++s, to += columns) {
    const int64_t token = chunk.tokens.begin + 2 * s;
    const Element* first = from + rows.at(token) * width;
    if (token + 1 < chunk.tokens.end) {
      const Element* second = from + rows.at(token + 1) * width;
      for (int64_t c = 0; c < live; ++c) to[c] = bfloat16_bits(first[c]) | bfloat16_bits(second[c]) << 16;
    } else {
      for (int64_t c = 0; c < live; ++c) to[c] = bfloat16_bits(first[c]);
    }
    std::fill(to + live, to + columns, 0u);
  }
}

void pair_panel(const Rows& rows, int64_t width, const Chunk& chunk, int64_t column, int64_t live, int64_t columns,
                uint32_t* to) {
  if (rows.from.dtype == Dtype::kFloat32)
    pair_elements<float>(rows, width, chunk, column, live, columns, to);
  else
    pair_elements<uint16_t>(rows, width, chunk, column, live, columns, to);
}

// Where the rows of a chunk of pairs begin, for the kernels that pack it.
struct Starts {
  const void* rows[2 * kJobSteps];
  int64_t tokens;
  bool floats;

  Starts(const Rows& from, int64_t width, const Chunk& chunk)
      : tokens(chunk.tokens.size()), floats(from.from.dtype == Dtype::kFloat32) {
    const int64_t bytes = width * (floats ? 4 : 2);
    for (int64_t t = 0; t < tokens; ++t)
      rows[t] = static_cast<const char*>(from.from.data) + from.at(chunk.tokens.begin + t) * bytes;
  }
};

}  // namespace

void widen(const Array& from, int64_t at, int64_t count, float factor, float* to) {
  with_type(from.dtype, [&](auto* tag) {
    auto* source = static_cast<decltype(tag)>(from.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(source[i]) * factor;
  });
}

void widen_add(const Array& from, int64_t at, int64_t count, float factor, float* to) {
  with_type(from.dtype, [&](auto* tag) {
    auto* source = static_cast<decltype(tag)>(from.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] += static_cast<float>(source[i]) * factor;
  });
}

void narrow(const float* from, int64_t count, Dtype dtype, int64_t at, void* to) {
  with_type(dtype, [&](auto* tag) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(tag)>>;
    auto* target = static_cast<Element*>(to) + at;
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<Element>(from[i]);
  });
}

void pack_tile(const Array& from, int64_t offset, int64_t stride, Span rows, Span columns, int64_t height,
               int64_t width, float factor, float fill, Widen by_kernel, float* to) {
  const bool narrow = from.dtype == Dtype::kBFloat16, general = from.dtype == Dtype::kFloat16;
  const char* data = static_cast<const char*>(from.data);
  for (int64_t r = 0; r < height; ++r, to += width) {
    const int64_t live = r < rows.size() ? columns.size() : 0;
    const int64_t at = offset + (rows.begin + r) * stride + columns.begin;
    if (live && general)
      widen(from, at, live, factor, to);
    else if (live)
      by_kernel(data + at * (narrow ? 2 : 4), narrow, live, factor, to);
    std::fill(to + live, to + width, fill);
  }
}

void prefetch_tile(const Array& from, int64_t offset, int64_t stride, Span rows, Span columns) {
  const int64_t size = from.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* first = static_cast<const char*>(from.data) + (offset + rows.begin * stride + columns.begin) * size;
  for (int64_t r = 0; r < rows.size(); ++r, first += stride * size)
    for (int64_t at = 0; at < columns.size() * size; at += kCacheLine) __builtin_prefetch(first + at, 0, 2);
}

std::vector<int64_t> step_bounds(const int64_t* offsets, int64_t examples, bool pairs, int64_t group) {
  std::vector<int64_t> bounds{0};
  for (int64_t b = 0; b < examples; ++b) {
    const int64_t tokens = offsets[b + 1] - offsets[b];
    bounds.push_back(bounds.back() + round_up(pairs ? (tokens + 1) / 2 : tokens, group));
  }
  return bounds;
}

Cells::Cells(std::size_t bytes) : bytes_(bytes), data_(static_cast<uint32_t*>(spare.take(bytes_))) {}

Cells::~Cells() { spare.give(data_, bytes_); }

Panels::Panels(const Rows& from, int64_t width, const Layout& layout, const int64_t* offsets,
               const std::vector<int64_t>& steps, Parallel parallel)
    : columns_(layout.columns),
      stride_(stride_of(steps.back() * columns_)),
      cells_(std::max<size_t>(panels_of(width, columns_) * stride_ * sizeof(uint32_t), kCacheLine)) {
  const int64_t columns = columns_, panels = panels_of(width, columns);
  const std::vector<Chunk> chunks = chunks_of(offsets, steps, layout.pairs);
  const int64_t group = std::max<int64_t>(1, kJobColumns / columns), groups = (panels + group - 1) / group;
  // Calls move(column, live, to) for each panel of a job.
  const auto each_panel = [&](int64_t job, const auto& move) {
    const int64_t first = job % groups * group, step = chunks[job / groups].step;
    for (int64_t panel = first; panel < std::min(panels, first + group); ++panel)
      move(panel * columns, std::min(columns, width - panel * columns),
           cells_.data() + panel * stride_ + step * columns);
  };
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const Chunk& chunk = chunks[job / groups];
      if (layout.pack) {
        const Starts starts(from, width, chunk);
        each_panel(job, [&](int64_t column, int64_t live, uint32_t* to) {
          layout.pack(starts.rows, starts.tokens, starts.floats, layout.grouped, column, live, chunk.steps, to);
        });
      } else {
        each_panel(job, [&](int64_t column, int64_t live, uint32_t* to) {
          if (layout.pairs)
            pair_panel(from, width, chunk, column, live, columns, to);
          else
            widen_panel(from, width, chunk, column, live, columns, reinterpret_cast<float*>(to));
        });
      }
    }
  };
  for_all(parallel, static_cast<int64_t>(chunks.size()) * groups, pack);
}

}  // namespace montessori
