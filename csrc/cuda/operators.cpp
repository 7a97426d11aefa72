// The operators torch.ops.dskd_fast_cuda.*: what they are given, scratch memory, and the kernels on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/tensors.h"
#include "launch.h"

namespace {

using dskd::Affinity;
using dskd::Dtype;
using dskd::maps_of;
using dskd::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Shape shape_of(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.is_cuda() && teacher.is_cuda() && student.get_device_index() == teacher.get_device_index(),
                  "the cuda backend takes tensors on one GPU");
  for (const Tensor* tensor : {&student, &teacher})
    STD_TORCH_CHECK(dskd::dtype_of(*tensor) != Dtype::float64, "the cuda backend does not take float64");
  return dskd::shape_of(student, teacher);
}

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  // Not PyTorch's macro, which has another name in each version.
  const bool is_known = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(is_known, "PyTorch has no current stream for the tensors' GPU");
  return stream;
}

void check(const char* failed) {
  STD_TORCH_CHECK(failed == nullptr, "the kernel \"", failed == nullptr ? "" : failed, "\" could not be launched");
}

// `temperature_at`: in place of `temperature`, one in the device's memory. `capability`: of the tensors' device, 80 for
// 8.0.
void contextual_affinity(Tensor student, Tensor teacher, double temperature, std::optional<Tensor> temperature_at,
                         std::string precision, int64_t capability, Tensor kl, std::optional<Tensor> gradient) {
  Affinity call{};
  call.shape = shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.temperature = temperature;
  if (temperature_at.has_value()) {
    STD_TORCH_CHECK(temperature_at->is_cuda() && temperature_at->get_device_index() == student.get_device_index() &&
                        temperature_at->scalar_type() == ScalarType::Double && temperature_at->numel() == 1,
                    "the temperature must be one float64 on the tensors' device");
    call.temperature_at = static_cast<const double*>(temperature_at->data_ptr());
  }
  call.kl = static_cast<float*>(kl.data_ptr());
  call.gradient = maps_of(gradient);
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  STD_TORCH_CHECK(dskd::choose_product(call, precision, static_cast<int>(capability)),
                  "precision is none of fp32, tf32, bf16, fp16");
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

void cosine_distance(Tensor student, Tensor teacher, Tensor distance, std::optional<Tensor> weights,
                     std::optional<Tensor> gradient) {
  const Shape shape = shape_of(student, teacher);
  if (shape.batch == 0 || shape.positions == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const float* weights_at = weights.has_value() ? static_cast<const float*>(weights->data_ptr()) : nullptr;
  check(dskd::cosine({shape, maps_of(student), maps_of(teacher), static_cast<float*>(distance.data_ptr()), weights_at,
                      maps_of(gradient)},
                     stream_of(student)));
}

}  // namespace

STABLE_TORCH_LIBRARY(dskd_fast_cuda, m) {
  m.def(
      "contextual_affinity(Tensor student, Tensor teacher, float temperature, Tensor? temperature_at, str precision, "
      "int capability, Tensor(a!) kl, Tensor(b!)? gradient) -> ()");
  m.def(
      "cosine_distance(Tensor student, Tensor teacher, Tensor(a!) distance, Tensor? weights, Tensor(b!)? gradient) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(dskd_fast_cuda, CUDA, m) {
  m.impl("contextual_affinity", TORCH_BOX(&contextual_affinity));
  m.impl("cosine_distance", TORCH_BOX(&cosine_distance));
}
