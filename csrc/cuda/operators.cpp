// The operators torch.ops.dskd_fast_cuda.*: what they are given, scratch memory, and the kernels on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using dskd::Affinity;
using dskd::Dtype;
using dskd::Maps;
using dskd::Product;
using dskd::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Maps maps_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  const auto dtype = [&tensor] {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return Dtype::float32;
      case ScalarType::BFloat16:
        return Dtype::bfloat16;
      case ScalarType::Half:
        return Dtype::float16;
      default:
        STD_TORCH_CHECK(false, "the cuda backend takes float32, bfloat16 and float16 tensors");
    }
  }();
  return {tensor.data_ptr(), dtype, strides[0], strides[1], strides[2], strides[3]};
}

Maps maps_of(const std::optional<Tensor>& tensor) { return tensor.has_value() ? maps_of(*tensor) : Maps{}; }

Shape shape_of(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 4 && student.is_cuda() && teacher.is_cuda() &&
                      student.get_device_index() == teacher.get_device_index(),
                  "the cuda backend takes tensors (B, C, H, W) on one GPU");
  const auto sizes = student.sizes();
  for (int64_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(sizes[i] == teacher.sizes()[i], "student and teacher must have the same shape");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[2] * sizes[3]};
}

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check(const char* failed) {
  STD_TORCH_CHECK(failed == nullptr, "the kernel \"", failed == nullptr ? "" : failed, "\" could not be launched");
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// `capability`: of the tensors' device, 80 for 8.0.
void contextual_affinity(Tensor student, Tensor teacher, double temperature, std::string precision, int64_t capability,
                         Tensor kl, std::optional<Tensor> gradient) {
  Affinity call{};
  call.shape = shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.temperature = temperature;
  call.kl = static_cast<float*>(kl.data_ptr());
  call.gradient = maps_of(gradient);
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  const bool has_tensor_cores = capability >= 80;
  call.product = Product::plain;
  if (precision == "bf16") {
    call.product = has_tensor_cores ? Product::bfloat16 : Product::plain;
    call.dropped_bits = has_tensor_cores ? 0 : 16;
  } else if (precision == "fp16" || precision == "tf32") {
    // Both have 10 bits of fraction.
    const Product product = precision == "fp16" ? Product::float16 : Product::tfloat32;
    call.product = has_tensor_cores ? product : Product::plain;
    call.dropped_bits = has_tensor_cores ? 0 : 13;
  } else {
    STD_TORCH_CHECK(precision == "ieee", "precision is none of ieee, tf32, bf16, fp16");
  }
  call.n_pad = round_up(call.shape.positions, dskd::kTile);
  call.c_pad = round_up(call.shape.channels, dskd::kPad);
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  std::vector<Tensor> scratch;
  dskd::take_scratch(call, [&](int64_t count, int64_t size) {
    scratch.push_back(torch::stable::new_empty(student, std::vector<int64_t>{count * size}, ScalarType::Byte));
    return scratch.back().data_ptr();
  });
  void* stream = stream_of(student);
  check(dskd::prepare(call, stream));
  check(dskd::affinity(call, static_cast<int>(capability), stream));
  if (gradient.has_value()) check(dskd::project(call, stream));
}

void cosine_distance(Tensor student, Tensor teacher, Tensor distance, std::optional<Tensor> gradient) {
  const Shape shape = shape_of(student, teacher);
  if (shape.batch == 0 || shape.positions == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  check(dskd::cosine(
      {shape, maps_of(student), maps_of(teacher), static_cast<float*>(distance.data_ptr()), maps_of(gradient)},
      stream_of(student)));
}

}  // namespace

STABLE_TORCH_LIBRARY(dskd_fast_cuda, m) {
  m.def(
      "contextual_affinity(Tensor student, Tensor teacher, float temperature, str precision, int capability, "
      "Tensor(a!) kl, Tensor(b!)? gradient) -> ()");
  m.def("cosine_distance(Tensor student, Tensor teacher, Tensor(a!) distance, Tensor(b!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dskd_fast_cuda, CUDA, m) {
  m.impl("contextual_affinity", TORCH_BOX(&contextual_affinity));
  m.impl("cosine_distance", TORCH_BOX(&cosine_distance));
}
