// The cosine distance map and its gradient, in float64. Compiled without fused multiply-adds, as prepare.cpp.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "positions.h"

namespace dskd {
namespace {

// A position's distance, and its gradient as along * student - scale * teacher: (<s, t> s - t) / |student|.
struct Distance {
  double value, along, scale;

  Distance(double ss, double tt, double st) {
    // One root of the product, and a division by it, are exact where the student is its teacher times a power of two.
    // float64 alone reaches where the product leaves its range.
    const double product = ss * tt;
    const bool is_in_range = product > 0x1p-900 && product < 0x1p900;
    const double root = is_in_range ? std::sqrt(product) : std::sqrt(ss) * std::sqrt(tt);
    const double cosine = root > 0 ? st / root : root * 0;
    scale = root > 0 ? 1 / root : root * 0;
    value = 1 - cosine < 0 ? 0.0 : 1 - cosine;
    along = ss > 0 ? cosine / ss : ss * 0;
  }
};

template <class Real>
inline void put(const Cosine& call, int64_t place, double value) {
  if (sizeof(Real) == sizeof(double)) {
    static_cast<double*>(call.distance)[place] = value;
  } else {
    static_cast<float*>(call.distance)[place] = static_cast<float>(value);
  }
}

template <class Real>
inline double weight_at(const Cosine& call, int64_t place) {
  if (call.weights == nullptr) return 0;  // no gradient is wanted
  return sizeof(Real) == sizeof(double) ? static_cast<const double*>(call.weights)[place]
                                        : static_cast<const float*>(call.weights)[place];
}

// A channel of a block whose positions lie side by side: where it is, or converted.
template <class Real>
struct Channels {
  const Maps& maps;
  int64_t channels, offset, count;
  Real converted[kRows];

  const Real* at(int64_t channel) {
    const int64_t place = offset + channel * maps.stride_c;
    const int64_t ahead = least(kAhead, channels - 1 - channel) * maps.stride_c;
    switch (maps.dtype) {
      case Dtype::float32:
        return from(static_cast<const float*>(maps.data) + place, ahead, [](float x) { return static_cast<Real>(x); });
      case Dtype::float64:
        return from(static_cast<const double*>(maps.data) + place, ahead,
                    [](double x) { return static_cast<Real>(x); });
      case Dtype::bfloat16:
        return from(static_cast<const uint16_t*>(maps.data) + place, ahead,
                    [](uint16_t x) { return static_cast<Real>(from_bfloat16(x)); });
      case Dtype::float16:
        return from(static_cast<const uint16_t*>(maps.data) + place, ahead,
                    [](uint16_t x) { return static_cast<Real>(from_float16(x)); });
    }
    return nullptr;
  }

 private:
  template <class Stored, class Convert>
  const Real* from(const Stored* stored, int64_t ahead, Convert convert) {
    // The processor does not foresee strides as large as a channel.
    for (int64_t p = 0; p < count; p += 64 / static_cast<int64_t>(sizeof(Stored)))
      __builtin_prefetch(stored + ahead + p);
    if constexpr (std::is_same_v<Real, Stored>) return stored;
    for (int64_t p = 0; p < count; p++) converted[p] = convert(stored[p]);
    return converted;
  }

  static constexpr int64_t kAhead = 8;
};

template <class Stored>
void put_gradient(const Maps& maps, int64_t place, int64_t count, const double* values) {
  Stored* data = static_cast<Stored*>(maps.data) + place;
#if defined(__x86_64__)
  // Whole cache lines go past the caches, which would first read what is there, and lose the features for it.
  if (std::is_same_v<Stored, float> && reinterpret_cast<uintptr_t>(data) % 64 == 0 && count % 16 == 0) {
    float rounded[kRows];
    for (int64_t p = 0; p < count; p++) rounded[p] = static_cast<float>(values[p]);
    for (int64_t p = 0; p < count; p += 4) _mm_stream_ps(reinterpret_cast<float*>(data) + p, _mm_loadu_ps(rounded + p));
    return;
  }
#endif
  for (int64_t p = 0; p < count; p++) data[p] = static_cast<Stored>(values[p]);
}

// Of positions that lie side by side in all tensors: all of them together, channel after channel.
template <class Real>
void side_by_side(const Cosine& call, int64_t distance_at, int64_t count, int64_t student_at, int64_t teacher_at,
                  int64_t gradient_at) {
  Channels<Real> student{call.student, call.shape.channels, student_at, count, {}};
  Channels<Real> teacher{call.teacher, call.shape.channels, teacher_at, count, {}};
  double ss[kRows] = {}, tt[kRows] = {}, st[kRows] = {};
  for (int64_t c = 0; c < call.shape.channels; c++) {
    const Real *x = student.at(c), *y = teacher.at(c);
    for (int64_t p = 0; p < count; p++) {
      const double s = x[p], t = y[p];
      ss[p] += s * s;
      tt[p] += t * t;
      st[p] += s * t;
    }
  }
  double *along = ss, *scale = tt, *values = st;
  for (int64_t p = 0; p < count; p++) {
    const Distance distance(ss[p], tt[p], st[p]);
    const double weight = weight_at<Real>(call, distance_at + p);
    put<Real>(call, distance_at + p, distance.value);
    along[p] = weight * distance.along;
    scale[p] = weight * distance.scale;
  }
  if (call.gradient.data == nullptr) return;
  for (int64_t c = 0; c < call.shape.channels; c++) {
    const Real *x = student.at(c), *y = teacher.at(c);
    for (int64_t p = 0; p < count; p++) values[p] = x[p] * along[p] - y[p] * scale[p];
    const int64_t place = gradient_at + c * call.gradient.stride_c;
    if (is_float64(call.gradient)) {
      put_gradient<double>(call.gradient, place, count, values);
    } else {
      put_gradient<float>(call.gradient, place, count, values);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class Real>
void distances(const Cosine& call, int64_t image, int64_t block, char* scratch) {
  const int64_t channels = call.shape.channels, stride = row_stride(channels);
  const int64_t start = block * kRows, count = least(kRows, call.shape.positions - start);
  const Places of_student(call.student, call.shape, image, start, count);
  const Places of_teacher(call.teacher, call.shape, image, start, count);
  const Places of_gradient(call.gradient, call.shape, image, start, count);
  const int64_t distance_at = image * call.shape.positions + start;
  const bool is_channels_last = call.student.stride_c == 1 || call.teacher.stride_c == 1;
  const bool is_run = of_student.is_run && of_teacher.is_run && (call.gradient.data == nullptr || of_gradient.is_run);
  if (is_run && !is_channels_last)
    return side_by_side<Real>(call, distance_at, count, of_student.offset[0], of_teacher.offset[0],
                              of_gradient.offset[0]);
  Real* student = reinterpret_cast<Real*>(scratch);  // (kRows, stride), as is the next
  Real* teacher = student + kRows * stride;
  load(call.student, of_student, count, channels, student, stride);
  load(call.teacher, of_teacher, count, channels, teacher, stride);
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
    const Distance distance(ss, tt, st);
    put<Real>(call, distance_at + p, distance.value);
    if (call.gradient.data == nullptr) continue;
    const double weight = weight_at<Real>(call, distance_at + p);
    const double along = weight * distance.along, scale = weight * distance.scale;
    for (int64_t c = 0; c < channels; c++) x[c] = static_cast<Real>(x[c] * along - y[c] * scale);
  }
  if (call.gradient.data == nullptr) return;
  store(student, stride, call.gradient, of_gradient, count, channels);
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
