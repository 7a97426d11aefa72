// The rows of a slab: the operands of its products, and what is known of each row beforehand.
#pragma once

#include "positions.h"

namespace dskd {

// Of kRows positions; Real is float64 if an input is, else float32.
template <class Real>
struct Rows {
  Real *student, *teacher;                    // as given, (kRows, row_stride)
  double s_inverse[kRows], t_inverse[kRows];  // 1/|student_i|, 1/|teacher_i|
  double own_logit[kRows];                    // <t_i, k_i> / (T log 2)
  double c_shift[kRows];  // what is subtracted from <delta_i, k_j> / T to give c: its value for the own key, or 0
  double c_own[kRows];    // c of the own key
  double c_bound[kRows];  // no |c| is larger
};

namespace DSKD_CAPABILITY {

// keys and delta: (kRows, row_stride) operands, k_i and s_i - t_i.
template <class Real, class Element>
void prepare_rows(const Affinity& call, int64_t image, int64_t start, int64_t count, const double* mean,
                  Rows<Real>& rows, Element* keys, Element* delta);

// gradient_i = (g_i - <g_i, s_i> s_i) / |student_i| with g_i = scale_i (sum_i + own_weight_i k_i).
template <class Real, class Sum>
void project(const Affinity& call, int64_t image, int64_t start, int64_t count, const double* mean,
             const Rows<Real>& rows, const double* own_weight, const double* scale, Sum* sum, int64_t stride);

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
