// Products of the prepared operands.
#pragma once

#include "positions.h"

namespace dskd {
namespace DSKD_CAPABILITY {

// C (m, n) = or += A (m, k) B (k, n), row by row in memory; n and the leading dimensions are multiples of kPad.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add);
void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
              int64_t ldc, bool add);

}  // namespace DSKD_CAPABILITY

namespace {

// What products of operands of a type are summed in.
template <class Element>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

inline void product(bool use_brgemm, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  if (use_brgemm) return brgemm(m, n, k, a, lda, b, ldb, c, ldc, add);
  DSKD_CAPABILITY::multiply(m, n, k, a, lda, b, ldb, c, ldc, add);
}

inline void product(bool, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                    double* c, int64_t ldc, bool add) {
  DSKD_CAPABILITY::multiply(m, n, k, a, lda, b, ldb, c, ldc, add);
}

inline void product(bool, int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
  brgemm(m, n, k, a, lda, b, ldb, c, ldc, add);
}

// (m, n) -> (n, m), by fours: `from` has rows, and `to` columns, up to the next multiple of four.
template <class Sum>
inline void turn(const Sum* from, int64_t from_stride, int64_t m, int64_t n, Sum* to, int64_t to_stride) {
  for (int64_t i = 0; i < m; i += 4)
    for (int64_t j = 0; j < n; j += 4)
      transpose<Sum>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride,
                     [](Sum x) { return x; });
}

}  // namespace
}  // namespace dskd
