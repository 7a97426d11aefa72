// Affinity distillation's kernels over vectors: keys and rows as operands, and the normalisation's Jacobian.
//
// Compiled with --fmad=false, as prepare.cu: s/T - t/T must be exactly 0 for equal vectors.
#include "distillation.cuh"
#include "positions.cuh"

namespace dskd {
namespace {

// What a vector is multiplied by. Of one with an infinite element, which has no direction, NaN in either way.
DSKD_DEVICE double inverse_norm_of(double squares, bool normalize) {
  return normalize ? inverse_of(squares) : 1 + squares * 0;
}

// `store_tile` of the call's kind of product: as one kernel for all, since loading is what takes the time.
template <class Call>
DSKD_DEVICE void store_operands(const Call& call, void* to, const FloatTile& tile, int64_t row, int64_t channel,
                                int64_t rows) {
  if (call.product == Product::bfloat16) {
    store_tile<Product::bfloat16>(to, tile, row, call.c_pad, channel, 0, rows);
  } else if (call.product == Product::float16) {
    store_tile<Product::float16>(to, tile, row, call.c_pad, channel, 0, rows);
  } else {
    const int dropped_bits = call.product == Product::tfloat32 ? 13 : call.dropped_bits;
    store_tile<Product::plain>(to, tile, row, call.c_pad, channel, dropped_bits, rows);
  }
}

__global__ void __launch_bounds__(kPositionThreads, 4) keys_kernel(const Keys call) {
  __shared__ double shared[kLanes][kPositions];
  __shared__ FloatTile tile;
  const int64_t count = call.shape.positions, blocks = (count + kPositions - 1) / kPositions;
  const int64_t group = blockIdx.x / blocks, channels = call.shape.channels;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks) * kPositions;
  const bool is_key = start + p < count;
  const Place key(call.keys, call.shape, group, is_key ? start + p : 0);
  double squares = 0;
  for (int64_t c = lane; c < channels; c += kLanes) squares += key[c] * key[c];
  const double inverse = inverse_norm_of(sum_of_lanes(squares, shared), call.normalize);
  const double* centre = call.centre + group * channels;
  const float scale = call.product == Product::float16 ? kHalfScale : 1.0f;
  for (int64_t start_c = 0; start_c < call.c_pad; start_c += kColumns) {
    __syncthreads();
    for (int column = lane; column < kColumns; column += kLanes) {
      const int64_t c = start_c + column;
      const double k = is_key && c < channels ? key[c] * inverse - centre[c] : 0;
      tile[p][column] = static_cast<float>(k) * scale;
    }
    __syncthreads();
    store_operands(call, call.packed, tile, group * call.k_pad + call.start + start, start_c, count - start);
  }
}

__global__ void __launch_bounds__(kPositionThreads, 4) rows_kernel(const Distillation call) {
  __shared__ double shared[kLanes][kPositions];
  __shared__ FloatTile teacher_tile, delta_tile;
  const int blocks = static_cast<int>(call.n_pad / kPositions);
  const int64_t group = blockIdx.x / blocks, channels = call.shape.channels, n = call.shape.positions;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks) * kPositions;
  const bool is_row = start + p < call.rows;
  const int64_t row = is_row ? start + p : 0, image = group + row / n;
  const Place student(call.student, call.shape, image, row % n), teacher(call.teacher, call.shape, image, row % n);
  const auto [ss, tt, st] = Squares(student, teacher, is_row, channels, shared);
  const double s_inverse = inverse_norm_of(ss, call.normalize), t_inverse = inverse_norm_of(tt, call.normalize);
  const double s_rate = 1 / temperature_of(call.student_temperature, call.student_temperature_at);
  const double t_rate = 1 / temperature_of(call.teacher_temperature, call.teacher_temperature_at);
  float scale = 1, teacher_scale = 1;
  if (call.product == Product::float16) {
    // From |x|^2 + |y|^2 - 2<x, y>, which cancels; above its rounding error it is needed to within a factor only.
    const double x = s_inverse * s_rate, y = t_inverse * t_rate;
    const double least = 1e-15 * (s_rate * s_rate + t_rate * t_rate), size = ss * x * x + tt * y * y - 2 * st * x * y;
    scale = exp2_of(kHalfExponent - 1 - ceilf(0.5f * log2f(static_cast<float>(size < least ? least : size))));
    teacher_scale = kHalfScale;
  }
  const int64_t first = group * call.n_pad + start;
  for (int64_t start_c = 0; start_c < call.c_pad; start_c += kColumns) {
    __syncthreads();
    for (int column = lane; column < kColumns; column += kLanes) {
      const int64_t c = start_c + column;
      double t = 0, d = 0;
      if (is_row && c < channels) {
        t = teacher[c] * t_inverse;
        d = student[c] * s_inverse * s_rate - t * t_rate;
      }
      teacher_tile[p][column] = static_cast<float>(t) * teacher_scale;
      delta_tile[p][column] = static_cast<float>(d) * scale;
    }
    __syncthreads();
    store_operands(call, call.rows_teacher, teacher_tile, first, start_c, kPositions);
    store_operands(call, call.rows_delta, delta_tile, first, start_c, kPositions);
  }
  if (lane != 0) return;
  call.c_scale[first + p] = 1 / (scale * teacher_scale);
  call.inverse_norm[first + p] = s_inverse;
}

// gradient_i = (g_i - <g_i, s_i> s_i) / |student_i|, with g_i that of the unit vector s_i; without normalisation g_i.
__global__ void __launch_bounds__(kPositionThreads, 4) project_kernel(const Distillation call) {
  __shared__ double shared[kLanes][kPositions];
  __shared__ FloatTile tile;
  const int blocks = static_cast<int>(call.n_pad / kPositions);
  const int64_t group = blockIdx.x / blocks, channels = call.shape.channels, n = call.shape.positions;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks) * kPositions;
  const int64_t first_row = group * call.n_pad + start;
  const bool is_row = start + p < call.rows;
  const int64_t row = is_row ? start + p : 0, image = group + row / n;
  const Place student(call.student, call.shape, image, row % n), to(call.gradient, call.shape, image, row % n);
  const bool has_gradient = is_row && call.row[first_row + p].factor != 0;
  const double inverse = call.inverse_norm[first_row + p];
  // 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
  const float limited = inverse > kLargest ? kLargest : static_cast<float>(inverse);
  float along = 0;
  for (int sweep = call.normalize ? 0 : 1; sweep < 2; sweep++) {
    for (int64_t start_c = 0; start_c < channels; start_c += kColumns) {
      __syncthreads();
      const int column = static_cast<int>(threadIdx.x) % kColumns;
      for (int r = static_cast<int>(threadIdx.x) / kColumns; r < kPositions && start + r < call.rows;
           r += kPositionThreads / kColumns) {
        const DistilledRow& of_row = call.row[first_row + r];
        const float* at = call.raw + (first_row + r) * call.c_pad + start_c + column;
        float g = 0;
        for (int split = 0; of_row.factor != 0 && split < call.backward.count; split++)
          g += at[split * call.groups * call.n_pad * call.c_pad];
        // The shift first: the factor alone may be too small for float32 to carry both.
        tile[r][column] = g * exp2_of(-of_row.shift) * of_row.factor;
      }
      __syncthreads();
      for (int k = lane; k < kColumns; k += kLanes) {
        const int64_t c = start_c + k;
        if (!is_row || c >= channels) continue;
        const float s = static_cast<float>(student[c] * inverse);
        if (sweep == 0) {
          along += tile[p][k] * s;
        } else {
          static_cast<float*>(call.gradient.data)[to.offset + c * to.stride_c] =
              has_gradient ? (tile[p][k] - along * s) * limited : 0;
        }
      }
    }
    if (sweep == 0) along = static_cast<float>(sum_of_lanes(along, shared));
  }
}

dim3 blocks_of(const Distillation& call) {
  return dim3(static_cast<unsigned>(call.groups * (call.n_pad / kPositions)));
}

}  // namespace

const char* prepare_keys(const Keys& call, void* stream) {
  const int64_t blocks = call.shape.batch * ((call.shape.positions + kPositions - 1) / kPositions);
  return launch("keys", keys_kernel, dim3(static_cast<unsigned>(blocks)), kPositionThreads, 0, stream, call);
}

const char* prepare_rows(const Distillation& call, void* stream) {
  return launch("rows", rows_kernel, blocks_of(call), kPositionThreads, 0, stream, call);
}

const char* project_rows(const Distillation& call, void* stream) {
  return launch("project", project_kernel, blocks_of(call), kPositionThreads, 0, stream, call);
}

}  // namespace dskd
