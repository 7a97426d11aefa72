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

// Rows of B that are summed at a time: their strip is copied, so that it fills three quarters of a first-level cache of
// 32 KiB. Where it lies in B, its lines would share a few places of the cache, and be read again for every block.
constexpr int64_t kDeep = 24576 / (kBlockLines * kWidth);

template <class Real>
struct Line {
  typedef Real type __attribute__((vector_size(kWidth), aligned(sizeof(Real)), may_alias));
};

template <class Real, int kR, int kL>
inline void block(int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c, int64_t ldc, bool add) {
  using Vector = typename Line<Real>::type;
  constexpr int kPlaces = kWidth / sizeof(Real);
  Vector sum[kR][kL] = {};
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
    for (int l = 0; l < kL; l++) {
      // Of sums of parts, each rounding is of the part's own size: begun with C, a long sum would lose digits.
      Vector* to = reinterpret_cast<Vector*>(c + r * ldc + l * kPlaces);
      *to = add ? *to + sum[r][l] : sum[r][l];
    }
}

// By blocks of kR rows, what remains by smaller ones.
template <class Real, int kR, int kL>
inline void rows(int64_t m, int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c, int64_t ldc,
                 bool add) {
  int64_t r = 0;
  for (; r + kR <= m; r += kR) block<Real, kR, kL>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
  if constexpr (kR > 1) {
    if (r < m) rows<Real, kR / 2, kL>(m - r, k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add);
  }
}

// By strips of kL registers, what remains by narrower ones with more rows.
template <class Real, int kL>
inline void strips(int64_t m, int64_t n, int64_t k, const Real* a, int64_t lda, const Real* b, int64_t ldb, Real* c,
                   int64_t ldc, bool add) {
  constexpr int64_t kColumns = kL * kWidth / static_cast<int64_t>(sizeof(Real));
  alignas(64) Real packed[kDeep * kColumns];
  int64_t j = 0;
  for (; j + kColumns <= n; j += kColumns) {
    for (int64_t start = 0; start < k; start += kDeep) {
      const int64_t deep = start + kDeep < k ? kDeep : k - start;
      for (int64_t p = 0; p < deep; p++)
        for (int64_t l = 0; l < kColumns; l++) packed[p * kColumns + l] = b[(start + p) * ldb + j + l];
      rows<Real, kBlockRows * kBlockLines / kL, kL>(m, deep, a + start, lda, packed, kColumns, c + j, ldc,
                                                    add || start > 0);
    }
  }
  if constexpr (kL > 1) {
    if (j < n) strips<Real, kL - 1>(m, n - j, k, a, lda, b + j, ldb, c + j, ldc, add);
  }
}

}  // namespace

namespace DSKD_CAPABILITY {

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  strips<float, kBlockLines>(m, n, k, a, lda, b, ldb, c, ldc, add);
}

void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
              int64_t ldc, bool add) {
  strips<double, kBlockLines>(m, n, k, a, lda, b, ldb, c, ldc, add);
}

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
