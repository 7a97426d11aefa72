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
#include "distillation.h"

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

template <class Call>
void choose_product(Call& call, const std::string& precision, int64_t capability) {
  STD_TORCH_CHECK(dskd::choose_product(call, precision, static_cast<int>(capability)),
                  "precision is none of fp32, tf32, bf16, fp16");
}

// A temperature in the device's memory, null if there is none.
const double* at_device(const std::optional<Tensor>& temperature, const Tensor& student) {
  if (!temperature.has_value()) return nullptr;
  STD_TORCH_CHECK(temperature->is_cuda() && temperature->get_device_index() == student.get_device_index() &&
                      temperature->scalar_type() == ScalarType::Double && temperature->numel() == 1,
                  "the temperature must be one float64 on the tensors' device");
  return static_cast<const double*>(temperature->data_ptr());
}

// Memory on the device of `like` for `take_scratch`, as long as the tensors in `owned` live.
auto allocator(const Tensor& like, std::vector<Tensor>& owned) {
  return [&like, &owned](int64_t count, int64_t size) {
    owned.push_back(torch::stable::new_empty(like, std::vector<int64_t>{count * size}, ScalarType::Byte));
    return owned.back().data_ptr();
  };
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
  call.temperature_at = at_device(temperature_at, student);
  call.kl = static_cast<float*>(kl.data_ptr());
  call.gradient = maps_of(gradient);
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  choose_product(call, precision, capability);
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  std::vector<Tensor> scratch;
  dskd::take_scratch(call, allocator(student, scratch));
  void* stream = stream_of(student);
  check(dskd::prepare(call, stream));
  check(dskd::affinity(call, static_cast<int>(capability), stream));
  if (gradient.has_value()) check(dskd::project(call, stream));
}

// Whether `packed` is memory for operands of at least `count` keys.
template <class Call>
void check_packed(const Tensor& packed, const Call& call, int64_t count) {
  const auto sizes = packed.sizes();
  const int64_t size = call.product < dskd::Product::tfloat32 ? 2 : 4;
  STD_TORCH_CHECK(packed.is_cuda() && packed.dim() == 3 && packed.is_contiguous() && sizes[1] % dskd::kTile == 0 &&
                      sizes[1] >= count && sizes[2] == size * dskd::padded(call.shape.channels, dskd::kPad),
                  "the packed keys are those of another precision, or of other sizes");
}

// Keys (B', C, K, 1) and their centre (B', C), into rows `start` and further of `packed` (B', K_PAD, bytes).
void prepare_keys(Tensor keys, Tensor centre, bool normalize, std::string precision, int64_t capability, int64_t start,
                  Tensor packed) {
  dskd::Keys call{};
  call.shape = shape_of(keys, keys);
  call.keys = maps_of(keys);
  call.normalize = normalize;
  choose_product(call, precision, capability);
  check_packed(packed, call, start + call.shape.positions);
  STD_TORCH_CHECK(centre.is_cuda() && centre.is_contiguous() && centre.scalar_type() == ScalarType::Double &&
                      centre.numel() == call.shape.batch * call.shape.channels && packed.sizes()[0] == call.shape.batch,
                  "the centre must be float64 (B, C) on the keys' device");
  call.centre = static_cast<const double*>(centre.data_ptr());
  call.k_pad = packed.sizes()[1];
  call.c_pad = dskd::padded(call.shape.channels, dskd::kPad);
  call.start = start;
  call.packed = packed.data_ptr();
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  check(dskd::prepare_keys(call, stream_of(keys)));
}

const bool* mask_at(const std::optional<Tensor>& mask, int64_t row) {
  if (!mask.has_value()) return nullptr;
  STD_TORCH_CHECK(
      mask->is_cuda() && mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool && mask->numel() % row == 0,
      "masks must be bool, contiguous, and on the tensors' device");
  return static_cast<const bool*>(mask->data_ptr());
}

// `packed`: what `prepare_keys` made of `count` keys.
void affinity_distillation(Tensor student, Tensor teacher, Tensor packed, int64_t count, double student_temperature,
                           std::optional<Tensor> student_temperature_at, double teacher_temperature,
                           std::optional<Tensor> teacher_temperature_at, std::optional<Tensor> key_mask,
                           std::optional<Tensor> row_mask, bool normalize, std::string precision, int64_t capability,
                           int64_t multiprocessors, Tensor kl, std::optional<Tensor> gradient) {
  dskd::Distillation call{};
  call.shape = shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.student_temperature = student_temperature;
  call.student_temperature_at = at_device(student_temperature_at, student);
  call.teacher_temperature = teacher_temperature;
  call.teacher_temperature_at = at_device(teacher_temperature_at, student);
  call.normalize = normalize;
  call.kl = static_cast<float*>(kl.data_ptr());
  call.gradient = maps_of(gradient);
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  choose_product(call, precision, capability);
  check_packed(packed, call, count);
  const int64_t images = packed.sizes()[0], masks = key_mask.has_value() ? key_mask->sizes()[0] : 0;
  for (const int64_t of : {images, masks > 0 ? masks : 1})
    STD_TORCH_CHECK(of == 1 || of == call.shape.batch,
                    "keys and their mask must be of one image or of as many as rows");
  call.groups = images > 1 || masks > 1 ? call.shape.batch : 1;
  call.rows = call.shape.batch * call.shape.positions / call.groups;
  call.count = count;
  call.keys = packed.data_ptr();
  call.key_mask = mask_at(key_mask, count);
  call.key_mask_stride = masks > 1 ? count : 0;
  call.row_mask = mask_at(row_mask, call.shape.batch * call.shape.positions);
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  std::vector<Tensor> scratch;
  dskd::take_scratch(call, static_cast<int>(multiprocessors), allocator(student, scratch));
  call.keys_stride = images > 1 ? call.k_pad * call.c_pad : 0;
  void* stream = stream_of(student);
  check(dskd::prepare_rows(call, stream));
  check(dskd::distillation(call, static_cast<int>(capability), stream));
  if (gradient.has_value()) check(dskd::project_rows(call, stream));
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
  m.def(
      "prepare_keys(Tensor keys, Tensor centre, bool normalize, str precision, int capability, int start, "
      "Tensor(a!) packed) -> ()");
  m.def(
      "affinity_distillation(Tensor student, Tensor teacher, Tensor packed, int count, float student_temperature, "
      "Tensor? student_temperature_at, float teacher_temperature, Tensor? teacher_temperature_at, Tensor? key_mask, "
      "Tensor? row_mask, bool normalize, str precision, int capability, int multiprocessors, Tensor(a!) kl, "
      "Tensor(b!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dskd_fast_cuda, CUDA, m) {
  m.impl("contextual_affinity", TORCH_BOX(&contextual_affinity));
  m.impl("cosine_distance", TORCH_BOX(&cosine_distance));
  m.impl("prepare_keys", TORCH_BOX(&prepare_keys));
  m.impl("affinity_distillation", TORCH_BOX(&affinity_distillation));
}
