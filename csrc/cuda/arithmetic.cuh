// Scalar functions that the CUDA kernels have besides those of common/scalars.h.
#pragma once

#include <type_traits>

#include "device.cuh"

#define DSKD_INLINE DSKD_DEVICE
#include "../common/scalars.h"

namespace dskd {

// fp16 operands: powers of two that bring unit vectors, and rows of differences and of weights, to the upper end of
// fp16's range.
constexpr float kHalfScale = 16384.0f;
constexpr float kHalfExponent = 14.0f;

// NaN where it is in the device's memory and out of range: the host, which does not know it, cannot refuse it. A
// float32's rounding of the ends, 0.01 and 100, is inside.
DSKD_DEVICE double temperature_of(const Affinity& call) {
  if (call.temperature_at == nullptr) return call.temperature;
  const double temperature = *call.temperature_at;
  return temperature >= 0.00999999 && temperature <= 100.0001 ? temperature : float_of(0x7FC00000);
}

// To nearest, ties to even; below fp16's normal numbers, too. What is too large becomes infinite.
DSKD_DEVICE uint16_t to_float16(float x) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000, size = b & 0x7FFFFFFF;
  if (size > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  // Adding 1/2 aligns a subnormal's last bit with the sum's.
  if (size < 0x38800000) return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3F000000));
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13));
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

// What `launch` returns for a kind of product, which it is given as a type.
template <class Launch>
const char* with_product(Product product, Launch launch) {
  switch (product) {
    case Product::bfloat16:
      return launch(std::integral_constant<Product, Product::bfloat16>());
    case Product::float16:
      return launch(std::integral_constant<Product, Product::float16>());
    case Product::tfloat32:
      return launch(std::integral_constant<Product, Product::tfloat32>());
    default:
      return launch(std::integral_constant<Product, Product::plain>());
  }
}

}  // namespace dskd
