// Kernels over positions: normalise, subtract, centre, round; and the normalisation's Jacobian.
//
// Compiled without fused multiply-adds: x/|x| - y/|y| must be exactly 0 for equal vectors, and a fused one would round
// one of the two only.
#include "prepare.h"

#include "packing.h"

namespace dskd {
namespace {

template <class Real>
void add_samples(const Affinity& call, int64_t image, double* mean, Real* buffer) {
  const int64_t channels = call.shape.channels, n = call.shape.positions, samples = least(n, kSample);
  const int64_t stride = row_stride(channels);
  for (int64_t start = 0; start < samples; start += kRows) {
    const int64_t count = least(kRows, samples - start);
    int64_t positions[kRows];
    for (int64_t p = 0; p < count; p++) positions[p] = sampled_position(start + p, n);
    const Places places(call.teacher, call.shape, image, positions, count);
    load(call.teacher, places, count, channels, buffer, stride);
    for (int64_t p = 0; p < count; p++) {
      const Real* y = buffer + p * stride;
      const double inverse =
          inverse_norm(sum_of(channels, [=](int64_t c) { return static_cast<double>(y[c]) * y[c]; }));
      const double share = inverse / static_cast<double>(samples);
      for (int64_t c = 0; c < channels; c++) mean[c] += y[c] * share;
    }
  }
}

// The same of an image of few positions, which are all samples, and lie side by side: in the order of memory.
template <class Real>
void add_channels(const Affinity& call, int64_t image, double* mean) {
  const int64_t channels = call.shape.channels, n = call.shape.positions;
  constexpr int64_t kStride = kSample + kPad;
  // Each channel read as the vector of a position.
  const Maps turned{call.teacher.data, call.teacher.dtype, call.teacher.stride_b, 1, 0, call.teacher.stride_c};
  const Shape shape{call.shape.batch, n, 1, channels, channels};
  alignas(64) Real buffer[kPad * kStride];
  const auto each = [&](auto visit) {
    for (int64_t start = 0; start < channels; start += kPad) {
      const int64_t count = least(kPad, channels - start);
      load(turned, Places(turned, shape, image, start, count), count, n, buffer, kStride);
      for (int64_t i = 0; i < count; i++) visit(start + i, buffer + i * kStride);
    }
  };
  double scale[kSample] = {};
  each([&](int64_t, const Real* y) {
    for (int64_t p = 0; p < n; p++) scale[p] += static_cast<double>(y[p]) * y[p];
  });
  for (int64_t p = 0; p < n; p++) scale[p] = inverse_norm(scale[p]) / static_cast<double>(n);
  each([&](int64_t c, const Real* y) { mean[c] = sum_of(n, [=, &scale](int64_t p) { return y[p] * scale[p]; }); });
}

template <class Real>
void find_centre(const Affinity& call, int64_t image, double* mean, Real* buffer) {
  for (int64_t c = 0; c < call.c_pad; c++) mean[c] = 0;
  if (call.shape.positions <= kSample && lies_side_by_side(call.teacher, call.shape)) {
    add_channels<Real>(call, image, mean);
  } else {
    add_samples(call, image, mean, buffer);
  }
}

template <class Real, class Element>
void prepare_block(const Affinity& call, int64_t image, int64_t block, const Keys& keys, char* scratch) {
  const int64_t channels = call.shape.channels, stride = row_stride(channels);
  const int64_t start = block * kRows, count = least(kRows, call.shape.positions - start);
  const int64_t padded = least(kRows, call.n_pad - start);
  Real* teacher = reinterpret_cast<Real*>(scratch);  // (kRows, stride), as are
  Element* rounded = reinterpret_cast<Element*>(teacher + kRows * stride);
  load(call.teacher, Places(call.teacher, call.shape, image, start, count), count, channels, teacher, stride);
  const double* mean = keys.mean;
  for (int64_t p = 0; p < padded; p++) {
    const Real* y = teacher + p * stride;
    Element* to = rounded + p * stride;
    double bias = kNever;
    if (p < count) {
      const double inverse =
          inverse_norm(sum_of(channels, [=](int64_t c) { return static_cast<double>(y[c]) * y[c]; }));
      bias = sum_of(channels,
                    [=](int64_t c) {
                      const double k = y[c] * inverse - mean[c];
                      convert(k, call.dropped_bits, to[c]);
                      return k * mean[c];
                    }) /
             call.temperature * kLog2E;
    }
    for (int64_t c = p < count ? channels : 0; c < stride; c++) to[c] = 0;
    keys.bias[start + p] = bias;
    keys.bias32[start + p] = static_cast<float>(bias);
  }
  pack(rounded, stride, start, padded, call.n_pad, call.c_pad, keys.columns);
  if constexpr (sizeof(Element) == 2) {
    if (keys.rows != nullptr) pack_rows(rounded, stride, start, padded, call.c_pad, keys.rows);
  }
}

template <class Real>
void prepare_block(const Affinity& call, int64_t image, int64_t block, const Keys& keys, char* scratch) {
  switch (call.operand) {
    case Operand::float32:
      return prepare_block<Real, float>(call, image, block, keys, scratch);
    case Operand::bfloat16:
      return prepare_block<Real, uint16_t>(call, image, block, keys, scratch);
    case Operand::float64:
      return prepare_block<Real, double>(call, image, block, keys, scratch);
  }
}

}  // namespace

namespace DSKD_CAPABILITY {

void centre(const Affinity& call, int64_t image, const Keys& keys, char* scratch) {
  if (is_float64(call.teacher)) {
    find_centre(call, image, keys.mean, reinterpret_cast<double*>(scratch));
  } else {
    find_centre(call, image, keys.mean, reinterpret_cast<float*>(scratch));
  }
}

void prepare(const Affinity& call, int64_t image, int64_t block, const Keys& keys, char* scratch) {
  if (is_float64(call.teacher)) {
    prepare_block<double>(call, image, block, keys, scratch);
  } else {
    prepare_block<float>(call, image, block, keys, scratch);
  }
}

template <class Real, class Element>
void prepare_rows(const Affinity& call, int64_t image, int64_t start, int64_t count, const double* mean,
                  Rows<Real>& rows, Element* keys, Element* delta) {
  const int64_t channels = call.shape.channels, stride = row_stride(channels);
  load(call.student, Places(call.student, call.shape, image, start, count), count, channels, rows.student, stride);
  load(call.teacher, Places(call.teacher, call.shape, image, start, count), count, channels, rows.teacher, stride);
  for (int64_t r = 0; r < count; r++) {
    const Real *x = rows.student + r * stride, *y = rows.teacher + r * stride;
    double ss = 0, tt = 0;
#pragma omp simd reduction(+ : ss, tt)
    for (int64_t c = 0; c < channels; c++) {
      ss += static_cast<double>(x[c]) * x[c];
      tt += static_cast<double>(y[c]) * y[c];
    }
    const double s_inverse = inverse_norm(ss), t_inverse = inverse_norm(tt);
    Element *to_keys = keys + r * stride, *to_delta = delta + r * stride;
    double tk = 0, dk = 0, dd = 0;
#pragma omp simd reduction(+ : tk, dk, dd)
    for (int64_t c = 0; c < channels; c++) {
      const double t = y[c] * t_inverse, k = t - mean[c], d = x[c] * s_inverse - t;
      tk += t * k;
      dk += d * k;
      dd += d * d;
      convert(k, call.dropped_bits, to_keys[c]);
      convert(d, call.dropped_bits, to_delta[c]);
    }
    for (int64_t c = channels; c < call.c_pad; c++) to_keys[c] = to_delta[c] = 0;
    const double own = dk / call.temperature;
    const bool is_shifted = call.temperature < kOwnShiftBelow;
    rows.s_inverse[r] = s_inverse;
    rows.t_inverse[r] = t_inverse;
    rows.own_logit[r] = tk / call.temperature * kLog2E;
    rows.c_shift[r] = is_shifted ? own : own * 0;
    rows.c_own[r] = is_shifted ? own * 0 : own;
    rows.c_bound[r] = 2 * std::sqrt(dd) / call.temperature;
  }
}

template <class Real, class Sum>
void project(const Affinity& call, int64_t image, int64_t start, int64_t count, const double* mean,
             const Rows<Real>& rows, const double* own_weight, const double* scale, Sum* sum, int64_t stride) {
  const int64_t channels = call.shape.channels, in_stride = row_stride(channels);
  // 1/|student| beyond the largest number would turn a gradient of 0 into NaN.
  const double largest = is_float64(call.gradient) ? 1.7976931348623157e308 : static_cast<double>(kLargest);
  for (int64_t r = 0; r < count; r++) {
    const Real *x = rows.student + r * in_stride, *y = rows.teacher + r * in_stride;
    const double s_inverse = rows.s_inverse[r], t_inverse = rows.t_inverse[r], own = own_weight[r], factor = scale[r];
    Sum* g = sum + r * stride;
    double along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t c = 0; c < channels; c++) {
      const double whole = (g[c] + own * (y[c] * t_inverse - mean[c])) * factor;
      along += whole * (x[c] * s_inverse);
      g[c] = static_cast<Sum>(whole);
    }
    const double inverse = s_inverse > largest ? largest : s_inverse;
    for (int64_t c = 0; c < channels; c++) g[c] = static_cast<Sum>((g[c] - along * (x[c] * s_inverse)) * inverse);
  }
  store(sum, stride, call.gradient, Places(call.gradient, call.shape, image, start, count), count, channels);
}

#define DSKD_ROWS(Real, Element)                                                                                    \
  template void prepare_rows<Real, Element>(const Affinity&, int64_t, int64_t, int64_t, const double*, Rows<Real>&, \
                                            Element*, Element*);
DSKD_ROWS(float, float)
DSKD_ROWS(float, uint16_t)
DSKD_ROWS(double, float)
DSKD_ROWS(double, uint16_t)
DSKD_ROWS(double, double)

#define DSKD_PROJECT(Real, Sum)                                                                                  \
  template void project<Real, Sum>(const Affinity&, int64_t, int64_t, int64_t, const double*, const Rows<Real>&, \
                                   const double*, const double*, Sum*, int64_t);
DSKD_PROJECT(float, float)
DSKD_PROJECT(double, float)
DSKD_PROJECT(double, double)

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
