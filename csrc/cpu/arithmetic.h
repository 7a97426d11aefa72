// Scalar functions of the kernels, written so that loops over them vectorise. Their error bounds are in
// kernels/README.md. The anonymous namespace keeps each capability's copy its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace dskd {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// |c| up to which expm1(c) - c comes from its polynomial.
constexpr double kRadius = 1.0;
// Stands for minus infinity in logits.
constexpr double kNever = -1e4;

template <class To, class From>
inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

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
  return p * bits_of<float>((bits_of<int32_t>(shifted) + 127) << 23);
}

// The same below 1023, 0 from -1023 down: Taylor's series, cut below half an ulp.
inline double exp2_of(double x) {
  constexpr double kMagic = 0x1.8p52;
  x = x < -1023.0 ? -1023.0 : x;
  const double shifted = x + kMagic;
  const double f = (x - (shifted - kMagic)) * 0.6931471805599453;
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
  return p * bits_of<double>((bits_of<int64_t>(shifted) + 1023) << 52);
}

// expm1(c) - c for |c| <= kRadius: minimax polynomial times c^2, off by at most 1.2e-7 before rounding.
inline float expm1_tail(float c) {
  float p = 2.496081287972629e-05f;
  p = p * c + 0.00020325483637861907f;
  p = p * c + 0.0013891335111111403f;
  p = p * c + 0.008330930024385452f;
  p = p * c + 0.04166651517152786f;
  p = p * c + 0.16666695475578308f;
  p = p * c + 0.5f;
  return p * c * c;
}

// The same by Taylor's series, cut below half an ulp.
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

// u - log1p(u) for |u| <= 1/2. With r = u / (2 + u), log1p(u) = 2 atanh(r) and u - 2 r = r u.
inline double log1p_tail(double u) {
  const double r = u / (2 + u);
  const double square = r * r;
  double p = 0;
  for (int k = 35; k >= 3; k -= 2) p = p * square + 1.0 / k;
  return r * u - 2 * r * square * p;
}

// Nearest float with the last `bits` bits of its fraction 0, ties to even; NaN stays NaN.
inline float rounded(float x, int bits) {
  const uint32_t b = bits_of<uint32_t>(x);
  const uint32_t half = (1u << bits >> 1) - (bits != 0);
  const uint32_t r = (b + half + ((b >> bits) & (bits != 0))) & ~((1u << bits) - 1);
  return x == x ? bits_of<float>(r) : x;
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t b = bits_of<uint32_t>(x);
  return static_cast<uint16_t>(x == x ? (b + 0x7FFF + ((b >> 16) & 1)) >> 16 : 0x7FC0);
}

// To an operand of the products; of float32 ones, `dropped_bits` of the fraction are rounded off.
inline void convert(float x, int dropped_bits, float& out) { out = rounded(x, dropped_bits); }
inline void convert(float x, int, uint16_t& out) { out = to_bfloat16(x); }
inline void convert(double x, int, double& out) { out = x; }
inline void convert(double x, int dropped_bits, float& out) { out = rounded(static_cast<float>(x), dropped_bits); }
inline void convert(double x, int, uint16_t& out) { out = to_bfloat16(static_cast<float>(x)); }

inline float from_bfloat16(uint16_t x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }

inline float from_float16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7FFF) << 13;
  const uint32_t scaled = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
  const uint32_t infinite = magnitude | 0x7F800000;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  return bits_of<float>(sign | ((x & 0x7C00) == 0x7C00 ? infinite : scaled));
}

}  // namespace
}  // namespace dskd
