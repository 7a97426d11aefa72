// The sums of affinity distillation over the keys of a row, which are moved to other references as keys come.
#pragma once

#include "arithmetic.cuh"
#include "distillation.h"

namespace dskd {
namespace {

// A logit below all: of no keys.
constexpr float kLowest = -1e30f;
// Exponents up to which v is in float32's range, with 2^20 keys of them.
constexpr float kRange = 64.0f;

// NaN where it is in the device's memory and out of range: the host, which does not know it, cannot refuse it. A
// float32's rounding of the ends, 0.005 and 100, is inside.
DSKD_DEVICE double temperature_of(double known, const double* at) {
  if (at == nullptr) return known;
  const double temperature = *at;
  return temperature >= 0.00499999 && temperature <= 100.0001 ? temperature : float_of(0x7FC00000);
}

// Relative to m, the largest a so far, and to h, about the mean of c so far, the sums z of E = exp2(a - m), s of
// E (c - h), and v of E (expm1(c - h) - (c - h)). Where the student's largest logit is more than kRange higher than
// m + h, exponentials in v are lowered by 2^lift; its other terms are then too small to show, and are left as they are.
struct Sums : DistilledSums {
  DSKD_DEVICE Sums() : DistilledSums{kLowest, kLowest, 0, 0, 0, 0, 0} {}
  DSKD_DEVICE Sums(const DistilledSums& sums) : DistilledSums(sums) {}

  DSKD_DEVICE static float lift_of(float m, float h, float m_student) {
    return fmaxf(ceilf(m_student - m - h * static_cast<float>(kLog2E)) - kRange, 0.0f);
  }

  DSKD_DEVICE void move(float to_m, float to_h, float to_m_student) {
    const float d = h - to_h, to_lift = lift_of(to_m, to_h, to_m_student);
    const float alpha = exp2_of(m - to_m), exponent = m - to_m + d * static_cast<float>(kLog2E) - to_lift;
    const float moved = exp2_of(exponent);  // alpha exp(d)
    const bool is_close = fabsf(d) <= kRadius;
    const float tail = expm1_tail(d);
    v = exp2_of(exponent + lift) * v +
        ((is_close ? alpha * (tail + d) : moved - alpha) * s + (is_close ? alpha * tail : moved - alpha * (1 + d)) * z);
    s = alpha * (s + d * z);
    z = alpha * z;
    m = to_m;
    h = to_h;
    m_student = to_m_student;
    lift = to_lift;
  }

  // The thread's pairs of its row `r` in a tile.
  DSKD_DEVICE void add(const float (&a)[4][4], const float (&c)[4][4], int r) {
    float top = m, top_student = m_student;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float a_ij = a[i / 2][2 * r + i % 2], c_ij = c[i / 2][2 * r + i % 2];
      top = fmaxf(top, a_ij);
      top_student = fmaxf(top_student, a_ij + c_ij * static_cast<float>(kLog2E));
    }
    float e[8], part_z = 0, first = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      e[i] = exp2_of(a[i / 2][2 * r + i % 2] - top);
      part_z += e[i];
      first += e[i] * c[i / 2][2 * r + i % 2];
    }
    // Where the mean is h to within a part of what c varies by, nothing moves, as is the rule after a few tiles.
    const float alpha = exp2_of(m - top), all = alpha * z + part_z;
    const float mean = all > 0 ? quotient_of(alpha * (z * h + s) + first, all) : h, d = h - mean;
    const bool stays = top == m && d * d <= 1 && 4 * d * d * all <= v && lift_of(m, h, top_student) == lift;
    if (stays) {
      m_student = top_student;
    } else {
      move(top, mean, top_student);
    }
    float part_s = 0, part_v = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float x = c[i / 2][2 * r + i % 2] - h, linear = e[i] * x;
      const float exponent = a[i / 2][2 * r + i % 2] - m + x * static_cast<float>(kLog2E) - lift;
      part_s += linear;
      part_v += fabsf(x) <= kRadius ? e[i] * expm1_tail(x) : exp2_of(exponent) - (e[i] + linear);
    }
    z += part_z;
    s += part_s;
    v += part_v;
  }

  DSKD_DEVICE Sums of_lane(int offset) const {
    const auto of = [&](float x) { return __shfl_xor_sync(0xFFFFFFFFu, x, offset); };
    return DistilledSums{of(m), of(m_student), of(lift), of(h), of(z), of(s), of(v)};
  }

  // Those of other keys.
  DSKD_DEVICE void add(Sums other) {
    const float top = fmaxf(m, other.m), top_student = fmaxf(m_student, other.m_student);
    const float alpha = exp2_of(m - top), other_alpha = exp2_of(other.m - top);
    const float all = alpha * z + other_alpha * other.z;
    const float first = alpha * (z * h + s) + other_alpha * (other.z * other.h + other.s);
    const float mean = all > 0 ? first / all : h;
    move(top, mean, top_student);
    other.move(top, mean, top_student);
    z += other.z;
    s += other.s;
    v += other.v;
  }
};

}  // namespace
}  // namespace dskd
