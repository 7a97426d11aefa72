// The cosine distance map and its gradient, in float64. Compiled without fused multiply-adds, as prepare.cpp.
#include "positions.h"

namespace dskd {
namespace {

template <class Real>
void distances(const Cosine& call, int64_t image, int64_t block, char* scratch) {
  const int64_t channels = call.shape.channels, stride = row_stride(channels);
  const int64_t start = block * kRows, count = least(kRows, call.shape.positions - start);
  Real* student = reinterpret_cast<Real*>(scratch);  // (kRows, stride), as is the next
  Real* teacher = student + kRows * stride;
  load(call.student, Places(call.student, call.shape, image, start, count), count, channels, student, stride);
  load(call.teacher, Places(call.teacher, call.shape, image, start, count), count, channels, teacher, stride);
  for (int64_t p = 0; p < count; p++) {
    Real* x = student + p * stride;
    const Real* y = teacher + p * stride;
    double ss = 0, tt = 0, st = 0;
#pragma omp simd reduction(+ : ss, tt, st)
    for (int64_t c = 0; c < channels; c++) {
      const double s = x[c], t = y[c];
      ss += s * s;
      tt += t * t;
      st += s * t;
    }
    // One root of the product, and a division by it, are exact where the student is its teacher times a power of two.
    // float64 alone reaches where the product leaves its range.
    const double product = ss * tt;
    const bool is_in_range = product > 0x1p-900 && product < 0x1p900;
    const double root = is_in_range ? std::sqrt(product) : std::sqrt(ss) * std::sqrt(tt);
    const double cosine = root > 0 ? st / root : root * 0;
    const double scale = root > 0 ? 1 / root : root * 0;
    const double value = 1 - cosine < 0 ? 0.0 : 1 - cosine;
    const int64_t place = image * call.shape.positions + start + p;
    if (sizeof(Real) == sizeof(double)) {
      static_cast<double*>(call.distance)[place] = value;
    } else {
      static_cast<float*>(call.distance)[place] = static_cast<float>(value);
    }
    if (call.gradient.data == nullptr) continue;
    // (<s, t> s - t) / |student|, in place of the student.
    const double along = ss > 0 ? cosine / ss : ss * 0;
    for (int64_t c = 0; c < channels; c++) x[c] = static_cast<Real>(x[c] * along - y[c] * scale);
  }
  if (call.gradient.data == nullptr) return;
  store(student, stride, call.gradient, Places(call.gradient, call.shape, image, start, count), count, channels);
}

}  // namespace

namespace DSKD_CAPABILITY {

void cosine(const Cosine& call, int64_t image, int64_t block, char* scratch) {
  (has_float64(call) ? distances<double> : distances<float>)(call, image, block, scratch);
}

int64_t scratch_bytes(const Cosine& call) {
  const int64_t size = has_float64(call) ? sizeof(double) : sizeof(float);
  return 2 * kRows * row_stride(call.shape.channels) * size;
}

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
