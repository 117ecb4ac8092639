// Checks of what an operator was called with. Anyone may call one from Python, and the kernels index by what they are
// given: no call that passes these reads or writes beyond a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace montessori {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A size that a check leaves open.
constexpr int64_t kAny = -1;

inline std::string shown(Sizes sizes) {
  std::string text = "[";
  for (const int64_t size : sizes)
    text += (text.size() > 1 ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
  return text + "]";
}

// `legend` names the dimensions, such as "[T, I]".
inline void check_shape(const Tensor& tensor, const char* name, const char* legend, Sizes expected) {
  const Sizes got = tensor.sizes();
  const auto fits = [](int64_t want, int64_t have) { return want == kAny || want == have; };
  STD_TORCH_CHECK(std::equal(expected.begin(), expected.end(), got.begin(), got.end(), fits), name, ": expected shape ",
                  legend, " = ", shown(expected), ", got ", shown(got));
}

inline void check_shape(const MaybeTensor& tensor, const char* name, const char* legend, Sizes expected) {
  if (tensor.has_value()) check_shape(*tensor, name, legend, expected);
}

// Either library's Dtype.
template <typename Dtype>
Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The numbers of an int64 tensor [size] in memory.
struct Indices {
  const int64_t* data = nullptr;
  int64_t size = 0;

  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + size; }
};

// Every number is one of `count`; `counted` says of what.
inline void check_within(const Indices& indices, const char* name, int64_t count, const char* counted) {
  const auto is_beyond = [&](int64_t index) { return index < 0 || index >= count; };
  const int64_t* beyond = std::find_if(indices.begin(), indices.end(), is_beyond);
  STD_TORCH_CHECK(beyond == indices.end(), name, ": expected numbers from 0 and below ", count, " (", counted,
                  "), got ", *beyond, " at position ", beyond - indices.begin());
}

// Stretches one after the other, none of negative length, that cover all `count` of what `counted` says.
inline void check_bounds(const Indices& bounds, const char* name, int64_t count, const char* counted) {
  STD_TORCH_CHECK(bounds.size > 0, name, ": expected a 0 and the end of each stretch, got no entry");
  const int64_t first = *bounds.begin(), last = *(bounds.end() - 1);
  STD_TORCH_CHECK(first == 0 && last == count, name, ": expected to run from 0 to ", count, " (", counted, "), got ",
                  first, " to ", last);
  const int64_t* fall = std::adjacent_find(bounds.begin(), bounds.end(), std::greater<>());
  STD_TORCH_CHECK(fall == bounds.end(), name, ": expected sorted bounds, got ", fall[0], " then ", fall[1],
                  " at position ", fall - bounds.begin());
}

}  // namespace montessori
