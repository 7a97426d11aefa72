// The kernel over pairs of positions: the KL map and its gradient, a slab of rows at a time.
//
// With the names of kernels/README.md, E = exp2(a), Z = sum E, first = sum E c / Z, v = sum E (expm1(c) - c) / Z and
// u = v + first, the gradient's weights are E (expm1(c) - u). u is known only when all keys have been seen, so keys are
// taken in panels: E and E expm1(c) of a panel are held in a cache, u is estimated from the keys so far,
// and the panel is multiplied into the gradient with that estimate. Where there are several panels, sum E k is kept
// too, and corrects what was added with an earlier estimate: four products, or three where one panel holds all keys.
//
// Rows whose exponentials could leave float32's range, and float64, take two visits and float64 in place of that.
#include "prepare.h"
#include "product.h"

namespace dskd {
namespace {

// The student's exponentials are below 2^kFar; 2^17 and more of them can be added in float32.
constexpr double kFar = 95.0;

struct Sums {
  double z, first, tail, z_student;
};

// Sums over a row of a tile; a becomes E and c becomes E expm1(c). They do so even where no gradient is wanted: in two
// instances the compiler may fuse different multiply-adds, and the KL of a position have different bits.
template <bool kNear, class Real>
inline void visit(Real* __restrict a, Real* __restrict c, const Real* __restrict bias, int64_t n, Real a_scale,
                  Real a_shift, Real c_scale, Real c_shift, Sums& sums) {
  Real z = 0, first = 0, tail = 0, z_student = 0;
#pragma omp simd reduction(+ : z, first, tail, z_student)
  for (int64_t j = 0; j < n; j++) {
    const Real a_ij = a[j] * a_scale + (bias[j] - a_shift);
    const Real c_ij = c[j] * c_scale - c_shift;
    const Real e = exp2_of(a_ij);
    const Real linear = e * c_ij;
    Real term = e * expm1_tail(c_ij);
    Real weight = term + linear;
    if (!kNear) {
      const Real x = exp2_of(a_ij + c_ij * static_cast<Real>(kLog2E));
      const bool is_close = (c_ij < 0 ? -c_ij : c_ij) <= static_cast<Real>(kRadius);
      term = is_close ? term : x - (e + linear);
      weight = is_close ? weight : x - e;
      z_student += x;
    }
    z += e;
    first += linear;
    tail += term;
    a[j] = e;
    c[j] = weight;
  }
  sums.z += z;
  sums.first += first;
  sums.tail += tail;
  sums.z_student += z_student;
}

// The row's own key, for which E = 1.
inline Sums own_sums(double c) {
  const double size = c < 0 ? -c : c;
  return {1, c, size <= kRadius ? expm1_tail(c) : std::expm1(c) - c, std::exp(c)};
}

inline double mean_difference(const Sums& sums) { return (sums.first + sums.tail) / sums.z; }

// What a row's sums come to.
struct Totals {
  double kl;     // KL / T^2
  double u;      // mean difference
  double share;  // 1 / (Z (1 + u)), which the weights have yet to be multiplied by
};

inline Totals totals_of(const Sums& sums, bool is_near) {
  const double mean = sums.first / sums.z, v = sums.tail / sums.z, u = v + mean;
  // Where most of the student's weight has left the row's own key, 1 + u has lost its digits.
  const double ratio = is_near || u > -0.5 ? 1 + u : sums.z_student / sums.z;
  const double kl = u <= 0.5 && u >= -0.5 ? v - log1p_tail(u) : std::log(ratio) - mean;
  // Rounding may bring v below log1p_tail(u).
  return {kl < 0 ? 0 : kl, mean_difference(sums), 1 / (sums.z * ratio)};
}

template <class Real, class Element>
struct Slab {
  using Sum = typename Accumulator<Element>::type;
  static constexpr int64_t kWeightStride = kKeys + kPad;
  // Operands of one number each serve both products in one order: keys times weights gives the gradient turned over.
  // bfloat16 has its pairs along the dimension that is summed, and needs both.
  static constexpr bool kTurned = sizeof(Element) == sizeof(Sum);

  const Affinity& call;
  const Keys& keys;
  int64_t image, start, count;
  int64_t stride, panel_stride;
  Rows<Real> rows;
  Element *row_keys, *row_delta;  // (kRows, stride)
  Element *weights, *turned;      // (kRows, kWeightStride), (kKeys, kRows)
  Sum *a, *c;                     // (kRows, panel_stride)
  Sum *gradient, *teacher_sum;    // sum of weights times keys, and of E times keys: see add_product
  double *wide_a, *wide_c;        // (kKeys): a row of a tile in float64
  Sums sums[kRows];
  Totals totals[kRows];

  Slab(const Affinity& call_, int64_t image_, int64_t slab, const Keys& keys_, Parts& parts)
      : call(call_), keys(keys_), image(image_), start(slab * kRows) {
    count = least(kRows, call.shape.positions - start);
    stride = row_stride(call.shape.channels);
    const bool with_gradient = call.gradient.data != nullptr;
    constexpr bool kStreams = sizeof(Sum) == sizeof(float);  // float64 takes one tile at a time
    panel_stride = (kStreams && with_gradient ? call.panel : kKeys) + kPad;
    rows.student = parts.take<Real>(kRows * stride);
    rows.teacher = parts.take<Real>(kRows * stride);
    // The rows' keys and differences, and a and c, lie one below the other: one product yields both.
    row_keys = parts.take<Element>(2 * kRows * stride);
    row_delta = row_keys + count * stride;
    a = parts.take<Sum>(2 * kRows * panel_stride);
    c = a + count * panel_stride;
    wide_a = parts.take<double>(kKeys);
    wide_c = parts.take<double>(kKeys);
    weights = turned = nullptr;
    gradient = teacher_sum = nullptr;
    if (with_gradient) {
      weights = parts.take<Element>(kRows * kWeightStride);
      turned = kTurned ? parts.take<Element>(kRows * kKeys) : nullptr;
      gradient = parts.take<Sum>(kRows * stride);
      if (kStreams && call.panel < call.n_pad) teacher_sum = parts.take<Sum>(kRows * stride);
    }
  }

  void run() {
    DSKD_CAPABILITY::prepare_rows(call, image, start, count, keys.mean, rows, row_keys, row_delta);
    bool is_near = true, is_far = sizeof(Sum) == sizeof(double);
    for (int64_t r = 0; r < count; r++) {
      // Rows of NaN are as good as near.
      is_near = is_near && !(rows.c_bound[r] > kRadius);
      is_far = is_far || rows.c_bound[r] * kLog2E > kFar;
      sums[r] = own_sums(rows.c_own[r]);
    }
    if (is_far) {
      visit_twice();
    } else if (is_near) {
      stream<true>();
    } else {
      stream<false>();
    }
  }

  int64_t width_of(int64_t tile) const { return least(kKeys, call.n_pad - tile); }

  // Raw a and, from row `count` on, c of a tile, the rows' own keys apart.
  void multiply_tile(int64_t tile, Sum* to_a) {
    const int64_t width = width_of(tile);
    const Element* columns = static_cast<const Element*>(keys.columns) + tile * call.c_pad;
    product(call.use_brgemm, 2 * count, width, call.c_pad, row_keys, stride, columns, width, to_a, panel_stride, false);
    for (int64_t r = 0; r < count; r++) {
      const int64_t j = start + r - tile;
      if (j >= 0 && j < width) to_a[r * panel_stride + j] = static_cast<Sum>(-1e30);
    }
  }

  // Adds weight(r, j) times the keys of a tile: `to` is (kRows, stride), or (C_PAD, kRows) where kTurned.
  template <class Weight>
  void add_product(int64_t tile, Sum* to, Weight weight) {
    const int64_t width = width_of(tile);
    for (int64_t r = 0; r < count; r++) {
      Element* row = weights + r * kWeightStride;
      for (int64_t j = 0; j < width; j++) convert(weight(r, j), call.dropped_bits, row[j]);
    }
    if constexpr (kTurned) {
      const Element* columns = static_cast<const Element*>(keys.columns) + tile * call.c_pad;
      turn(weights, kWeightStride, count, width, turned, kRows);
      product(call.use_brgemm, call.c_pad, (count + kPad - 1) / kPad * kPad, width, columns, width, turned, kRows, to,
              kRows, tile > 0);
    } else {
      const Element* those = static_cast<const Element*>(keys.rows) + tile * call.c_pad;
      product(call.use_brgemm, count, call.c_pad, width, weights, kWeightStride, those, call.c_pad, to, stride,
              tile > 0);
    }
  }

  template <bool kNear>
  void stream() {
    const float a_scale = static_cast<float>(kLog2E / call.temperature),
                c_scale = static_cast<float>(1 / call.temperature);
    const int64_t panel = gradient != nullptr ? call.panel : kKeys;
    const bool several = panel < call.n_pad;
    double u[kRows] = {};
    Sum change[kRows];
    for (int64_t begin = 0; begin < call.n_pad; begin += panel) {
      const int64_t end = least(begin + panel, call.n_pad);
      for (int64_t tile = begin; tile < end; tile += kKeys) {
        Sum *to_a = a + (tile - begin), *to_c = c + (tile - begin);
        multiply_tile(tile, to_a);
        for (int64_t r = 0; r < count; r++)
          visit<kNear, float>(narrow(to_a + r * panel_stride), narrow(to_c + r * panel_stride), keys.bias32 + tile,
                              width_of(tile), a_scale, static_cast<float>(rows.own_logit[r]), c_scale,
                              static_cast<float>(rows.c_shift[r]), sums[r]);
      }
      if (gradient == nullptr) continue;
      for (int64_t r = 0; r < count; r++) {
        const double before = u[r];
        u[r] = mean_difference(sums[r]);
        change[r] = static_cast<Sum>(before - u[r]);
      }
      if (begin > 0) correct(change);
      for (int64_t tile = begin; tile < end; tile += kKeys) {
        const Sum *e = a + (tile - begin), *e_expm1 = c + (tile - begin);
        add_product(tile, gradient, [&](int64_t r, int64_t j) {
          return e_expm1[r * panel_stride + j] - static_cast<Sum>(u[r]) * e[r * panel_stride + j];
        });
        if (several) add_product(tile, teacher_sum, [&](int64_t r, int64_t j) { return e[r * panel_stride + j]; });
      }
    }
    for (int64_t r = 0; r < count; r++) totals[r] = totals_of(sums[r], kNear);
    finish(false);
  }

  // What was added with estimates of u that have changed since.
  void correct(const Sum* change) {
    if constexpr (kTurned) {
      for (int64_t i = 0; i < call.c_pad; i++)
        for (int64_t r = 0; r < count; r++) gradient[i * kRows + r] += change[r] * teacher_sum[i * kRows + r];
    } else {
      for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < call.c_pad; i++) gradient[r * stride + i] += change[r] * teacher_sum[r * stride + i];
    }
  }

  void visit_twice() {
    for (int64_t tile = 0; tile < call.n_pad; tile += kKeys) {
      multiply_tile(tile, a);
      for (int64_t r = 0; r < count; r++) visit_wide(tile, r, sums[r]);
    }
    for (int64_t r = 0; r < count; r++) totals[r] = totals_of(sums[r], false);
    for (int64_t tile = 0; gradient != nullptr && tile < call.n_pad; tile += kKeys) {
      multiply_tile(tile, a);
      for (int64_t r = 0; r < count; r++) {
        Sums again = {};
        visit_wide(tile, r, again);
        for (int64_t j = 0; j < width_of(tile); j++)
          a[r * panel_stride + j] = static_cast<Sum>((wide_c[j] - totals[r].u * wide_a[j]) * totals[r].share);
      }
      add_product(tile, gradient, [&](int64_t r, int64_t j) { return a[r * panel_stride + j]; });
    }
    finish(true);
  }

  void visit_wide(int64_t tile, int64_t r, Sums& to) {
    const int64_t width = width_of(tile);
    for (int64_t j = 0; j < width; j++) {
      wide_a[j] = a[r * panel_stride + j];
      wide_c[j] = c[r * panel_stride + j];
    }
    visit<false, double>(wide_a, wide_c, keys.bias + tile, width, kLog2E / call.temperature, rows.own_logit[r],
                         1 / call.temperature, rows.c_shift[r], to);
  }

  // float64 never streams.
  static float* narrow(float* x) { return x; }
  static float* narrow(double*) { return nullptr; }

  // Writes the slab's KL and gradient; `has_share`: whether the weights have been multiplied by their row's share.
  void finish(bool has_share) {
    Sum* kl = static_cast<Sum*>(call.kl) + image * call.shape.positions + start;
    // T^2 as one factor would underflow with the smallest T.
    for (int64_t r = 0; r < count; r++) kl[r] = static_cast<Sum>(totals[r].kl * call.temperature * call.temperature);
    if (gradient == nullptr) return;
    double own_weight[kRows], scale[kRows];
    for (int64_t r = 0; r < count; r++) {
      const Sums own = own_sums(rows.c_own[r]);
      own_weight[r] = (own.first + own.tail - totals[r].u) * (has_share ? totals[r].share : 1.0);
      scale[r] = call.temperature * (has_share ? 1.0 : totals[r].share);
    }
    Sum* by_rows = gradient;
    if constexpr (kTurned) {
      by_rows = row_keys;  // which have served
      turn(gradient, kRows, call.c_pad, count, by_rows, stride);
    }
    DSKD_CAPABILITY::project(call, image, start, count, keys.mean, rows, own_weight, scale, by_rows, stride);
  }
};

template <class Real, class Element>
int64_t measure(const Affinity& call) {
  Parts parts{0};
  const Keys none{};
  Slab<Real, Element>(call, 0, 0, none, parts);
  // The kernels that prepare the keys need two blocks, of which these are no smaller.
  const int64_t blocks = 2 * kRows * row_stride(call.shape.channels) * static_cast<int64_t>(sizeof(double));
  return parts.used > blocks ? parts.used : blocks;
}

template <class Real, class Element>
void run(const Affinity& call, int64_t image, int64_t slab, const Keys& keys, char* scratch) {
  Parts parts{reinterpret_cast<uintptr_t>(scratch)};
  Slab<Real, Element>(call, image, slab, keys, parts).run();
}

}  // namespace

namespace DSKD_CAPABILITY {

void affinity(const Affinity& call, int64_t image, int64_t slab, const Keys& keys, char* scratch) {
  switch (call.operand) {
    case Operand::float32:
      return (has_float64(call) ? run<double, float> : run<float, float>)(call, image, slab, keys, scratch);
    case Operand::bfloat16:
      return (has_float64(call) ? run<double, uint16_t> : run<float, uint16_t>)(call, image, slab, keys, scratch);
    case Operand::float64:
      return run<double, double>(call, image, slab, keys, scratch);
  }
}

int64_t scratch_bytes(const Affinity& call) {
  switch (call.operand) {
    case Operand::float32:
      return (has_float64(call) ? measure<double, float> : measure<float, float>)(call);
    case Operand::bfloat16:
      return (has_float64(call) ? measure<double, uint16_t> : measure<float, uint16_t>)(call);
    default:
      return measure<double, double>(call);
  }
}

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
