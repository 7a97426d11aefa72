// The threads of a block as fibers, and the jumps between them and the scheduler, which emulation.h has.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_SANITIZED 1
#else
#define EMULATION_SANITIZED 0
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void fail(const char* what, const std::source_location& where) {
  std::fprintf(stderr, "emulation: %s at %s:%u\n", what, where.file_name(), static_cast<unsigned>(where.line()));
  std::_Exit(3);  // without destructors: this may be a fiber's stack
}

struct Copy {
  void* to;
  const void* from;
};

// A thread, and what it waits for.
struct Fiber {
  enum class State { ready, at_barrier, in_warp, done };

  ucontext_t context;  // where it begins
  void* place_to_go_on[5];
  bool has_begun = false;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::ready;
  std::source_location place;
  bool vote = false;
  // Of a warp operation: what this lane brings, and where it wants the result.
  float value = 0;
  int offset = 0;
  float* sum = nullptr;
  const uint32_t *a = nullptr, *b = nullptr;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Block {
  dim3 index, thread;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber> fibers;
  int current = 0;
  bool any_vote = false;
  void* scheduler[5];
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  std::function<void()> kernel;
  std::mt19937 order;
};

inline Block& block() {
  static Block it;
  return it;
}

// From one stack to the other and, once somebody jumps back, on. swapcontext would ask the kernel for the signals' mask
// each time, and AddressSanitizer would clear the stack's shadow before a jump, since it knows none that come back.
__attribute__((noinline, no_sanitize("address"))) inline void jump(void** from, void** to, const ucontext_t* begin) {
  if (__builtin_setjmp(from) != 0) return;
  if (begin != nullptr) setcontext(begin);
  __builtin_longjmp(to, 1);
}

// Back to the scheduler, until it goes on with this fiber, which a larger block may have moved in between.
inline void wait() {
  Block& b = block();
#if EMULATION_SANITIZED
  __sanitizer_start_switch_fiber(&b.fibers[b.current].fake_stack, b.scheduler_bottom, b.scheduler_size);
#endif
  jump(b.fibers[b.current].place_to_go_on, b.scheduler, nullptr);
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(b.fibers[b.current].fake_stack, &b.scheduler_bottom, &b.scheduler_size);
#endif
}

// What a fiber does: the same thread of one block after the other.
inline void enter() {
  Block& b = block();
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_bottom, &b.scheduler_size);
#endif
  while (true) {
    b.kernel();
    b.fibers[b.current].state = Fiber::State::done;
    wait();
  }
}

inline void resume(int index) {
  Block& b = block();
  Fiber& fiber = b.fibers[index];
  b.current = index;
  b.thread = dim3(static_cast<unsigned>(index));
#if EMULATION_SANITIZED
  __sanitizer_start_switch_fiber(&b.scheduler_stack, fiber.stack.get(), kStack);
#endif
  jump(b.scheduler, fiber.place_to_go_on, std::exchange(fiber.has_begun, true) ? nullptr : &fiber.context);
#if EMULATION_SANITIZED
  __sanitizer_finish_switch_fiber(b.scheduler_stack, nullptr, nullptr);
#endif
}

}  // namespace emulation
