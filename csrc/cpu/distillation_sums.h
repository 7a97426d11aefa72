// Sums over the keys of affinity_distillation: those of a panel's row, and how two parts become one.
#pragma once

#include "arithmetic.h"
#include "distillation.h"

namespace dskd {
namespace {

// exp2 of sums that float32 can hold, 2^20 of them too.
constexpr float kFar = 95.0f;
// Of float64.
constexpr double kFarthest = 1000.0;

// Of a row of a panel: the largest a, and the extremes of c.
template <class Real>
struct Extremes {
  Real top, low, high;
};

template <class Real>
inline Extremes<Real> extremes_of(const Real* __restrict a, const Real* __restrict c, int64_t n) {
  Real top = kExcluded, low = c[0], high = c[0];
#pragma omp simd reduction(max : top, high) reduction(min : low)
  for (int64_t j = 0; j < n; j++) {
    top = a[j] > top ? a[j] : top;
    low = c[j] < low ? c[j] : low;
    high = c[j] > high ? c[j] : high;
  }
  return {top, low, high};
}

// E and the mean of c.
template <class Real>
inline void weigh(const Real* a, const Real* __restrict c, int64_t n, Real top, Real* e, Real& z, Real& mean) {
  Real sum = 0, first = 0;
#pragma omp simd reduction(+ : sum, first)
  for (int64_t j = 0; j < n; j++) {
    const Real e_ij = exp2_of(a[j] - top);
    sum += e_ij;
    first += e_ij * c[j];
    e[j] = e_ij;
  }
  z = sum;
  mean = first / sum;
}

template <class Real>
struct Differences {
  Real s, v;
};

// c becomes E expm1(c - h), where no |c - h| is above kRadius.
template <class Real>
inline Differences<Real> compare_near(const Real* __restrict e, Real* __restrict c, int64_t n, Real h) {
  Real s = 0, v = 0;
#pragma omp simd reduction(+ : s, v)
  for (int64_t j = 0; j < n; j++) {
    const Real x = c[j] - h, linear = e[j] * x, tail = e[j] * expm1_tail(x);
    s += linear;
    v += tail;
    c[j] = tail + linear;
  }
  return {s, v};
}

// The same anywhere below 2^kFar; a becomes E, too.
template <class Real>
inline Differences<Real> compare(const Real* __restrict e, Real* __restrict a, Real* __restrict c, int64_t n, Real top,
                                 Real h) {
  Real s = 0, v = 0;
#pragma omp simd reduction(+ : s, v)
  for (int64_t j = 0; j < n; j++) {
    const Real x = c[j] - h, e_ij = e[j], linear = e_ij * x;
    const Real y = exp2_of((a[j] - top) + x * static_cast<Real>(kLog2E));
    const bool is_close = (x < 0 ? -x : x) <= static_cast<Real>(kRadius);
    const Real tail = is_close ? e_ij * expm1_tail(x) : y - (e_ij + linear);
    s += linear;
    v += tail;
    a[j] = e_ij;
    c[j] = tail + linear;
  }
  return {s, v};
}

// The largest logit of the student.
template <class Real>
inline Real student_top(const Real* __restrict a, const Real* __restrict c, int64_t n) {
  Real top = kExcluded;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; j++) {
    const Real b = a[j] + c[j] * static_cast<Real>(kLog2E);
    top = b > top ? b : top;
  }
  return top;
}

// Beyond: a becomes E and c the student's exponentials about its own largest, whose sum is `v`.
template <class Real>
inline Differences<Real> compare_far(const Real* __restrict e, Real* __restrict a, Real* __restrict c, int64_t n,
                                     Real top, Real h) {
  Real s = 0, v = 0;
#pragma omp simd reduction(+ : s, v)
  for (int64_t j = 0; j < n; j++) {
    const Real y = exp2_of(a[j] + c[j] * static_cast<Real>(kLog2E) - top);
    s += e[j] * (c[j] - h);
    v += y;
    a[j] = e[j];
    c[j] = y;
  }
  return {s, v};
}

// Visits row r: a becomes E and c becomes E expm1(c - h), or where x is not 0 exp(a - m + c - h) / 2^x. `e` has room
// for a row.
template <class Real>
inline void visit(Real* a, Real* c, Real* e, int64_t n, bool may_be_far, int64_t r, RowSums& to) {
  const Extremes<Real> extremes = extremes_of(a, c, n);
  const Real top = extremes.top;
  const bool is_near = extremes.high - extremes.low <= static_cast<Real>(kRadius);
  Real z, h, student = 0;
  weigh(a, c, n, top, is_near ? a : e, z, h);
  Differences<Real> sums;
  double x = 0;
  if (is_near) {
    sums = compare_near(a, c, n, h);
  } else {
    if (may_be_far) {
      student = student_top(a, c, n);
      const double above = student - (top + h * kLog2E);
      if (above > (sizeof(Real) == sizeof(float) ? kFar : kFarthest)) x = above;
    }
    sums = x == 0 ? compare(e, a, c, n, top, h) : compare_far(e, a, c, n, student, h);
  }
  to.m[r] = top;
  to.h[r] = h;
  to.z[r] = z;
  to.s[r] = sums.s;
  to.v[r] = x == 0 ? sums.v : sums.v - exp2_of(-x) * (z + sums.s);
  to.x[r] = x;
}

// Divided by 2^x: u, the mean of expm1(c - h), and 1 + u.
struct Means {
  double u[kRows], ratio[kRows];
};

inline void find_mean(const RowSums& sums, int64_t r, Means& to) {
  const double scale = exp2_of(-sums.x[r]);
  to.u[r] = sums.z[r] == 0 ? 0.0 : (sums.v[r] + scale * sums.s[r]) / sums.z[r];
  to.ratio[r] = scale + to.u[r];
}

// What a part's numbers are multiplied by to be about m', h' and x' in place of m, h and x.
struct Factors {
  double alpha[kRows];  // exp2(m - m'), of E
  double rest[kRows];   // alpha expm1(h - h') / 2^x', of E too
  double whole[kRows];  // alpha exp(h - h') 2^(x - x'), of E expm1(c - h)
};

// One part's share in a merged row.
struct Share {
  double alpha, rest, whole, v, s;

  Share(double z, double s_before, double v_before, double shift, double d, double x, double x_merged) {
    const bool close = (d < 0 ? -d : d) <= static_cast<double>(kRadius);
    const double scaled = exp2_of(shift - x_merged), both = exp2_of(shift + d * kLog2E - x_merged);
    const double tail = close ? scaled * expm1_tail(d) : both - scaled * (1 + d);
    alpha = exp2_of(shift);
    rest = tail + scaled * d;
    whole = exp2_of(shift + d * kLog2E + x - x_merged);
    v = whole * v_before + rest * s_before + tail * z;
    s = alpha * (s_before + d * z);
  }
};

// Of the binary exponents of a part's terms in V the largest.
inline double size_of(double z, double v, double shift, double d, double x) {
  const double exponent = static_cast<double>((cast_bits<int64_t>(v) >> 52 & 2047) - 1023);
  const double lifted = exponent + x > 0 ? exponent + x : 0.0;
  return z == 0 ? 0.0 : shift + d * kLog2E + lifted;
}

// Makes `to` the sums of both.
inline void merge(RowSums& to, const RowSums& part, Factors& of_to, Factors& of_part, Means& means) {
#pragma omp simd
  for (int64_t r = 0; r < kRows; r++) {
    const double m = to.m[r] > part.m[r] ? to.m[r] : part.m[r];
    const double to_shift = to.m[r] - m, part_shift = part.m[r] - m;
    const double to_alpha = exp2_of(to_shift), part_alpha = exp2_of(part_shift);
    const double part_z = part_alpha * part.z[r], z = to_alpha * to.z[r] + part_z;
    const double move = part_z * (part.h[r] - to.h[r]) + to_alpha * to.s[r] + part_alpha * part.s[r];
    const double h = z == 0 ? 0.0 : to.h[r] + move / z;
    const double to_d = to.h[r] - h, part_d = part.h[r] - h;
    const double to_size = size_of(to.z[r], to.v[r], to_shift, to_d, to.x[r]);
    const double part_size = size_of(part.z[r], part.v[r], part_shift, part_d, part.x[r]);
    const double size = to_size > part_size ? to_size : part_size;
    const double x = size > kFarthest / 2 ? size : 0.0;
    const Share first(to.z[r], to.s[r], to.v[r], to_shift, to_d, to.x[r], x);
    const Share second(part.z[r], part.s[r], part.v[r], part_shift, part_d, part.x[r], x);
    of_to.alpha[r] = first.alpha;
    of_to.rest[r] = first.rest;
    of_to.whole[r] = first.whole;
    of_part.alpha[r] = second.alpha;
    of_part.rest[r] = second.rest;
    of_part.whole[r] = second.whole;
    to.m[r] = m;
    to.h[r] = h;
    to.z[r] = z;
    to.s[r] = first.s + second.s;
    to.v[r] = first.v + second.v;
    to.x[r] = x;
    find_mean(to, r, means);
  }
}

// KL of a row.
inline double kl_of(const RowSums& sums, int64_t r) {
  const double z = sums.z[r], s = sums.s[r], v = sums.v[r], u = (v + s) / z;
  if (z == 0) return 0;  // no key takes part
  if (sums.x[r] != 0) return std::log(v / z) + sums.x[r] * kLn2 - s / z;
  const double kl = u <= 0.5 && u >= -0.5 ? v / z - log1p_tail(u) : std::log1p(u) - s / z;
  // Rounding may bring v below log1p_tail(u).
  return kl < 0 ? 0 : kl;
}

}  // namespace
}  // namespace dskd
