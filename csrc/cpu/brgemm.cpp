// oneDNN's small matrix products, through ATen. Compiled once: oneDNN knows the processor itself.
#include <ATen/native/CPUBlas.h>

#include "kernels.h"

namespace dskd {

bool has_brgemm(Operand operand) {
  if (operand == Operand::float64) return false;
#if defined(__x86_64__)
  // Without the instructions, oneDNN would widen bfloat16 operands again and again.
  if (operand == Operand::bfloat16 && !__builtin_cpu_supports("avx512bf16")) return false;
#else
  return false;
#endif
  // Whether ATen was built with them, and they have not been switched off, is known to a call alone.
  alignas(64) uint16_t halves[16 * 16] = {};
  alignas(64) float numbers[16 * 16] = {}, out[16 * 16];
  try {
    if (operand == Operand::bfloat16) {
      brgemm(16, 16, 16, halves, 16, halves, 16, out, 16, false);
    } else {
      brgemm(16, 16, 16, numbers, 16, numbers, 16, out, 16, false);
    }
    brgemm_release(operand);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void brgemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
            int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

void brgemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, float* c,
            int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

void brgemm_release(Operand operand) { at::native::cpublas::brgemm_release(operand == Operand::bfloat16); }

}  // namespace dskd
