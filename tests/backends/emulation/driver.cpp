// Runs calls that it reads from a file through the kernels on the emulation, and writes what comes out:
//     driver INPUT OUTPUT
// Each call is a header of 32 int64 and a float64, then the student's and the teacher's storage. Memory has exactly the
// size that is needed, and holds NaN before it is written to.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

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

}  // namespace

int main(int, char** arguments) {
  std::FILE* input = std::fopen(arguments[1], "rb");
  std::FILE* output = std::fopen(arguments[2], "wb");
  if (input == nullptr || output == nullptr) return 1;
  int64_t header[32];
  while (read(input, header, sizeof(header))) {
    double temperature;
    if (!read(input, &temperature, sizeof(temperature))) return 1;
    const int64_t* at = header;
    const auto next = [&at] { return *at++; };
    emulation::seed(static_cast<unsigned>(next()));
    const bool is_affinity = next() != 0, is_in_memory = next() != 0, with_gradient = next() != 0;
    dskd::Affinity call{};
    const char* precisions[] = {"fp32", "tf32", "bf16", "fp16"};
    if (!dskd::choose_product(call, precisions[next()], kCapability)) return 1;
    call.temperature = temperature;
    if (is_in_memory) {
      double* at = static_cast<double*>(allocate(1, sizeof(double)));
      *at = temperature;
      call.temperature_at = at;
      call.temperature = 0;  // nobody is to look at it
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
    for (dskd::Maps* maps : {&call.student, &call.teacher}) {
      const int64_t bytes = next();
      maps->data = allocate(bytes, 1);
      if (!read(input, maps->data, static_cast<size_t>(bytes))) return 1;
    }
    const int64_t gradient_size = shape.batch * shape.channels * shape.positions;
    call.gradient.data = with_gradient ? allocate(gradient_size, 4) : nullptr;
    call.kl = static_cast<float*>(allocate(shape.batch * shape.positions, 4));
    const char* failed = nullptr;
    if (is_affinity) {
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
    for (void* memory : owned) std::free(memory);
    owned.clear();
  }
  return std::fclose(output) == 0 ? 0 : 1;
}
