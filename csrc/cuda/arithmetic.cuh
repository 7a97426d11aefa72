// Scalar functions that the kernels share. Their derivation and error bounds are in kernels/README.md.
#pragma once

#include "device.cuh"

namespace dskd {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// |c| up to which expm1(c) - c comes from its polynomial.
constexpr float kRadius = 1.0f;
// Stands for minus infinity in logits: its exp2 is 0, and 0 times it is 0 rather than NaN.
constexpr float kNever = -1e4f;
// fp16 operands: powers of two that bring unit vectors, and rows of differences and of weights, to the upper end of
// fp16's range.
constexpr float kHalfScale = 16384.0f;
constexpr float kHalfExponent = 14.0f;
constexpr float kLargest = 3.4028234663852886e38f;

// expm1(c) - c for |c| <= kRadius: minimax polynomial times c^2, off by at most 1.2e-7 before rounding.
DSKD_DEVICE float expm1_tail(float c) {
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
DSKD_DEVICE double log1p_tail(double u) {
  const double r = u / (2 + u), square = r * r;
  double p = 0;
  for (int k = 35; k >= 3; k -= 2) p = p * square + 1.0 / k;
  return r * u - 2 * r * square * p;
}

// Nearest float with the last `bits` bits of its fraction 0, ties to even; NaN stays NaN.
DSKD_DEVICE float rounded(float x, int bits) {
  if (bits == 0 || x != x) return x;
  const uint32_t b = bits_of(x), half = (1u << (bits - 1)) - 1;
  return float_of((b + half + ((b >> bits) & 1)) & ~((1u << bits) - 1));
}

DSKD_DEVICE uint16_t to_bfloat16(float x) {
  const uint32_t b = bits_of(x);
  return x == x ? static_cast<uint16_t>((b + 0x7FFF + ((b >> 16) & 1)) >> 16) : 0x7FC0;
}

DSKD_DEVICE float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; below fp16's normal numbers, too. What is too large becomes infinite.
DSKD_DEVICE uint16_t to_float16(float x) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000, size = b & 0x7FFFFFFF;
  if (size > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  // Adding 1/2 aligns a subnormal's last bit with the sum's.
  if (size < 0x38800000) return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3F000000));
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13));
}

DSKD_DEVICE float from_float16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7FFF) << 13, sign = static_cast<uint32_t>(x & 0x8000) << 16;
  if ((x & 0x7C00) == 0x7C00) return float_of(sign | magnitude | 0x7F800000);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

// An element of the operands: halves in 16 bits, float32 in 32.
template <Product kProduct>
struct Operand {
  using type = float;
  DSKD_DEVICE static float from(float x, int dropped_bits) {
    // The tensor cores would cut off what tf32 has no room for, always towards zero.
    return rounded(x, kProduct == Product::tfloat32 ? 13 : dropped_bits);
  }
  DSKD_DEVICE static float to(float x) { return x; }
};
template <>
struct Operand<Product::bfloat16> {
  using type = uint16_t;
  DSKD_DEVICE static uint16_t from(float x, int) { return to_bfloat16(x); }
  DSKD_DEVICE static float to(uint16_t x) { return from_bfloat16(x); }
};
template <>
struct Operand<Product::float16> {
  using type = uint16_t;
  DSKD_DEVICE static uint16_t from(float x, int) { return to_float16(x); }
  DSKD_DEVICE static float to(uint16_t x) { return from_float16(x); }
};

}  // namespace dskd
