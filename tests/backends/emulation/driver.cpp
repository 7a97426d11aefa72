// Runs calls that come by the standard input through the kernels on the emulation, and answers by the standard output.
// Each call is a header of 48 int64 and two temperatures, then the student's and the teacher's storage, and of affinity
// distillation the keys' storage, their centre and the masks. Memory has exactly the size that is needed, and holds NaN
// before it is written to.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "distillation.h"
#include "emulation.h"

namespace {

constexpr int kCapability = DSKD_TENSOR_CORES ? 80 : 75;

std::vector<void*> owned;

void* allocate(int64_t count, int64_t size) {
  const size_t bytes = static_cast<size_t>(count * size);
  void* memory = std::malloc(bytes ? bytes : 1);
  std::memset(memory, 0xFF, bytes);
  owned.push_back(memory);
  return memory;
}

bool read(std::FILE* file, void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }

void* read_new(std::FILE* file, int64_t bytes) {
  void* memory = allocate(bytes, 1);
  if (!read(file, memory, static_cast<size_t>(bytes))) std::exit(1);
  return memory;
}

// Affinity distillation of what `of` has, and of keys and masks that the header goes on with.
const char* distil(const dskd::Affinity& of, double teacher_temperature, const int64_t* at, std::FILE* input) {
  const auto next = [&at] { return *at++; };
  dskd::Keys keys{};
  keys.shape = {next(), of.shape.channels, next(), 1, 0};
  keys.shape.positions = keys.shape.height;
  const auto dtype = static_cast<dskd::Dtype>(next());
  const int64_t stride_b = next(), stride_k = next(), stride_c = next();
  keys.keys = {read_new(input, next()), dtype, stride_b, stride_c, stride_k, 0};
  keys.centre = static_cast<double*>(read_new(input, keys.shape.batch * keys.shape.channels * 8));
  const int64_t masks = next();
  dskd::Distillation call{};
  call.shape = of.shape;
  call.student = of.student;
  call.teacher = of.teacher;
  call.product = keys.product = of.product;
  call.dropped_bits = keys.dropped_bits = of.dropped_bits;
  call.kl = of.kl;
  call.gradient = of.gradient;
  call.count = keys.shape.positions;
  call.key_mask = masks > 0 ? static_cast<bool*>(read_new(input, masks * call.count)) : nullptr;
  call.key_mask_stride = masks > 1 ? call.count : 0;
  call.row_mask = next() ? static_cast<bool*>(read_new(input, call.shape.batch * call.shape.positions)) : nullptr;
  call.normalize = keys.normalize = next() != 0;
  const int multiprocessors = static_cast<int>(next());
  call.groups = keys.shape.batch > 1 || masks > 1 ? call.shape.batch : 1;
  call.rows = call.shape.batch * call.shape.positions / call.groups;
  call.student_temperature = of.temperature;
  call.student_temperature_at = of.temperature_at;
  call.teacher_temperature = teacher_temperature;
  call.teacher_temperature_at = of.temperature_at == nullptr ? nullptr : of.temperature_at + 1;
  dskd::take_scratch(call, multiprocessors, allocate);
  keys.k_pad = call.k_pad;
  keys.c_pad = call.c_pad;
  const int64_t size = (call.product < dskd::Product::tfloat32 ? 2 : 4) * call.c_pad;
  keys.packed = allocate(keys.shape.batch * call.k_pad, size);
  for (int64_t b = 0; b < keys.shape.batch; b++)
    std::memset(static_cast<char*>(keys.packed) + (b * call.k_pad + call.count) * size, 0,
                static_cast<size_t>((call.k_pad - call.count) * size));
  call.keys = keys.packed;
  call.keys_stride = keys.shape.batch > 1 ? call.k_pad * call.c_pad : 0;
  // In two parts, as a queue has them.
  const int64_t first = call.count / 3;
  const char* failed = nullptr;
  for (const auto& [start, count] : {std::pair(int64_t{0}, first), std::pair(first, call.count - first)}) {
    if (count == 0 || failed != nullptr) continue;
    dskd::Keys part = keys;
    const char* data = static_cast<const char*>(keys.keys.data);
    part.start = start;
    part.keys.data = const_cast<char*>(data) + start * stride_k * (dtype == dskd::Dtype::float32 ? 4 : 2);
    part.shape.height = part.shape.positions = count;
    failed = dskd::prepare_keys(part, nullptr);
  }
  if (failed == nullptr) failed = dskd::prepare_rows(call, nullptr);
  if (failed == nullptr) failed = dskd::distillation(call, kCapability, nullptr);
  if (failed == nullptr && call.gradient.data != nullptr) failed = dskd::project_rows(call, nullptr);
  return failed;
}

}  // namespace

int main() {
  std::FILE *input = stdin, *output = stdout;
  int64_t header[48];
  while (read(input, header, sizeof(header))) {
    double temperatures[2];
    if (!read(input, temperatures, sizeof(temperatures))) return 1;
    const int64_t* at = header;
    const auto next = [&at] { return *at++; };
    emulation::seed(static_cast<unsigned>(next()));
    const int64_t kind = next();
    const bool is_in_memory = next() != 0, with_gradient = next() != 0;
    dskd::Affinity call{};
    const char* precisions[] = {"fp32", "tf32", "bf16", "fp16"};
    if (!dskd::choose_product(call, precisions[next()], kCapability)) return 1;
    call.temperature = temperatures[0];
    if (is_in_memory) {
      double* in_memory = static_cast<double*>(allocate(2, sizeof(double)));
      for (int i = 0; i < 2; i++) in_memory[i] = temperatures[i];
      call.temperature_at = in_memory;
      call.temperature = temperatures[1] = 0;  // nobody is to look at them
    }
    dskd::Shape& shape = call.shape;
    shape.batch = next();
    shape.channels = next();
    shape.height = next();
    shape.width = next();
    shape.positions = shape.height * shape.width;
    for (dskd::Maps* maps : {&call.student, &call.teacher, &call.gradient}) {
      maps->dtype = static_cast<dskd::Dtype>(next());
      maps->stride_b = next();
      maps->stride_c = next();
      maps->stride_h = next();
      maps->stride_w = next();
    }
    for (dskd::Maps* maps : {&call.student, &call.teacher}) maps->data = read_new(input, next());
    const int64_t gradient_size = shape.batch * shape.channels * shape.positions;
    call.gradient.data = with_gradient ? allocate(gradient_size, 4) : nullptr;
    call.kl = static_cast<float*>(allocate(shape.batch * shape.positions, 4));
    const char* failed = nullptr;
    if (kind == 2) {
      failed = distil(call, temperatures[1], at, input);
    } else if (kind == 1) {
      dskd::take_scratch(call, allocate);
      failed = dskd::prepare(call, nullptr);
      if (failed == nullptr) failed = dskd::affinity(call, kCapability, nullptr);
      if (failed == nullptr && with_gradient) failed = dskd::project(call, nullptr);
    } else {
      float* weights = static_cast<float*>(allocate(shape.batch * shape.positions, 4));
      for (int64_t p = 0; p < shape.batch * shape.positions; p++) weights[p] = p % 2 == 0 ? 1.0f : 4.0f;
      failed = dskd::cosine({shape, call.student, call.teacher, call.kl, weights, call.gradient}, nullptr);
    }
    if (failed != nullptr) return 2;
    std::fwrite(call.kl, 4, static_cast<size_t>(shape.batch * shape.positions), output);
    if (with_gradient) std::fwrite(call.gradient.data, 4, static_cast<size_t>(gradient_size), output);
    if (std::fflush(output) != 0) return 1;
    for (void* memory : owned) std::free(memory);
    owned.clear();
  }
  return 0;
}
