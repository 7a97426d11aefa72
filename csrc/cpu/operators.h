// What the operators share: which kernels serve, how they multiply, and threads with their memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
#include <torch/csrc/stable/ops.h>
#else
#include <thread>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <vector>
#if defined(__linux__)
#include <unistd.h>
#endif

#include "../common/tensors.h"
#include "kernels.h"

namespace dskd {

// What kernels are compiled for.
enum class Capability { plain, avx2, avx512 };

// ATen's own choice, which ATEN_CPU_CAPABILITY may lower.
inline Capability capability() {
  static const Capability chosen = [] {
#if defined(__x86_64__)
    const std::string name = at::get_cpu_capability();
    if (name.rfind("AVX512", 0) == 0) return Capability::avx512;
    if (name == "AVX2") return Capability::avx2;
#endif
    return Capability::plain;
  }();
  return chosen;
}

// The table of that capability, from the macro DSKD_TABLE of its name.
#if defined(__x86_64__)
#define DSKD_CHOOSE_TABLE(Table)                                            \
  dskd::capability() == dskd::Capability::avx512 ? Table DSKD_TABLE(AVX512) \
  : dskd::capability() == dskd::Capability::avx2 ? Table DSKD_TABLE(AVX2)   \
                                                 : Table DSKD_TABLE(DEFAULT)
#else
#define DSKD_CHOOSE_TABLE(Table) Table DSKD_TABLE(DEFAULT)
#endif

// How a call multiplies.
template <class Call>
void choose_operand(Call& call, const std::string& precision, bool is_wide) {
  call.operand = Operand::float32;
  if (precision == "fp32") {
    if (is_wide) call.operand = Operand::float64;
  } else if (precision == "tf32" || precision == "fp16") {
    call.dropped_bits = 13;  // fp16 has tf32's digits; its range is float32's here
  } else {
    STD_TORCH_CHECK(precision == "bf16", "precision is none of fp32, tf32, bf16, fp16");
    if (capability() == Capability::avx512 && has_brgemm(Operand::bfloat16)) {
      call.operand = Operand::bfloat16;
    } else {
      call.dropped_bits = 16;
    }
  }
}

inline bool uses_brgemm(Operand operand) {
  return operand == Operand::bfloat16 || (capability() == Capability::avx512 && has_brgemm(operand));
}

// Keys whose weights fill half of a core's second-level cache; the rest is for operands and sums. Products of our own
// are slower: there the fourth one that several panels need costs more than to fetch 2 MiB from further away.
inline int64_t panel_keys(bool use_brgemm) {
  if (!use_brgemm) return 4096;
  int64_t cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  cache = cache <= 0 ? int64_t{1} << 20 : std::clamp(cache, int64_t{1} << 18, int64_t{1} << 21);
  return cache / 2 / (kRows * 2 * static_cast<int64_t>(sizeof(float))) / kKeys * kKeys;
}

struct Free {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], Free>;

inline Memory allocate(int64_t bytes) {
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

}  // namespace dskd
