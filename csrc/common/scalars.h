// Scalar functions of the kernels, for a processor and a GPU alike. Their derivation and error bounds are in
// kernels/README.md. Who includes this has defined DSKD_INLINE, and bits_of and float_of: a float's bits and back.
//
// The anonymous namespace keeps the copy of each CPU capability its own. Loops over these functions vectorise, so they
// select where they could branch.
#pragma once

#include <cstdint>

namespace dskd {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// |c| up to which expm1(c) - c comes from its polynomial.
constexpr float kRadius = 1.0f;
// Stands for minus infinity in logits: its exp2 is 0, and 0 times it is 0 rather than NaN.
constexpr float kNever = -1e4f;
// Below this temperature c is taken relative to its value for the row's own key, else relative to 0.
constexpr double kOwnShiftBelow = 0.15;
constexpr float kLargest = 3.4028234663852886e38f;
// The keys are centred with the mean over at most this many positions.
constexpr int64_t kSample = 256;

// The i-th of the least of n and kSample positions that are averaged: one in each of as many equal stretches of the
// image, at a place within it that changes from one to the next so that no period of the image is hit. Every position,
// where there are no more.
DSKD_INLINE int64_t sampled_position(int64_t i, int64_t n) {
  const int64_t samples = n < kSample ? n : kSample, within = n > kSample ? i * 40503 % 65536 : 0;
  return (i * 65536 + within) * n / (samples * 65536);
}

// expm1(c) - c for |c| <= kRadius: minimax polynomial times c^2, off by at most 1.2e-7 before rounding.
DSKD_INLINE float expm1_tail(float c) {
  float p = 2.496081287972629e-05f;
  p = p * c + 0.00020325483637861907f;
  p = p * c + 0.0013891335111111403f;
  p = p * c + 0.008330930024385452f;
  p = p * c + 0.04166651517152786f;
  p = p * c + 0.16666695475578308f;
  p = p * c + 0.5f;
  return p * c * c;
}

// u - log1p(u) for |u| <= 1/2. With r = u / (2 + u), log1p(u) = 2 atanh(r) and u - 2 r = r u.
DSKD_INLINE double log1p_tail(double u) {
  const double r = u / (2 + u), square = r * r;
  double p = 0;
  for (int k = 35; k >= 3; k -= 2) p = p * square + 1.0 / k;
  return r * u - 2 * r * square * p;
}

// Nearest float with the last `bits` bits of its fraction 0, ties to even; NaN stays NaN.
DSKD_INLINE float rounded(float x, int bits) {
  const uint32_t b = bits_of(x);
  const uint32_t half = (1u << bits >> 1) - (bits != 0);
  const uint32_t r = (b + half + ((b >> bits) & (bits != 0))) & ~((1u << bits) - 1);
  return x == x ? float_of(r) : x;
}

DSKD_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t b = bits_of(x);
  return static_cast<uint16_t>(x == x ? (b + 0x7FFF + ((b >> 16) & 1)) >> 16 : 0x7FC0);
}

DSKD_INLINE float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

DSKD_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7FFF) << 13;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t infinite = magnitude | 0x7F800000;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  return float_of(sign | ((x & 0x7C00) == 0x7C00 ? infinite : scaled));
}

}  // namespace
}  // namespace dskd
