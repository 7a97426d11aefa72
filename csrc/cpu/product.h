// Products of the prepared operands.
#pragma once

#include "kernels.h"

namespace dskd {
namespace DSKD_CAPABILITY {

// C (m, n) = or += A (m, k) B (k, n), row by row in memory; n and the leading dimensions are multiples of kPad.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add);
void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
              int64_t ldc, bool add);

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
