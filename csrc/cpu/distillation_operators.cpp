// The operators of affinity_distillation: keys, prepared once and used often, and the map with its gradient.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "distillation.h"
#include "operators.h"

namespace {

using at::Tensor;
using dskd::allocate;
using dskd::choose_operand;
using dskd::Distillation;
using dskd::Dtype;
using dskd::Group;
using dskd::KeySource;
using dskd::kKeys;
using dskd::kPad;
using dskd::kRows;
using dskd::maps_of;
using dskd::Memory;
using dskd::Operand;
using dskd::PackedKeys;
using dskd::Partial;
using dskd::round_up;
using dskd::Workers;

struct Kernels {
  void (*centre_keys)(const KeySource&, int64_t, double*, char*);
  void (*prepare_keys)(const KeySource&, int64_t, const int64_t*, int64_t, int64_t, int64_t, const PackedKeys&, char*);
  int64_t (*keys_scratch)(const KeySource&);
  void (*distill)(const Distillation&, const Group&, int64_t, const int64_t*, int64_t, const Partial*, char*);
  void (*merge_splits)(const Distillation&, const Group&, int64_t, const Partial*, int64_t, char*);
  int64_t (*distillation_scratch)(const Distillation&);
  int64_t (*partial_bytes)(const Distillation&);
};

const Kernels& kernels() {
#define DSKD_TABLE(capability)                                                                      \
  {                                                                                                 \
    dskd::capability::centre_keys, dskd::capability::prepare_keys, dskd::capability::scratch_bytes, \
        dskd::capability::distill, dskd::capability::merge_splits, dskd::capability::scratch_bytes, \
        dskd::capability::partial_bytes                                                             \
  }
  static const Kernels chosen = DSKD_CHOOSE_TABLE(Kernels);
  return chosen;
}

// Prepared keys as the operators hand them about: columns, rows (empty if not wanted), bias and centre, each with the
// images first.
using Packed = std::vector<Tensor>;

at::ScalarType type_of(Operand operand) {
  return operand == Operand::float32 ? at::kFloat : operand == Operand::bfloat16 ? at::kBFloat16 : at::kDouble;
}

PackedKeys keys_of(const Packed& packed, int64_t image) {
  const auto at_image = [&](const Tensor& x) -> void* {
    return x.numel() == 0 ? nullptr : static_cast<char*>(x.data_ptr()) + image * x.stride(0) * x.element_size();
  };
  return {static_cast<double*>(at_image(packed[3])), static_cast<float*>(at_image(packed[2])), at_image(packed[0]),
          at_image(packed[1])};
}

KeySource source_of(const Tensor& keys, bool normalize, const std::string& precision, bool is_wide) {
  STD_TORCH_CHECK(keys.is_cpu() && keys.dim() == 3, "keys must be a tensor (B, K, C) on the CPU");
  KeySource source{};
  source.keys = {keys.data_ptr(), dskd::dtype_of(keys), keys.stride(0), keys.stride(2), keys.stride(1), 0};
  source.shape = {keys.size(0), keys.size(2), keys.size(1), 1, keys.size(1)};
  source.c_pad = round_up(keys.size(2), kPad);
  source.normalize = normalize;
  choose_operand(source, precision, is_wide);
  return source;
}

// Prepares image after image the keys at `positions(image)` from `start` on; `pads` the rest of the last kPad.
template <class Positions>
void prepare_all(const KeySource& source, const Packed& packed, int64_t start, bool pads, const Positions& positions) {
  // Blocks end where those of kRows from 0 on would, so that each lies in one tile.
  const int64_t first = start / kRows, blocks = (start + source.shape.positions + kRows - 1) / kRows - first;
  const int64_t tasks = source.shape.batch * blocks;
  const Kernels& table = kernels();
  Workers(tasks, table.keys_scratch(source)).run(tasks, [&](int64_t i, char* part) {
    const int64_t image = i / blocks, block = first + i % blocks;
    const std::vector<int64_t>& all = positions(image);
    const int64_t stop = start + static_cast<int64_t>(all.size());
    const int64_t begin = std::max(block * kRows, start), end = std::min((block + 1) * kRows, stop);
    if (begin >= end) return;
    const int64_t padding = pads && end == stop ? round_up(end, kPad) - end : 0;
    table.prepare_keys(source, image, all.data() + (begin - start), end - begin, padding, begin, keys_of(packed, image),
                       part);
  });
}

std::vector<int64_t> numbers_to(int64_t n) {
  std::vector<int64_t> numbers(static_cast<size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// Numbers of the entries of `mask` that are true.
std::vector<int64_t> chosen(const bool* mask, int64_t n) {
  std::vector<int64_t> numbers;
  numbers.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; i++)
    if (mask[i]) numbers.push_back(i);
  return numbers;
}

// `mask` (B, K), contiguous: keys that are left out, as if they had not been given.
Packed prepare_distillation_keys(const Tensor& keys, const std::optional<Tensor>& mask,
                                 const std::optional<Tensor>& centre, bool normalize, std::string precision,
                                 bool is_wide, bool with_rows) {
  KeySource source = source_of(keys, normalize, precision, is_wide || keys.scalar_type() == at::kDouble);
  const int64_t batch = keys.size(0), count = keys.size(1);
  source.n_pad = round_up(count, kPad);
  const auto options = keys.options();
  const auto operands = options.dtype(type_of(source.operand));
  const int64_t size = source.n_pad * source.c_pad;
  const bool has_rows = with_rows && source.operand == Operand::bfloat16;
  Packed packed = {
      at::empty({batch, size}, operands), at::empty({batch, has_rows ? size : 0}, operands),
      at::empty({batch, source.n_pad}, options.dtype(at::kFloat)),
      centre.has_value() ? centre->contiguous() : at::empty({batch, keys.size(2)}, options.dtype(at::kDouble))};
  if (batch == 0 || count == 0) return packed;
  const Kernels& table = kernels();
  if (!centre.has_value())
    Workers(batch, table.keys_scratch(source)).run(batch, [&](int64_t image, char* part) {
      table.centre_keys(source, image, keys_of(packed, image).centre, part);
    });
  std::vector<std::vector<int64_t>> positions;
  for (int64_t image = 0; mask.has_value() && image < batch; image++)
    positions.push_back(chosen(mask->const_data_ptr<bool>() + image * count, count));
  if (!mask.has_value()) positions.push_back(numbers_to(count));
  prepare_all(source, packed, 0, true, [&](int64_t image) -> const std::vector<int64_t>& {
    return positions[static_cast<size_t>(mask.has_value() ? image : 0)];
  });
  return packed;
}

void update_distillation_keys(at::TensorList packed, const Tensor& keys, int64_t start, bool normalize,
                              std::string precision) {
  const Packed parts = packed.vec();
  KeySource source = source_of(keys, normalize, precision, parts[0].scalar_type() == at::kDouble);
  STD_TORCH_CHECK(type_of(source.operand) == parts[0].scalar_type(), "the keys were prepared for another precision");
  STD_TORCH_CHECK(keys.size(0) == parts[3].size(0) && keys.size(2) == parts[3].size(1),
                  "the keys must have the images and channels of the prepared ones");
  source.n_pad = parts[2].size(1);
  STD_TORCH_CHECK(start >= 0 && start + keys.size(1) <= source.n_pad, "the keys' range ends beyond the prepared ones");
  const std::vector<int64_t> positions = numbers_to(keys.size(1));
  prepare_all(source, parts, start, false, [&](int64_t) -> const std::vector<int64_t>& { return positions; });
}

// Splits of the keys, where rows alone are too few to keep many threads busy; a matter of shapes, so that results do
// not depend on the machine.
int64_t splits_of(int64_t slabs, int64_t panels) {
  constexpr int64_t kTasks = 64, kFewestPanels = 4;
  return std::max<int64_t>(1, std::min(kTasks / slabs, panels / kFewestPanels));
}

void affinity_distillation(const Tensor& student, const Tensor& teacher, at::TensorList packed, int64_t key_count,
                           const std::optional<Tensor>& counts, double student_temperature, double teacher_temperature,
                           const std::optional<Tensor>& key_mask, const std::optional<Tensor>& row_mask, bool normalize,
                           std::string precision, const Tensor& kl, const std::optional<Tensor>& gradient) {
  Distillation call{};
  STD_TORCH_CHECK(student.is_cpu() && teacher.is_cpu(), "the cpu backend takes tensors on the CPU");
  call.shape = dskd::shape_of(student, teacher);
  call.student = maps_of(student);
  call.teacher = maps_of(teacher);
  call.gradient = maps_of(gradient);
  call.kl = kl.data_ptr();
  call.kl_dtype = dskd::dtype_of(kl);
  call.student_temperature = student_temperature;
  call.teacher_temperature = teacher_temperature;
  call.normalize = normalize;
  const Packed keys = packed.vec();
  choose_operand(call, precision, keys[0].scalar_type() == at::kDouble);
  STD_TORCH_CHECK(type_of(call.operand) == keys[0].scalar_type(), "the keys were prepared for another precision");
  STD_TORCH_CHECK(!gradient.has_value() || call.operand != Operand::bfloat16 || keys[1].numel() > 0 || key_count == 0,
                  "the keys were prepared without their rows");
  STD_TORCH_CHECK((keys[3].size(0) == 1 || keys[3].size(0) == call.shape.batch) &&
                      keys[3].size(1) == call.shape.channels && round_up(key_count, kPad) == keys[2].size(1),
                  "the prepared keys must fit the images, the channels and the number of keys");
  const int64_t size = keys[2].numel() * round_up(call.shape.channels, kPad);
  STD_TORCH_CHECK(keys[0].numel() == size && (keys[1].numel() == size || keys[1].numel() == 0),
                  "the prepared keys must be whole, as prepare_keys made them");
  call.use_brgemm = dskd::uses_brgemm(call.operand);
  call.n_pad = keys[2].size(1);
  call.c_pad = round_up(call.shape.channels, kPad);
  // Unit vectors' logits span 2/T.
  call.may_be_far = !normalize || student_temperature < 1.0 / 32;
  const bool is_masked = row_mask.has_value();
  if (is_masked || key_count == 0) {
    kl.zero_();
    if (gradient.has_value()) gradient->zero_();
  }
  if (call.shape.batch == 0 || call.shape.positions == 0 || key_count == 0) return;

  // Images that share their keys are one.
  const bool is_shared = keys[2].size(0) == 1 && (!key_mask.has_value() || key_mask->size(0) == 1);
  const int64_t groups = is_shared ? 1 : call.shape.batch, all = call.shape.batch * call.shape.positions;
  const int64_t rows_each = all / groups, slabs_each = (rows_each + kRows - 1) / kRows;
  const std::vector<int64_t> rows = is_masked ? chosen(row_mask->const_data_ptr<bool>(), all) : numbers_to(all);
  const int64_t panel = dskd::panel_keys(call.use_brgemm), width = round_up(key_count, kKeys);
  call.panel = width <= panel * 3 / 2 ? width : panel;  // one panel takes three products, two take four
  const int64_t splits = splits_of(groups * slabs_each, (width + call.panel - 1) / call.panel);
  call.keeps_teacher = gradient.has_value() && (splits > 1 || call.panel < width);

  std::vector<Group> found(static_cast<size_t>(groups));
  std::vector<std::vector<int64_t>> tiles(found.size());
  std::vector<std::vector<float>> biases(found.size());
  for (int64_t g = 0, row = 0; g < groups; g++) {
    Group& group = found[static_cast<size_t>(g)];
    group.keys = keys_of(keys, keys[2].size(0) == 1 ? 0 : g);
    group.key_count = counts.has_value() ? counts->const_data_ptr<int64_t>()[g] : key_count;
    group.rows = rows.data() + row;
    const int64_t first = row, end = (g + 1) * rows_each;
    while (row < static_cast<int64_t>(rows.size()) && rows[static_cast<size_t>(row)] < end) row++;
    group.row_count = row - first;
    const bool* mask = key_mask.has_value()
                           ? key_mask->const_data_ptr<bool>() + (key_mask->size(0) == 1 ? 0 : g * key_count)
                           : nullptr;
    bool is_finite = true;
    for (int64_t j = 0; j < group.key_count; j++) is_finite = is_finite && group.keys.bias[j] == 0;
    if (mask != nullptr || !is_finite) {
      std::vector<float>& bias = biases[static_cast<size_t>(g)];
      bias.assign(group.keys.bias, group.keys.bias + round_up(group.key_count, kPad));
      for (int64_t j = 0; mask != nullptr && j < group.key_count; j++)
        if (!mask[j]) bias[static_cast<size_t>(j)] = dskd::kExcluded;
      group.bias = bias.data();
    }
    for (int64_t tile = 0; tile < group.key_count; tile += kKeys) {
      const int64_t stop = std::min(tile + kKeys, group.key_count);
      if (mask == nullptr || std::any_of(mask + tile, mask + stop, [](bool x) { return x; }))
        tiles[static_cast<size_t>(g)].push_back(tile);
    }
  }

  const Kernels& table = kernels();
  const int64_t part_bytes = round_up(table.partial_bytes(call), 64),
                parts = splits > 1 ? groups * slabs_each * splits : 0;
  const Memory gradients = allocate(parts * part_bytes);
  std::vector<dskd::RowSums> sums(static_cast<size_t>(parts));
  std::vector<Partial> partials(sums.size());
  for (int64_t i = 0; i < parts; i++)
    partials[static_cast<size_t>(i)] = {&sums[static_cast<size_t>(i)], gradients.get() + i * part_bytes};
  const int64_t slabs = groups * slabs_each;
  const Workers workers(slabs * splits, table.distillation_scratch(call));
  // Tasks that follow each other read the same keys.
  workers.run(slabs * splits, [&](int64_t i, char* part) {
    const int64_t g = i / (slabs_each * splits), split = i / slabs_each % splits, slab = i % slabs_each;
    const Group& group = found[static_cast<size_t>(g)];
    if (slab * kRows >= group.row_count) return;
    const std::vector<int64_t>& those = tiles[static_cast<size_t>(g)];
    const int64_t count = static_cast<int64_t>(those.size());
    const int64_t begin = count * split / splits, end = count * (split + 1) / splits;
    const Partial* partial =
        parts > 0 ? &partials[static_cast<size_t>((g * slabs_each + slab) * splits + split)] : nullptr;
    table.distill(call, group, slab, those.data() + begin, end - begin, partial, part);
    if (call.use_brgemm) dskd::brgemm_release(call.operand);
  });
  if (parts == 0) return;
  workers.run(slabs, [&](int64_t i, char* part) {
    const Group& group = found[static_cast<size_t>(i / slabs_each)];
    const int64_t slab = i % slabs_each;
    if (slab * kRows >= group.row_count) return;
    table.merge_splits(call, group, slab, &partials[static_cast<size_t>(i * splits)], splits, part);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dskd_fast_cpu, m) {
  m.def(
      "prepare_distillation_keys(Tensor keys, Tensor? mask, Tensor? centre, bool normalize, str precision, "
      "bool is_wide, bool with_rows) -> Tensor[]");
  m.def("update_distillation_keys(Tensor(a!)[] packed, Tensor keys, int start, bool normalize, str precision) -> ()");
  m.def(
      "affinity_distillation(Tensor student, Tensor teacher, Tensor[] packed, int key_count, Tensor? counts, "
      "float student_temperature, float teacher_temperature, Tensor? key_mask, Tensor? row_mask, bool normalize, "
      "str precision, Tensor(a!) kl, Tensor(b!)? gradient) -> ()");
}

TORCH_LIBRARY_IMPL(dskd_fast_cpu, CPU, m) {
  m.impl("prepare_distillation_keys", &prepare_distillation_keys);
  m.impl("update_distillation_keys", &update_distillation_keys);
  m.impl("affinity_distillation", &affinity_distillation);
}
