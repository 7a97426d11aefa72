// From PyTorch's tensors, at::Tensor or torch::stable::Tensor, to those of maps.h, for operators.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "maps.h"

namespace dskd {

template <class Tensor>
Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, "the operator takes float32, bfloat16, float16 and, on a CPU, float64 tensors");
  }
}

template <class Tensor>
Maps maps_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {tensor.data_ptr(), dtype_of(tensor), strides[0], strides[1], strides[2], strides[3]};
}

template <class Tensor>
Maps maps_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? maps_of(*tensor) : Maps{};
}

template <class Tensor>
Shape shape_of(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4, "the operator takes tensors (B, C, H, W)");
  const auto sizes = student.sizes();
  for (int64_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(sizes[i] == teacher.sizes()[i], "student and teacher must have the same shape");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[2] * sizes[3]};
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace dskd
