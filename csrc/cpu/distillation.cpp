// The kernel over pairs of rows and keys of affinity_distillation, a slab of rows and a part of the keys at a time.
//
// As in affinity.cpp, E and E expm1(c - h) of a panel of keys are held in a cache until the panel's end, when the row's
// running sums and, from them, u are known; then the panel is multiplied into the gradient. Here E and h are the
// panel's own, and two factors per row turn them into weights about the running ones. What was added before is
// corrected by sum E k: with rho = exp(h - h') (1 + u)/(1 + u') and alpha = exp(m - m'),
//
//     G' = alpha (rho G + (rho - 1) sum E k)     of G = sum E (expm1(c - h) - u)/(1 + u) k = Z sum (p_s - p_t) k.
//
// That is as large as Z at most, however far the student is. Splits of the keys become one by the same formula.
#include "distillation_rows.h"
#include "distillation_sums.h"
#include "product.h"

namespace dskd {
namespace {

template <class Element>
struct Gradient {
  using Sum = typename Accumulator<Element>::type;
  // Operands of one number each serve both products in one order: keys times weights gives the gradient turned over.
  // bfloat16 has its pairs along the dimension that is summed, and needs both.
  static constexpr bool kTurned = sizeof(Element) == sizeof(Sum);

  const Distillation& call;
  int64_t count, stride;  // rows; (2 count, stride), or (C_PAD, 2 kRows) where kTurned
  Sum* sum;

  Gradient(const Distillation& call_, int64_t count_, void* memory)
      : call(call_),
        count(count_),
        stride(kTurned ? 2 * kRows : row_stride(call_.shape.channels)),
        sum(static_cast<Sum*>(memory)) {}

  static int64_t size(const Distillation& call) {
    return kTurned ? 2 * kRows * call.c_pad : (call.keeps_teacher ? 2 : 1) * kRows * row_stride(call.shape.channels);
  }

  void clear() {
    for (int64_t i = 0; i < size(call); i++) sum[i] = 0;
  }

  // sum of weights = by_own times itself + by_teacher times sum E k; sum E k = alpha times itself.
  void correct(const Sum* by_own, const Sum* by_teacher, const Sum* alpha) {
    each([=](Sum& own, Sum& teacher, int64_t r) {
      own = by_own[r] * own + by_teacher[r] * teacher;
      teacher *= alpha[r];
    });
  }

  // Adds another's as they would be after correct().
  void add(const Gradient& other, const Sum* by_own, const Sum* by_teacher, const Sum* alpha) {
    const Sum* from = other.sum;
    Sum* start = sum;
    each([=](Sum& own, Sum& teacher, int64_t r) {
      const Sum other_own = from[&own - start], other_teacher = from[&teacher - start];
      own += by_own[r] * other_own + by_teacher[r] * other_teacher;
      teacher += alpha[r] * other_teacher;
    });
  }

 private:
  template <class Work>
  void each(const Work& work) {
    if constexpr (kTurned) {
      for (int64_t i = 0; i < call.c_pad; i++)
        for (int64_t r = 0; r < count; r++) work(sum[i * stride + r], sum[i * stride + kRows + r], r);
    } else {
      for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < call.c_pad; i++) work(sum[r * stride + i], sum[(count + r) * stride + i], r);
    }
  }
};

// What turns sums of a gradient about a part's means into those about the merged ones.
template <class Sum>
inline void corrections(const Factors& factors, const Means& before, const Means& now, int64_t r, Sum& by_own,
                        Sum& by_teacher, Sum& alpha) {
  const double inverse = 1 / now.ratio[r];
  by_own = static_cast<Sum>(factors.whole[r] * before.ratio[r] * inverse);
  by_teacher =
      static_cast<Sum>((factors.whole[r] * before.u[r] + factors.rest[r] - factors.alpha[r] * now.u[r]) * inverse);
  alpha = static_cast<Sum>(factors.alpha[r]);
}

inline void clear(RowSums& sums) {
  for (int64_t r = 0; r < kRows; r++) {
    sums.m[r] = kExcluded;
    sums.h[r] = sums.z[r] = sums.s[r] = sums.v[r] = sums.x[r] = 0;
  }
}

// KL and gradient of a slab whose sums are complete. `buffer` and `by_rows`: (kRows, row_stride).
template <class Element>
void finish(const Distillation& call, const int64_t* rows, int64_t count, const RowSums& sums,
            typename Accumulator<Element>::type* gradient, void* buffer, typename Accumulator<Element>::type* by_rows) {
  double scale[kRows];
  for (int64_t r = 0; r < count; r++) {
    const double kl = kl_of(sums, r);
    if (call.kl_dtype == Dtype::float64) {
      static_cast<double*>(call.kl)[rows[r]] = kl;
    } else {
      static_cast<float*>(call.kl)[rows[r]] = static_cast<float>(kl);
    }
    scale[r] = sums.z[r] == 0 ? 0.0 : 1 / (sums.z[r] * call.student_temperature);
  }
  if (gradient == nullptr) return;
  const int64_t stride = row_stride(call.shape.channels);
  if constexpr (Gradient<Element>::kTurned) {
    turn(gradient, 2 * kRows, call.c_pad, count, by_rows, stride);
    gradient = by_rows;
  }
  DSKD_CAPABILITY::project(call, rows, count, scale, buffer, gradient, stride);
}

template <class Element>
struct Slab {
  using Sum = typename Accumulator<Element>::type;
  static constexpr int64_t kWeightStride = kKeys + kPad;
  static constexpr bool kTurned = Gradient<Element>::kTurned;

  const Distillation& call;
  int64_t stride, panel_stride;
  void* raw;                         // 2 (kRows, stride): the rows as given
  Element *row_teacher, *row_delta;  // (kRows, stride)
  Element *weights, *turned;         // (2 kRows, kWeightStride), (kKeys, 2 kRows)
  Sum *a, *c;                        // (kRows, panel_stride)
  Sum *e, *bias;                     // (panel_stride)
  RowSums* own_sums;
  void* own_gradient;

  Slab(const Distillation& call_, Parts& parts) : call(call_) {
    stride = row_stride(call.shape.channels);
    panel_stride = call.panel + kPad;
    raw =
        parts.take<char>(2 * kRows * stride * static_cast<int64_t>(has_float64(call) ? sizeof(double) : sizeof(float)));
    row_teacher = parts.take<Element>(2 * kRows * stride);
    a = parts.take<Sum>(kRows * (2 * panel_stride > stride ? 2 * panel_stride : stride));  // serves finish(), too
    e = parts.take<Sum>(panel_stride);
    bias = parts.take<Sum>(panel_stride);
    own_sums = parts.take<RowSums>(1);
    weights = turned = nullptr;
    own_gradient = nullptr;
    row_delta = nullptr;
    c = nullptr;
    if (call.gradient.data != nullptr) {
      weights = parts.take<Element>(2 * kRows * kWeightStride);
      turned = kTurned ? parts.take<Element>(2 * kRows * kKeys) : nullptr;
      own_gradient = parts.take<Sum>(Gradient<Element>::size(call));
    }
  }

  void run(const Group& group, int64_t slab, const int64_t* tiles, int64_t tile_count, const Partial* partial) {
    const int64_t* rows = group.rows + slab * kRows;
    const int64_t count = least(kRows, group.row_count - slab * kRows);
    // The rows' two operands, and a and c, lie one below the other: one product yields both.
    row_delta = row_teacher + count * stride;
    c = a + count * panel_stride;
    DSKD_CAPABILITY::prepare_rows(call, rows, count, raw, row_teacher, row_delta);
    RowSums& sums = partial == nullptr ? *own_sums : *partial->sums;
    clear(sums);
    const bool with_gradient = call.gradient.data != nullptr;
    Gradient<Element> gradient(call, count, partial == nullptr ? own_gradient : partial->gradient);
    if (with_gradient && tile_count == 0) gradient.clear();
    if constexpr (kTurned) {
      // What is multiplied besides must be numbers.
      for (int64_t i = 0; with_gradient && i < 2 * kRows * kKeys; i++) turned[i] = 0;
    }
    RowSums panel;
    clear(panel);
    Means means = {};
    for (int64_t first = 0; first < tile_count; first += call.panel / kKeys) {
      const int64_t last = least(first + call.panel / kKeys, tile_count);
      const int64_t width = multiply(group, tiles + first, last - first, count);
      for (int64_t r = 0; r < count; r++)
        visit(a + r * panel_stride, c + r * panel_stride, e, width, call.may_be_far, r, panel);
      Factors before, now;
      const Means means_before = means;
      merge(sums, panel, before, now, means);
      if (!with_gradient) continue;
      Sum by_first[kRows], by_second[kRows], alpha[kRows];
      if (first > 0) {
        for (int64_t r = 0; r < count; r++)
          corrections(before, means_before, means, r, by_first[r], by_second[r], alpha[r]);
        gradient.correct(by_first, by_second, alpha);
      }
      for (int64_t r = 0; r < count; r++) {
        const double inverse = 1 / means.ratio[r];
        const double by_e = (now.rest[r] - now.alpha[r] * means.u[r]) * inverse;
        by_first[r] = static_cast<Sum>(now.whole[r] * inverse);
        by_second[r] = static_cast<Sum>(panel.x[r] == 0 ? by_e : -now.alpha[r]);
        alpha[r] = static_cast<Sum>(now.alpha[r]);
      }
      for (int64_t i = first; i < last; i++)
        add_products(group, tiles[i], (i - first) * kKeys, count, by_first, by_second, alpha, i > 0, gradient);
    }
    if (partial == nullptr) finish<Element>(call, rows, count, sums, gradient.sum, raw, a);
  }

  int64_t width_of(const Group& group, int64_t tile) const {
    return least(kKeys, (group.key_count - tile + kPad - 1) / kPad * kPad);
  }

  // a and c of the tiles of a panel, whose width it returns.
  int64_t multiply(const Group& group, const int64_t* tiles, int64_t tile_count, int64_t count) {
    int64_t width = 0;
    for (int64_t i = 0; i < tile_count; i++) {
      const int64_t tile = tiles[i], n = width_of(group, tile), apart = least(kKeys, call.n_pad - tile);
      const Element* columns = static_cast<const Element*>(group.keys.columns) + tile * call.c_pad;
      product(call.use_brgemm, 2 * count, n, call.c_pad, row_teacher, stride, columns, apart, a + width, panel_stride,
              false);
      if (group.bias != nullptr) {
        for (int64_t j = 0; j < n; j++) bias[width + j] = group.bias[tile + j];
      }
      for (int64_t j = group.key_count - tile; j < n; j++)
        for (int64_t r = 0; r < count; r++) {
          a[r * panel_stride + width + j] = kExcluded;
          c[r * panel_stride + width + j] = c[r * panel_stride + width];  // so that it is no extreme
        }
      width += n;
    }
    if (group.bias != nullptr) {
      for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < width; j++) a[r * panel_stride + j] += bias[j];
    }
    return width;
  }

  // Adds a tile's weights times its keys, and E times its keys.
  void add_products(const Group& group, int64_t tile, int64_t place, int64_t count, const Sum* by_difference,
                    const Sum* by_e, const Sum* alpha, bool adds, Gradient<Element>& to) {
    const int64_t n = width_of(group, tile);
    for (int64_t r = 0; r < count; r++) {
      const Sum *e_row = a + r * panel_stride + place, *difference = c + r * panel_stride + place;
      Element *own = weights + r * kWeightStride, *teacher = own + count * kWeightStride;
      const Sum x = by_difference[r], y = by_e[r], z = alpha[r];
      for (int64_t j = 0; j < n; j++) convert(x * difference[j] + y * e_row[j], call.dropped_bits, own[j]);
      if (!call.keeps_teacher) continue;
      for (int64_t j = 0; j < n; j++) convert(z * e_row[j], call.dropped_bits, teacher[j]);
    }
    if constexpr (kTurned) {
      const int64_t apart = least(kKeys, call.n_pad - tile), padded = (count + kPad - 1) / kPad * kPad;
      const Element* columns = static_cast<const Element*>(group.keys.columns) + tile * call.c_pad;
      turn(weights, kWeightStride, count, n, turned, 2 * kRows);
      if (call.keeps_teacher) turn(weights + count * kWeightStride, kWeightStride, count, n, turned + kRows, 2 * kRows);
      product(call.use_brgemm, call.c_pad, call.keeps_teacher ? kRows + padded : padded, n, columns, apart, turned,
              2 * kRows, to.sum, 2 * kRows, adds);
    } else {
      const Element* those = static_cast<const Element*>(group.keys.rows) + tile * call.c_pad;
      product(call.use_brgemm, call.keeps_teacher ? 2 * count : count, call.c_pad, n, weights, kWeightStride, those,
              call.c_pad, to.sum, stride, adds);
    }
  }
};

template <class Element>
void merge_all(const Distillation& call, const Group& group, int64_t slab, const Partial* parts, int64_t count,
               char* scratch) {
  using Sum = typename Accumulator<Element>::type;
  Parts memory{reinterpret_cast<uintptr_t>(scratch)};
  Slab<Element> buffers(call, memory);
  const int64_t row_count = least(kRows, group.row_count - slab * kRows);
  const bool with_gradient = call.gradient.data != nullptr;
  RowSums& sums = *parts[0].sums;
  Gradient<Element> gradient(call, row_count, parts[0].gradient);
  Means means;
  for (int64_t r = 0; r < kRows; r++) find_mean(sums, r, means);
  for (int64_t i = 1; i < count; i++) {
    const RowSums& others = *parts[i].sums;
    const Means means_before = means;
    Means means_of_other;
    for (int64_t r = 0; r < kRows; r++) find_mean(others, r, means_of_other);
    Factors before, other;
    merge(sums, others, before, other, means);
    if (!with_gradient) continue;
    Sum by_own[kRows], by_teacher[kRows], alpha[kRows];
    for (int64_t r = 0; r < row_count; r++)
      corrections(before, means_before, means, r, by_own[r], by_teacher[r], alpha[r]);
    gradient.correct(by_own, by_teacher, alpha);
    for (int64_t r = 0; r < row_count; r++)
      corrections(other, means_of_other, means, r, by_own[r], by_teacher[r], alpha[r]);
    gradient.add(Gradient<Element>(call, row_count, parts[i].gradient), by_own, by_teacher, alpha);
  }
  finish<Element>(call, group.rows + slab * kRows, row_count, sums, with_gradient ? gradient.sum : nullptr, buffers.raw,
                  buffers.a);
}

template <class Element>
void run(const Distillation& call, const Group& group, int64_t slab, const int64_t* tiles, int64_t tile_count,
         const Partial* partial, char* scratch) {
  Parts parts{reinterpret_cast<uintptr_t>(scratch)};
  Slab<Element>(call, parts).run(group, slab, tiles, tile_count, partial);
}

template <class Element>
int64_t measure(const Distillation& call) {
  Parts parts{0};
  Slab<Element>(call, parts);
  return parts.used;
}

// Calls work<Element> of what a call's operands are.
#define DSKD_CHOOSE(work, ...)            \
  switch (call.operand) {                 \
    case Operand::float32:                \
      return work<float>(__VA_ARGS__);    \
    case Operand::bfloat16:               \
      return work<uint16_t>(__VA_ARGS__); \
    default:                              \
      return work<double>(__VA_ARGS__);   \
  }

template <class Element>
int64_t gradient_bytes(const Distillation& call) {
  return Gradient<Element>::size(call) * static_cast<int64_t>(sizeof(typename Accumulator<Element>::type));
}

}  // namespace

namespace DSKD_CAPABILITY {

void distill(const Distillation& call, const Group& group, int64_t slab, const int64_t* tiles, int64_t tile_count,
             const Partial* partial, char* scratch) {
  DSKD_CHOOSE(run, call, group, slab, tiles, tile_count, partial, scratch)
}

void merge_splits(const Distillation& call, const Group& group, int64_t slab, const Partial* parts, int64_t count,
                  char* scratch){DSKD_CHOOSE(merge_all, call, group, slab, parts, count, scratch)}

int64_t scratch_bytes(const Distillation& call){DSKD_CHOOSE(measure, call)}

int64_t partial_bytes(const Distillation& call) {
  if (call.gradient.data == nullptr) return 0;
  DSKD_CHOOSE(gradient_bytes, call)
}

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
