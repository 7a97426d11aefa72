// What csrc/cuda/device.cuh offers of a GPU, for a host: so that the kernels' own sources run where there is none.
//
// Blocks run one after another. The threads of a block are fibers: each runs until it has to wait for others, and which
// runs next is drawn at random, so that a missing barrier shows. Barriers and warp operations wait for all that take
// part, and end the program where some never come. Shared memory has the size that was asked for and is full of NaN.
// Copies that are asynchronous land at once or as late as they may, at random. Matrix fragments are distributed as
// PTX's manual says (mma.m16n8k16 and m16n8k8).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fibers.h"
#include "launch.h"

#define DSKD_DEVICE inline
#define DSKD_SHARED(name) unsigned char* name = emulation::block().shared.get()
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

namespace emulation {

constexpr int kWarp = 32;

// A fragment's elements by PTX's manual, for lane = 4 g + t. Of halves (m16n8k16), register r of a holds
// (row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next), register r of b rows 2 t + 8 r and the next, column g. Of
// tf32 (m16n8k8), register r of a holds (row g + 8 (r % 2), column t + 4 (r / 2)), register r of b (row t + 4 r, column
// g). Of the sum, register r holds (row g + 8 (r / 2), column 2 t + r % 2).
inline float half_of(uint32_t word, int which, bool is_bfloat16) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
  if (is_bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25));
}

inline float tf32_of(uint32_t word) {
  word &= ~0x1FFFu;  // what the tensor cores do not look at
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// Of a row and a column of 8 that the emulation itself has made: unchecked, since it is most of the work.
__attribute__((noinline, no_sanitize("address", "undefined"))) inline float plus_product(float sum, const float* row,
                                                                                         const float* column, int n) {
  for (int k = 0; k < n; k++) sum += row[k] * column[8 * k];
  return sum;
}

inline void multiply_fragments(Fiber* lanes, dskd::Product product) {
  const bool is_half = product != dskd::Product::tfloat32, is_bfloat16 = product == dskd::Product::bfloat16;
  const int depth = is_half ? 16 : 8;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; r++) {
      const int row = g + 8 * (r % 2);
      if (is_half) {
        for (int i = 0; i < 2; i++) a[row][2 * t + 8 * (r / 2) + i] = half_of(lanes[lane].a[r], i, is_bfloat16);
      } else {
        a[row][t + 4 * (r / 2)] = tf32_of(lanes[lane].a[r]);
      }
    }
    for (int r = 0; r < 2; r++) {
      if (is_half) {
        for (int i = 0; i < 2; i++) b[2 * t + 8 * r + i][g] = half_of(lanes[lane].b[r], i, is_bfloat16);
      } else {
        b[t + 4 * r][g] = tf32_of(lanes[lane].b[r]);
      }
    }
  }
  for (int lane = 0; lane < kWarp; lane++) {
    for (int r = 0; r < 4; r++) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      lanes[lane].sum[r] = plus_product(lanes[lane].sum[r], a[row], &b[0][column], depth);
    }
  }
}

// Lets all threads of a barrier, or of a warp's operation, go on once they are all there.
inline bool release() {
  Block& b = block();
  bool any = false;
  size_t waiting = 0;
  for (const Fiber& fiber : b.fibers) waiting += fiber.state == Fiber::State::at_barrier;
  if (waiting == b.fibers.size()) {
    b.any_vote = false;
    for (Fiber& fiber : b.fibers) {
      if (fiber.place.line() != b.fibers[0].place.line() || fiber.place.column() != b.fibers[0].place.column())
        fail("threads wait at different barriers", fiber.place);
      b.any_vote = b.any_vote || fiber.vote;
      fiber.state = Fiber::State::ready;
    }
    any = true;
  }
  for (size_t first = 0; first < b.fibers.size(); first += kWarp) {
    Fiber* lanes = &b.fibers[first];
    bool all = true;
    for (int lane = 0; lane < kWarp; lane++) all = all && lanes[lane].state == Fiber::State::in_warp;
    if (!all) continue;
    for (int lane = 1; lane < kWarp; lane++) {
      if (lanes[lane].place.line() != lanes[0].place.line())
        fail("lanes are in different operations", lanes[lane].place);
    }
    if (lanes[0].sum != nullptr) {
      multiply_fragments(lanes, static_cast<dskd::Product>(lanes[0].offset));
    } else {
      float results[kWarp];
      for (int lane = 0; lane < kWarp; lane++) results[lane] = lanes[lane ^ lanes[lane].offset].value;
      for (int lane = 0; lane < kWarp; lane++) lanes[lane].value = results[lane];
    }
    for (int lane = 0; lane < kWarp; lane++) lanes[lane].state = Fiber::State::ready;
    any = true;
  }
  return any;
}

inline void run_block(int threads) {
  Block& b = block();
  b.fibers.resize(static_cast<size_t>(threads));
  for (Fiber& fiber : b.fibers) {
    fiber.state = Fiber::State::ready;
    fiber.open.clear();
    fiber.groups.clear();
    if (fiber.has_begun) continue;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> ready;
  while (true) {
    ready.clear();
    size_t done = 0;
    for (int i = 0; i < threads; i++) {
      if (b.fibers[i].state == Fiber::State::ready) ready.push_back(i);
      done += b.fibers[i].state == Fiber::State::done;
    }
    if (done == b.fibers.size()) return;
    if (ready.empty()) {
      for (const Fiber& fiber : b.fibers)
        if (fiber.state != Fiber::State::done) fail("a thread waits for others that never come", fiber.place);
    }
    std::shuffle(ready.begin(), ready.end(), b.order);
    for (const int i : ready) resume(i);
    release();
  }
}

// The order in which threads run, from now on.
inline void seed(unsigned value) { block().order.seed(value); }

inline bool barrier(bool vote, const std::source_location& place) {
  Fiber& fiber = block().fibers[block().current];
  fiber.vote = vote;
  fiber.place = place;
  fiber.state = Fiber::State::at_barrier;
  wait();
  return block().any_vote;
}

inline float exchange(float x, int offset, const std::source_location& place) {
  Fiber& fiber = block().fibers[block().current];
  fiber.value = x;
  fiber.offset = offset;
  fiber.sum = nullptr;
  fiber.place = place;
  fiber.state = Fiber::State::in_warp;
  wait();
  return fiber.value;
}

}  // namespace emulation

#define threadIdx (emulation::block().thread)
#define blockIdx (emulation::block().index)

inline void __syncthreads(const std::source_location& place = std::source_location::current()) {
  emulation::barrier(false, place);
}
inline int __syncthreads_or(int vote, const std::source_location& place = std::source_location::current()) {
  return emulation::barrier(vote != 0, place);
}
inline float __shfl_xor_sync(unsigned mask, float x, int offset,
                             const std::source_location& place = std::source_location::current()) {
  if (mask != 0xFFFFFFFFu) emulation::fail("only whole warps are emulated", place);
  return emulation::exchange(x, offset, place);
}
// In two words, as a GPU does it.
inline double __shfl_xor_sync(unsigned mask, double x, int offset,
                              const std::source_location& place = std::source_location::current()) {
  float words[2];
  std::memcpy(words, &x, 8);
  for (float& word : words) word = __shfl_xor_sync(mask, word, offset, place);
  std::memcpy(&x, words, 8);
  return x;
}

namespace dskd {

constexpr bool kHasTensorCores = DSKD_TENSOR_CORES;

template <class Kernel, class Call>
const char* launch(const char*, Kernel kernel, dim3 grid, int threads, int shared_bytes, void*, const Call& call) {
  emulation::Block& block = emulation::block();
  // The least that a GPU with such tensor cores, or without them, lets a block have. nvcc does not look at launches.
  if (shared_bytes > (kHasTensorCores ? 99 : 64) << 10)
    emulation::fail("a block asks for too much shared memory", std::source_location::current());
  for (unsigned y = 0; y < grid.y; y++) {
    for (unsigned x = 0; x < grid.x; x++) {
      block.index = dim3(x, y);
      block.shared.reset(new unsigned char[static_cast<size_t>(shared_bytes)]);
      std::memset(block.shared.get(), 0xFF, static_cast<size_t>(shared_bytes));
      block.kernel = [&] { kernel(call); };
      emulation::run_block(threads);
    }
  }
  return nullptr;
}

inline void copy_async(void* to, const void* from,
                       const std::source_location& place = std::source_location::current()) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulation::fail("a copy is not aligned to 16 bytes", place);
  if (!kHasTensorCores || emulation::block().order() % 2) {
    std::memcpy(to, from, 16);
    return;
  }
  emulation::block().fibers[emulation::block().current].open.push_back({to, from});
}

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::block().fibers[emulation::block().current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kPending>
void wait_for_copies() {
  auto& groups = emulation::block().fibers[emulation::block().current].groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

template <Product kProduct>
void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const std::source_location& place = std::source_location::current()) {
  emulation::Fiber& fiber = emulation::block().fibers[emulation::block().current];
  fiber.sum = sum;
  fiber.a = a;
  fiber.b = b;
  fiber.offset = static_cast<int>(kProduct);
  fiber.place = place;
  fiber.state = emulation::Fiber::State::in_warp;
  emulation::wait();
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float exp2_of(float x) { return std::exp2(x); }
inline float quotient_of(float x, float y) { return x / y; }

}  // namespace dskd
