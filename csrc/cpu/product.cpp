// Matrix products for what oneDNN's kernels are not there for: processors without AVX-512, and float64.
#include "product.h"

namespace dskd {
namespace {

// A register's width in bytes, and how many rows and registers of C are summed at a time: as many as there are
// registers for, less those for a row of B and a number of A.
#if defined(__AVX512F__)
constexpr int kWidth = 64, kBlockRows = 4, kBlockLines = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 32, kBlockRows = 4, kBlockLines = 3;
#elif defined(__aarch64__)
constexpr int kWidth = 16, kBlockRows = 4, kBlockLines = 4;
#else
constexpr int kWidth = 16, kBlockRows = 3, kBlockLines = 4;
#endif

template <class Real>
struct Line {
  typedef Real type __attribute__((vector_size(kWidth), aligned(sizeof(Real)), may_alias));
};

template <class Real, int kR, int kL>
inline void block(int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c, int64_t ldc, bool add) {
  using Vector = typename Line<Real>::type;
  constexpr int kPlaces = kWidth / sizeof(Real);
  Vector sum[kR][kL];
#pragma GCC unroll 16
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 4
    for (int l = 0; l < kL; l++)
      sum[r][l] = add ? *reinterpret_cast<const Vector*>(c + r * ldc + l * kPlaces) : Vector{};
  for (int64_t p = 0; p < k; p++) {
    Vector line[kL];
#pragma GCC unroll 4
    for (int l = 0; l < kL; l++) line[l] = *reinterpret_cast<const Vector*>(b + p * ldb + l * kPlaces);
#pragma GCC unroll 16
    for (int r = 0; r < kR; r++)
#pragma GCC unroll 4
      for (int l = 0; l < kL; l++) sum[r][l] += a[r * lda + p] * line[l];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; r++)
#pragma GCC unroll 4
    for (int l = 0; l < kL; l++) *reinterpret_cast<Vector*>(c + r * ldc + l * kPlaces) = sum[r][l];
}

template <class Real, int kL>
inline void strip(int64_t m, int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c, int64_t ldc,
                  bool add) {
  int64_t r = 0;
  for (; r + kBlockRows <= m; r += kBlockRows)
    block<Real, kBlockRows, kL>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
  for (; r < m; r++) block<Real, 1, kL>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
}

template <class Real>
inline void product(int64_t m, int64_t n, int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c,
                    int64_t ldc, bool add) {
  constexpr int64_t kPlaces = kWidth / sizeof(Real);
  int64_t j = 0;
  for (; j + kBlockLines * kPlaces <= n; j += kBlockLines * kPlaces)
    strip<Real, kBlockLines>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += kPlaces) strip<Real, 1>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
}

}  // namespace

namespace DSKD_CAPABILITY {

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  product(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
              int64_t ldc, bool add) {
  product(m, n, k, a, lda, b, ldb, c, ldc, add);
}

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
