// Scalar functions that the CPU's kernels have besides those of common/scalars.h, written so that loops over them
// vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#define DSKD_INLINE inline

namespace dskd {
namespace {

template <class To, class From>
inline To cast_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline uint32_t bits_of(float x) { return cast_bits<uint32_t>(x); }
inline float float_of(uint32_t x) { return cast_bits<float>(x); }

}  // namespace
}  // namespace dskd

#include "../common/scalars.h"

namespace dskd {
namespace {

// 2^x for x below 127, relative error 2e-8 before rounding; 0 from -127 down. The exponent's bits make a factor and are
// not added to the result's, so that NaN stays NaN.
inline float exp2_of(float x) {
  constexpr float kMagic = 0x1.8p23f;
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + kMagic;
  const float f = x - (shifted - kMagic);
  float p = 0.00015353361959569156f;
  p = p * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  return p * cast_bits<float>((cast_bits<int32_t>(shifted) + 127) << 23);
}

// The same below 1023, 0 from -1023 down: Taylor's series, cut below half an ulp.
inline double exp2_of(double x) {
  constexpr double kMagic = 0x1.8p52;
  x = x < -1023.0 ? -1023.0 : x;
  const double shifted = x + kMagic;
  const double f = (x - (shifted - kMagic)) * kLn2;
  double p = 1.0 / 6227020800.0;
  p = p * f + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  return p * cast_bits<double>((cast_bits<int64_t>(shifted) + 1023) << 52);
}

// expm1(c) - c for |c| <= kRadius by Taylor's series, cut below half an ulp.
inline double expm1_tail(double c) {
  double p = 1.0 / 121645100408832000.0;
  p = p * c + 1.0 / 6402373705728000.0;
  p = p * c + 1.0 / 355687428096000.0;
  p = p * c + 1.0 / 20922789888000.0;
  p = p * c + 1.0 / 1307674368000.0;
  p = p * c + 1.0 / 87178291200.0;
  p = p * c + 1.0 / 6227020800.0;
  p = p * c + 1.0 / 479001600.0;
  p = p * c + 1.0 / 39916800.0;
  p = p * c + 1.0 / 3628800.0;
  p = p * c + 1.0 / 362880.0;
  p = p * c + 1.0 / 40320.0;
  p = p * c + 1.0 / 5040.0;
  p = p * c + 1.0 / 720.0;
  p = p * c + 1.0 / 120.0;
  p = p * c + 1.0 / 24.0;
  p = p * c + 1.0 / 6.0;
  p = p * c + 0.5;
  return p * c * c;
}

// To an operand of the products; of float32 ones, `dropped_bits` of the fraction are rounded off.
inline void convert(float x, int dropped_bits, float& out) { out = rounded(x, dropped_bits); }
inline void convert(float x, int, uint16_t& out) { out = to_bfloat16(x); }
inline void convert(double x, int, double& out) { out = x; }
inline void convert(double x, int dropped_bits, float& out) { out = rounded(static_cast<float>(x), dropped_bits); }
inline void convert(double x, int, uint16_t& out) { out = to_bfloat16(static_cast<float>(x)); }

}  // namespace
}  // namespace dskd
