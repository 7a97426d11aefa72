// The operators torch.ops.dskd_fast_cpu.*: what they are given, which kernels serve it, and the threads that run them.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>
#include <torch/version.h>
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
#include <torch/csrc/stable/ops.h>
#else
#include <thread>
#include <vector>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#if defined(__linux__)
#include <unistd.h>
#endif

#include "../common/tensors.h"
#include "kernels.h"

namespace {

using at::Tensor;
using dskd::Affinity;
using dskd::Cosine;
using dskd::Dtype;
using dskd::Keys;
using dskd::kKeys;
using dskd::kPad;
using dskd::kRows;
using dskd::maps_of;
using dskd::Operand;
using dskd::Parts;
using dskd::round_up;
using dskd::Shape;

struct Kernels {
  void (*centre)(const Affinity&, int64_t, const Keys&, char*);
  void (*prepare)(const Affinity&, int64_t, int64_t, const Keys&, char*);
  void (*affinity)(const Affinity&, int64_t, int64_t, const Keys&, char*);
  int64_t (*affinity_scratch)(const Affinity&);
  void (*cosine)(const Cosine&, int64_t, int64_t, char*);
  int64_t (*cosine_scratch)(const Cosine&);
  bool use_brgemm;
};

// Those of ATen's own choice, which ATEN_CPU_CAPABILITY may lower.
const Kernels& kernels() {
#define DSKD_TABLE(capability, use_brgemm)                                                                            \
  {                                                                                                                   \
    dskd::capability::centre, dskd::capability::prepare, dskd::capability::affinity, dskd::capability::scratch_bytes, \
        dskd::capability::cosine, dskd::capability::scratch_bytes, use_brgemm                                         \
  }
  static const Kernels chosen = []() -> Kernels {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return DSKD_TABLE(AVX512, true);
    if (capability == "AVX2") return DSKD_TABLE(AVX2, false);
#endif
    return DSKD_TABLE(DEFAULT, false);
  }();
  return chosen;
}

struct Free {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], Free>;

Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

// Runs `work` in n threads: PyTorch's own, which at::parallel_for only finds with its OpenMP, or before 2.10 new ones.
template <class Work>
void in_threads(int64_t n, const Work& work) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  torch::stable::parallel_for(0, n, 1, [&](int64_t, int64_t) { work(); });
#else
  std::vector<std::thread> others;
  for (int64_t i = 1; i < n; i++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
#endif
}

// Threads with a piece of memory each.
class Workers {
 public:
  Workers(int64_t tasks, int64_t scratch_bytes)
      : threads_(std::min<int64_t>(tasks, at::get_num_threads())),
        scratch_bytes_(round_up(scratch_bytes, 64)),
        memory_(allocate(threads_ * scratch_bytes_)) {}

  // Runs task(i, scratch) for i below `tasks`, each thread taking the next that nobody has taken: cores that other work
  // keeps busy then hold nobody up. Tasks share nothing, so who runs which changes nothing.
  template <class Task>
  void run(int64_t tasks, const Task& task) const {
    std::atomic<int64_t> next{0}, workers{0};
    in_threads(std::min(tasks, threads_), [&] {
      char* scratch = memory_.get() + workers++ * scratch_bytes_;
      for (int64_t i = next++; i < tasks; i = next++) task(i, scratch);
    });
  }

 private:
  int64_t threads_, scratch_bytes_;
  Memory memory_;
};

Shape shape_of(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.is_cpu() && teacher.is_cpu(), "the cpu backend takes tensors on the CPU");
  return dskd::shape_of(student, teacher);
}

// Keys whose weights fill half of a core's second-level cache; the rest is for operands and sums. Products of our own
// are slower: there the fourth one that several panels need costs more than to fetch 2 MiB from further away.
int64_t panel_keys(bool use_brgemm) {
  if (!use_brgemm) return 4096;
  int64_t cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  cache = cache <= 0 ? int64_t{1} << 20 : std::clamp(cache, int64_t{1} << 18, int64_t{1} << 21);
  return cache / 2 / (kRows * 2 * static_cast<int64_t>(sizeof(float))) / kKeys * kKeys;
}

// How a call multiplies.
void choose_operand(Affinity& call, const std::string& precision, bool is_wide) {
  call.operand = Operand::float32;
  if (precision == "fp32") {
    if (is_wide) call.operand = Operand::float64;
  } else if (precision == "tf32" || precision == "fp16") {
    call.dropped_bits = 13;  // fp16 has tf32's digits; its range is float32's here
  } else {
    STD_TORCH_CHECK(precision == "bf16", "precision is none of fp32, tf32, bf16, fp16");
    if (kernels().use_brgemm && dskd::has_brgemm(Operand::bfloat16)) {
      call.operand = Operand::bfloat16;
    } else {
      call.dropped_bits = 16;
    }
  }
  call.use_brgemm = call.operand == Operand::bfloat16 || (kernels().use_brgemm && dskd::has_brgemm(call.operand));
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
  choose_operand(call, precision, is_wide);
  call.n_pad = round_up(call.shape.positions, kPad);
  call.c_pad = round_up(call.shape.channels, kPad);
  call.panel = std::min(panel_keys(call.use_brgemm), round_up(call.n_pad, kKeys));

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
