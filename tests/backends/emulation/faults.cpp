// Small kernels, each with a fault that the emulation has to find, and a sound one:
//     faults sound | barrier | wait | bounds | divergence | exit | alignment | fragments
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulation.h"

namespace {

struct Call {
  const float* in;
  float* out;
  const char* fault;
};

bool is(const Call& call, const char* fault) { return std::strcmp(call.fault, fault) == 0; }

// out[i] = in[reversed i], through shared memory.
void reverse(const Call call) {
  DSKD_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) dskd::copy_async(shared + i + is(call, "alignment"), call.in + i);
  dskd::commit_copies();
  if (!is(call, "wait")) dskd::wait_for_copies<0>();
  if (is(call, "exit") && i == 7) return;
  if (is(call, "divergence") && i < 32) {
    __syncthreads();
  } else if (!is(call, "barrier")) {
    __syncthreads();
  }
  call.out[i + is(call, "bounds")] = shared[63 - i];
}

// Fragments filled by the inverse of what the emulation has: which lane and register hold an element.
void fragments(const Call call) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4] = {}, b[2] = {};
  float sum[4] = {};
  const auto bits = [](float x) { return dskd::bits_of(x) >> 16; };  // small whole numbers are exact in bfloat16
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 16; column++)
      if (lane == row % 8 * 4 + column % 8 / 2)
        a[row / 8 + column / 8 * 2] |= bits(call.in[row * 16 + column]) << (column % 2 * 16);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      if (lane == column * 4 + row % 8 / 2) b[row / 8] |= bits(call.in[256 + row * 8 + column]) << (row % 2 * 16);
  dskd::multiply<dskd::Product::bfloat16>(sum, a, b);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      if (lane == row % 8 * 4 + column / 2) call.out[row * 8 + column] = sum[row / 8 * 2 + column % 2];
}

}  // namespace

int main(int, char** arguments) {
  std::vector<float> in(512), out(128);
  for (size_t i = 0; i < in.size(); i++) in[i] = static_cast<float>(i * 7 % 13) - 6;
  const std::unique_ptr<float[]> exact(new float[64]);
  dskd::launch("fragments", fragments, dim3(1), 32, 16, nullptr, Call{in.data(), out.data(), ""});
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += in[row * 16 + k] * in[256 + k * 8 + column];
      if (out[row * 8 + column] != sum) return 4;
    }
  }
  if (std::strcmp(arguments[1], "fragments") == 0) return 0;
  // A larger block than the one before, whose threads go on as some of it.
  dskd::launch("reverse", reverse, dim3(1), 64, 64 * sizeof(float), nullptr,
               Call{in.data(), exact.get(), arguments[1]});
  for (int i = 0; i < 64; i++)
    if (exact[i] != in[63 - i]) return 4;  // NaN, where nothing was written yet
  return 0;
}
