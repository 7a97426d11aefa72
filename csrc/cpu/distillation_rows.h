// Rows of affinity_distillation: reading, the operands of its products, and the normalisation's Jacobian.
#pragma once

#include "distillation.h"
#include "positions.h"

namespace dskd {
namespace DSKD_CAPABILITY {

// Operands (kRows, row_stride): t_i / (T_t log 2) and s_i / T_s - t_i / T_t. `buffer` holds two such blocks of float64,
// if an input is, else of float32.
template <class Element>
void prepare_rows(const Distillation& call, const int64_t* rows, int64_t count, void* buffer, Element* teacher,
                  Element* delta);

// gradient_i = (g_i - <g_i, s_i> s_i) / |student_i|, without normalisation g_i, with g_i = scale_i sum_i.
template <class Sum>
void project(const Distillation& call, const int64_t* rows, int64_t count, const double* scale, void* buffer, Sum* sum,
             int64_t stride);

}  // namespace DSKD_CAPABILITY
}  // namespace dskd
