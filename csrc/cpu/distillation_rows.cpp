// Kernels over keys and rows of affinity_distillation: normalise, centre, subtract, round; and the normalisation's
// Jacobian. Compiled without fused multiply-adds, as prepare.cpp.
#include "distillation_rows.h"

#include "packing.h"

namespace dskd {
namespace {

template <class Real>
inline double square_of(const Real* x, int64_t channels) {
  return sum_of(channels, [=](int64_t c) { return static_cast<double>(x[c]) * x[c]; });
}

inline bool is_finite(double x) { return x - x == 0; }

template <class Real>
void sample_centre(const KeySource& source, int64_t image, double* centre, Real* buffer) {
  const int64_t channels = source.shape.channels, n = source.shape.positions, samples = least(n, kSample);
  const int64_t stride = row_stride(channels);
  int64_t used = 0;
  for (int64_t c = 0; c < channels; c++) centre[c] = 0;
  for (int64_t start = 0; start < samples; start += kRows) {
    const int64_t count = least(kRows, samples - start);
    int64_t positions[kRows];
    for (int64_t p = 0; p < count; p++) positions[p] = sampled_position(start + p, n);
    load(source.keys, Places(source.keys, source.shape, image, positions, count), count, channels, buffer, stride);
    for (int64_t p = 0; p < count; p++) {
      const Real* y = buffer + p * stride;
      const double squares = square_of(y, channels);
      // Such a key may be one that takes no part.
      if (!is_finite(squares)) continue;
      const double scale = source.normalize ? inverse_norm(squares) : 1.0;
      for (int64_t c = 0; c < channels; c++) centre[c] += y[c] * scale;
      used++;
    }
  }
  for (int64_t c = 0; c < channels && used > 0; c++) centre[c] /= static_cast<double>(used);
}

template <class Real, class Element>
void prepare_block(const KeySource& source, int64_t image, const int64_t* positions, int64_t count, int64_t padding,
                   int64_t start, const PackedKeys& to, char* scratch) {
  const int64_t channels = source.shape.channels, stride = row_stride(channels);
  Real* keys = reinterpret_cast<Real*>(scratch);  // (kRows, stride), as are
  Element* rounded = reinterpret_cast<Element*>(keys + kRows * stride);
  load(source.keys, Places(source.keys, source.shape, image, positions, count), count, channels, keys, stride);
  const double* centre = to.centre;
  for (int64_t p = 0; p < count + padding; p++) {
    const Real* y = keys + p * stride;
    Element* out = rounded + p * stride;
    const double squares = p < count ? square_of(y, channels) : 0;
    const bool is_used = p < count && is_finite(squares);
    const double scale = source.normalize ? inverse_norm(squares) : 1.0;
    if (is_used) {
      for (int64_t c = 0; c < channels; c++) convert(y[c] * scale - centre[c], source.dropped_bits, out[c]);
    }
    for (int64_t c = is_used ? channels : 0; c < source.c_pad; c++) out[c] = 0;
    to.bias[start + p] = p < count ? static_cast<float>(squares - squares) : kExcluded;
  }
  pack(rounded, stride, start, count + padding, source.n_pad, source.c_pad, to.columns);
  if constexpr (sizeof(Element) == 2) {
    if (to.rows != nullptr) pack_rows(rounded, stride, start, count + padding, source.c_pad, to.rows);
  }
}

template <class Real>
void prepare_block(const KeySource& source, int64_t image, const int64_t* positions, int64_t count, int64_t padding,
                   int64_t start, const PackedKeys& to, char* scratch) {
  switch (source.operand) {
    case Operand::float32:
      return prepare_block<Real, float>(source, image, positions, count, padding, start, to, scratch);
    case Operand::bfloat16:
      return prepare_block<Real, uint16_t>(source, image, positions, count, padding, start, to, scratch);
    case Operand::float64:
      return prepare_block<Real, double>(source, image, positions, count, padding, start, to, scratch);
  }
}

template <class Real, class Element>
void operands_of(const Distillation& call, const int64_t* rows, int64_t count, Real* buffer, Element* teacher,
                 Element* delta) {
  const int64_t channels = call.shape.channels, stride = row_stride(channels);
  Real *of_student = buffer, *of_teacher = buffer + kRows * stride;
  load(call.student, Places(call.student, call.shape, rows, count), count, channels, of_student, stride);
  load(call.teacher, Places(call.teacher, call.shape, rows, count), count, channels, of_teacher, stride);
  for (int64_t r = 0; r < count; r++) {
    const Real *x = of_student + r * stride, *y = of_teacher + r * stride;
    double s_scale = 1, t_scale = 1;
    if (call.normalize) {
      s_scale = inverse_norm(square_of(x, channels));
      t_scale = inverse_norm(square_of(y, channels));
    }
    // Where vectors and temperatures are equal, so are these, and the difference is exactly 0.
    s_scale /= call.student_temperature;
    t_scale /= call.teacher_temperature;
    Element *to_teacher = teacher + r * stride, *to_delta = delta + r * stride;
    for (int64_t c = 0; c < channels; c++) {
      const double t = y[c] * t_scale;
      convert(t * kLog2E, call.dropped_bits, to_teacher[c]);
      convert(x[c] * s_scale - t, call.dropped_bits, to_delta[c]);
    }
    for (int64_t c = channels; c < call.c_pad; c++) to_teacher[c] = to_delta[c] = 0;
  }
}

template <class Real, class Sum>
void project_through(const Distillation& call, const int64_t* rows, int64_t count, const double* scale, Real* buffer,
                     Sum* sum, int64_t stride) {
  const int64_t channels = call.shape.channels, in_stride = row_stride(channels);
  // 1/|student| beyond the largest number would turn a gradient of 0 into NaN.
  const double largest = is_float64(call.gradient) ? 1.7976931348623157e308 : static_cast<double>(kLargest);
  load(call.student, Places(call.student, call.shape, rows, count), count, channels, buffer, in_stride);
  for (int64_t r = 0; r < count; r++) {
    const Real* x = buffer + r * in_stride;
    Sum* g = sum + r * stride;
    const double factor = scale[r];
    if (!call.normalize) {
      for (int64_t c = 0; c < channels; c++) g[c] = static_cast<Sum>(g[c] * factor);
      continue;
    }
    const double inverse = inverse_norm(square_of(x, channels));
    const double along = factor * sum_of(channels, [=](int64_t c) { return g[c] * (x[c] * inverse); });
    const double bounded = inverse > largest ? largest : inverse;
    for (int64_t c = 0; c < channels; c++)
      g[c] = static_cast<Sum>((g[c] * factor - along * (x[c] * inverse)) * bounded);
  }
  store(sum, stride, call.gradient, Places(call.gradient, call.shape, rows, count), count, channels);
}

}  // namespace

namespace DSKD_CAPABILITY {

void centre_keys(const KeySource& source, int64_t image, double* centre, char* scratch) {
  if (is_float64(source.keys)) {
    sample_centre(source, image, centre, reinterpret_cast<double*>(scratch));
  } else {
    sample_centre(source, image, centre, reinterpret_cast<float*>(scratch));
  }
}

void prepare_keys(const KeySource& source, int64_t image, const int64_t* positions, int64_t count, int64_t padding,
                  int64_t start, const PackedKeys& to, char* scratch) {
  (is_float64(source.keys) ? prepare_block<double> : prepare_block<float>)(source, image, positions, count, padding,
                                                                           start, to, scratch);
}

int64_t scratch_bytes(const KeySource& source) {
  return 2 * kRows * row_stride(source.shape.channels) * static_cast<int64_t>(sizeof(double));
}

template <class Element>
void prepare_rows(const Distillation& call, const int64_t* rows, int64_t count, void* buffer, Element* teacher,
                  Element* delta) {
  if (has_float64(call)) {
    operands_of(call, rows, count, static_cast<double*>(buffer), teacher, delta);
  } else {
    operands_of(call, rows, count, static_cast<float*>(buffer), teacher, delta);
  }
}

template <class Sum>
void project(const Distillation& call, const int64_t* rows, int64_t count, const double* scale, void* buffer, Sum* sum,
             int64_t stride) {
  if (is_float64(call.student)) {
    project_through(call, rows, count, scale, static_cast<double*>(buffer), sum, stride);
  } else {
    project_through(call, rows, count, scale, static_cast<float*>(buffer), sum, stride);
  }
}

#define DSKD_ROWS(Element) \
  template void prepare_rows<Element>(const Distillation&, const int64_t*, int64_t, void*, Element*, Element*);
DSKD_ROWS(float)
DSKD_ROWS(uint16_t)
DSKD_ROWS(double)

#define DSKD_PROJECT(Sum) \
  template void project<Sum>(const Distillation&, const int64_t*, int64_t, const double*, void*, Sum*, int64_t);
DSKD_PROJECT(float)
DSKD_PROJECT(double)

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
