// Reading and writing blocks of positions of (B, C, H, W) tensors of any strides.
#pragma once

#include <cmath>
#include <type_traits>

#include "arithmetic.h"
#include "kernels.h"

namespace dskd {
namespace {

// Rows of buffers are this far apart, so that no power of two maps them all to the same few cache lines.
constexpr int64_t row_stride(int64_t channels) { return (channels + kPad - 1) / kPad * kPad + kPad; }

inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

inline bool is_float64(const Maps& maps) { return maps.dtype == Dtype::float64; }

template <class Call>
inline bool has_float64(const Call& call) {
  return is_float64(call.student) || is_float64(call.teacher);
}

// Whether an image's positions lie one after the other, and its channels do not.
inline bool lies_side_by_side(const Maps& maps, const Shape& shape) {
  return maps.stride_c != 1 && maps.stride_w == 1 && maps.stride_h == shape.width;
}

struct Places {
  int64_t offset[kRows];
  bool is_run;  // one element after the other

  Places(const Maps& maps, const Shape& shape, int64_t image, int64_t start, int64_t count) {
    for (int64_t p = 0; p < count; p++) offset[p] = start + p;
    find(maps, shape, image, count);
  }

  Places(const Maps& maps, const Shape& shape, int64_t image, const int64_t* positions, int64_t count) {
    for (int64_t p = 0; p < count; p++) offset[p] = positions[p];
    find(maps, shape, image, count);
  }

  // Of positions counted over all images.
  Places(const Maps& maps, const Shape& shape, const int64_t* positions, int64_t count) {
    for (int64_t p = 0; p < count; p++) offset[p] = positions[p] % shape.positions;
    find(maps, shape, 0, count);
    for (int64_t p = 0; p < count; p++) {
      offset[p] += positions[p] / shape.positions * maps.stride_b;
      is_run = is_run && offset[p] == offset[0] + p;
    }
  }

 private:
  // Positions -> offsets.
  void find(const Maps& maps, const Shape& shape, int64_t image, int64_t count) {
    is_run = true;
    for (int64_t p = 0; p < count; p++) {
      const int64_t row = offset[p] / shape.width, column = offset[p] % shape.width;
      offset[p] = image * maps.stride_b + row * maps.stride_h + column * maps.stride_w;
      is_run = is_run && offset[p] == offset[0] + p;
    }
  }
};

#if defined(__clang__)
#define DSKD_SHUFFLE(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else
#define DSKD_SHUFFLE(x, y, a, b, c, d) __builtin_shuffle(x, y, typename Four<Real>::index{a, b, c, d})
#endif

template <class Real>
struct Four;
template <>
struct Four<float> {
  typedef float type __attribute__((vector_size(16)));
  typedef float anywhere __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t index __attribute__((vector_size(16)));
};
template <>
struct Four<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef double anywhere __attribute__((vector_size(32), aligned(8), may_alias));
  typedef int64_t index __attribute__((vector_size(32)));
};

// Four numbers side by side. Those that need no conversion move as one; the compiler would take them apart.
template <class Real, class Stored, class Convert>
inline typename Four<Real>::type load_four(const Stored* from, Convert convert) {
  if constexpr (std::is_same_v<Real, Stored>) {
    return *reinterpret_cast<const typename Four<Real>::anywhere*>(from);
  } else {
    return typename Four<Real>::type{convert(from[0]), convert(from[1]), convert(from[2]), convert(from[3])};
  }
}

template <class Real, class Stored>
inline void store_four(typename Four<Real>::type x, Stored* to) {
  if constexpr (std::is_same_v<Real, Stored>) {
    *reinterpret_cast<typename Four<Real>::anywhere*>(to) = x;
  } else {
    for (int j = 0; j < 4; j++) to[j] = static_cast<Stored>(x[j]);
  }
}

// to[j * to_stride + i] = convert(from[i * from_stride + j]) for i, j < 4.
template <class Real, class Stored, class Out, class Convert>
inline void transpose(const Stored* from, int64_t from_stride, Out* to, int64_t to_stride, Convert convert) {
  typename Four<Real>::type x[4], y[4];
  for (int i = 0; i < 4; i++) x[i] = load_four<Real>(from + i * from_stride, convert);
  for (int i = 0; i < 2; i++) {
    y[i] = DSKD_SHUFFLE(x[2 * i], x[2 * i + 1], 0, 4, 1, 5);
    y[i + 2] = DSKD_SHUFFLE(x[2 * i], x[2 * i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; i++) {
    store_four<Real>(DSKD_SHUFFLE(y[2 * i], y[2 * i + 1], 0, 1, 4, 5), to + 2 * i * to_stride);
    store_four<Real>(DSKD_SHUFFLE(y[2 * i], y[2 * i + 1], 2, 3, 6, 7), to + (2 * i + 1) * to_stride);
  }
}

// out (count, stride) = the block's vectors; `convert` turns what is stored into what is computed with.
template <class Real, class Stored, class Convert>
inline void gather(const Stored* data, const Places& places, int64_t count, int64_t channels, int64_t stride_c,
                   Real* out, int64_t stride, Convert convert) {
  if (stride_c == 1) {
    for (int64_t p = 0; p < count; p++) {
      const Stored* from = data + places.offset[p];
      Real* to = out + p * stride;
      for (int64_t c = 0; c < channels; c++) to[c] = convert(from[c]);
    }
    return;
  }
  // By fours where positions lie side by side, the rest one by one. A few channels at a time: their cache lines of all
  // rows of `out` stay at hand.
  const int64_t fours = places.is_run ? count / 4 * 4 : 0;
  for (int64_t start = 0; start < channels; start += kPad) {
    const int64_t end = least(start + kPad, channels), four_end = start + (end - start) / 4 * 4;
    // The processor does not foresee strides as large as a channel.
    for (int64_t c = end; c < least(end + kPad, channels); c++)
      for (int64_t p = 0; p < fours; p += 64 / static_cast<int64_t>(sizeof(Stored)))
        __builtin_prefetch(data + places.offset[p] + c * stride_c);
    for (int64_t p = 0; p < fours; p += 4)
      for (int64_t c = start; c < four_end; c += 4)
        transpose<Real>(data + places.offset[p] + c * stride_c, stride_c, out + p * stride + c, stride, convert);
    for (int64_t c = start; c < end; c++)
      for (int64_t p = c < four_end ? fours : 0; p < count; p++)
        out[p * stride + c] = convert(data[places.offset[p] + c * stride_c]);
  }
}

template <class Real>
inline void load(const Maps& maps, const Places& places, int64_t count, int64_t channels, Real* out, int64_t stride) {
  switch (maps.dtype) {
    case Dtype::float32:
      return gather(static_cast<const float*>(maps.data), places, count, channels, maps.stride_c, out, stride,
                    [](float x) { return static_cast<Real>(x); });
    case Dtype::float64:
      return gather(static_cast<const double*>(maps.data), places, count, channels, maps.stride_c, out, stride,
                    [](double x) { return static_cast<Real>(x); });
    case Dtype::bfloat16:
      return gather(static_cast<const uint16_t*>(maps.data), places, count, channels, maps.stride_c, out, stride,
                    [](uint16_t x) { return static_cast<Real>(from_bfloat16(x)); });
    case Dtype::float16:
      return gather(static_cast<const uint16_t*>(maps.data), places, count, channels, maps.stride_c, out, stride,
                    [](uint16_t x) { return static_cast<Real>(from_float16(x)); });
  }
}

// The reverse.
template <class Stored, class Real>
inline void scatter(const Real* in, int64_t stride, const Maps& maps, const Places& places, int64_t count,
                    int64_t channels) {
  Stored* data = static_cast<Stored*>(maps.data);
  if (maps.stride_c == 1) {
    for (int64_t p = 0; p < count; p++)
      for (int64_t c = 0; c < channels; c++) data[places.offset[p] + c] = static_cast<Stored>(in[p * stride + c]);
    return;
  }
  const int64_t fours = places.is_run ? count / 4 * 4 : 0;
  for (int64_t start = 0; start < channels; start += kPad) {
    const int64_t end = least(start + kPad, channels), four_end = start + (end - start) / 4 * 4;
    for (int64_t c = start; c < four_end; c += 4)
      for (int64_t p = 0; p < fours; p += 4)
        transpose<Real>(in + p * stride + c, stride, data + places.offset[p] + c * maps.stride_c, maps.stride_c,
                        [](Real x) { return x; });
    for (int64_t c = start; c < end; c++)
      for (int64_t p = c < four_end ? fours : 0; p < count; p++)
        data[places.offset[p] + c * maps.stride_c] = static_cast<Stored>(in[p * stride + c]);
  }
}

// Writes (count, stride) to a float32 or float64 tensor.
template <class Real>
inline void store(const Real* in, int64_t stride, const Maps& maps, const Places& places, int64_t count,
                  int64_t channels) {
  if (is_float64(maps)) {
    scatter<double>(in, stride, maps, places, count, channels);
  } else {
    scatter<float>(in, stride, maps, places, count, channels);
  }
}

// A sum in as many parts as a register has places: the compiler may not reorder sums by itself.
template <class Term>
inline double sum_of(int64_t count, Term term) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; c++) sum += term(c);
  return sum;
}

// 1/|x| from |x|^2; 0 for a vector of zeros, which has no direction.
inline double inverse_norm(double squares) { return squares > 0 ? 1 / std::sqrt(squares) : squares * 0; }

}  // namespace
}  // namespace dskd
