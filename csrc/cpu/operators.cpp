// The operators torch.ops.dskd_fast_cpu.*: what they are given, which kernels serve it, and the threads that run them.
#include "operators.h"

#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../common/tensors.h"
#include "kernels.h"

namespace {

using at::Tensor;
using dskd::Affinity;
using dskd::allocate;
using dskd::Cosine;
using dskd::Dtype;
using dskd::Keys;
using dskd::kKeys;
using dskd::kPad;
using dskd::kRows;
using dskd::maps_of;
using dskd::Memory;
using dskd::Operand;
using dskd::Parts;
using dskd::round_up;
using dskd::Shape;
using dskd::Workers;

struct Kernels {
  void (*centre)(const Affinity&, int64_t, const Keys&, char*);
  void (*prepare)(const Affinity&, int64_t, int64_t, const Keys&, char*);
  void (*affinity)(const Affinity&, int64_t, int64_t, const Keys&, char*);
  int64_t (*affinity_scratch)(const Affinity&);
  void (*cosine)(const Cosine&, int64_t, int64_t, char*);
  int64_t (*cosine_scratch)(const Cosine&);
};

const Kernels& kernels() {
#define DSKD_TABLE(capability)                                                                                        \
  {                                                                                                                   \
    dskd::capability::centre, dskd::capability::prepare, dskd::capability::affinity, dskd::capability::scratch_bytes, \
        dskd::capability::cosine, dskd::capability::scratch_bytes                                                     \
  }
  static const Kernels chosen = DSKD_CHOOSE_TABLE(Kernels);
  return chosen;
}

Shape shape_of(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.is_cpu() && teacher.is_cpu(), "the cpu backend takes tensors on the CPU");
  return dskd::shape_of(student, teacher);
}

// The keys of one image.
Keys lay_out(const Affinity& call, Parts& parts) {
  const int64_t size = call.operand == Operand::bfloat16 ? 2 : call.operand == Operand::float32 ? 4 : 8;
  const int64_t operand_bytes = call.n_pad * call.c_pad * size;
  Keys keys{};
  keys.mean = parts.take<double>(call.c_pad);
  keys.bias = parts.take<double>(call.n_pad);
  keys.bias32 = parts.take<float>(call.n_pad);
  keys.columns = parts.take<char>(operand_bytes);
  if (call.gradient.data != nullptr && call.operand == Operand::bfloat16) keys.rows = parts.take<char>(operand_bytes);
  return keys;
}

void contextual_affinity(const Tensor& student, const Tensor& teacher, double temperature, std::string precision,
                         const Tensor& kl, const std::optional<Tensor>& gradient) {
  Affinity call{};
  call.shape = shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.temperature = temperature;
  call.kl = kl.data_ptr();
  call.gradient = maps_of(gradient);
  if (call.shape.batch == 0 || call.shape.positions == 0) return;
  const bool is_wide = call.student.dtype == Dtype::float64 || call.teacher.dtype == Dtype::float64;
  dskd::choose_operand(call, precision, is_wide);
  call.use_brgemm = dskd::uses_brgemm(call.operand);
  call.n_pad = round_up(call.shape.positions, kPad);
  call.c_pad = round_up(call.shape.channels, kPad);
  call.panel = std::min(dskd::panel_keys(call.use_brgemm), round_up(call.n_pad, kKeys));

  // Several images at a time where the slabs of one are few: threads that have run out of them wait for the others.
  const int64_t slabs = (call.shape.positions + kRows - 1) / kRows;
  const int64_t busy = 32 * static_cast<int64_t>(at::get_num_threads());
  const int64_t group = std::min(call.shape.batch, std::max<int64_t>(1, busy / slabs));
  Parts measure{0};
  lay_out(call, measure);
  const Memory memory = allocate(group * measure.used);
  const auto keys_of = [&](int64_t member) {
    Parts parts{reinterpret_cast<uintptr_t>(memory.get() + member * measure.used)};
    return lay_out(call, parts);
  };

  const Kernels& table = kernels();
  const Workers workers(group * slabs, table.affinity_scratch(call));
  for (int64_t first = 0; first < call.shape.batch; first += group) {
    const int64_t images = std::min(group, call.shape.batch - first);
    workers.run(images, [&](int64_t i, char* part) { table.centre(call, first + i, keys_of(i), part); });
    workers.run(images * slabs, [&](int64_t i, char* part) {
      table.prepare(call, first + i / slabs, i % slabs, keys_of(i / slabs), part);
    });
    workers.run(images * slabs, [&](int64_t i, char* part) {
      table.affinity(call, first + i / slabs, i % slabs, keys_of(i / slabs), part);
      if (call.use_brgemm) dskd::brgemm_release(call.operand);
    });
  }
}

void cosine_distance(const Tensor& student, const Tensor& teacher, const Tensor& distance,
                     const std::optional<Tensor>& weights, const std::optional<Tensor>& gradient) {
  Cosine call{};
  call.shape = shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.distance = distance.data_ptr();
  call.weights = weights.has_value() ? weights->const_data_ptr() : nullptr;
  call.gradient = maps_of(gradient);
  const Kernels& table = kernels();
  const int64_t blocks = (call.shape.positions + kRows - 1) / kRows;
  const int64_t tasks = call.shape.batch * blocks;
  Workers(tasks, table.cosine_scratch(call)).run(tasks, [&](int64_t i, char* part) {
    table.cosine(call, i / blocks, i % blocks, part);
  });
}

}  // namespace

TORCH_LIBRARY(dskd_fast_cpu, m) {
  m.def(
      "contextual_affinity(Tensor student, Tensor teacher, float temperature, str precision, Tensor(a!) kl, "
      "Tensor(b!)? gradient) -> ()");
  m.def(
      "cosine_distance(Tensor student, Tensor teacher, Tensor(a!) distance, Tensor? weights, Tensor(b!)? gradient) -> "
      "()");
}

TORCH_LIBRARY_IMPL(dskd_fast_cpu, CPU, m) {
  m.impl("contextual_affinity", &contextual_affinity);
  m.impl("cosine_distance", &cosine_distance);
}
