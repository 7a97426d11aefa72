// Kernels over positions: normalise, subtract, centre and round; and the normalisation's Jacobian.
//
// Compiled with --fmad=false: x/|x| - y/|y| must be exactly 0 for equal vectors, and a fused multiply-add would round
// one of the two only.
#include "positions.cuh"

namespace dskd {
namespace {

// Sums of unit teacher vectors over a group of sampled positions, divided by the number of samples.
__global__ void __launch_bounds__(kPositionThreads, 4) centre_kernel(const Affinity call) {
  __shared__ double shared[kLanes][kPositions];
  const int64_t image = blockIdx.x / kGroups, n = call.shape.positions;
  const int group = static_cast<int>(blockIdx.x % kGroups), lane = static_cast<int>(threadIdx.x) / kPositions;
  const int p = static_cast<int>(threadIdx.x) % kPositions;
  static_assert(kGroups * kGroup == kSample);
  const int64_t samples = n < kSample ? n : kSample, i = group * kGroup + p;
  const bool is_sample = i < samples;
  const Place place(call.teacher, call.shape, image, is_sample ? sampled_position(i, n) : 0);
  double squares = 0;
  for (int64_t c = lane; c < call.shape.channels; c += kLanes) squares += place[c] * place[c];
  squares = sum_of_lanes(squares, shared);
  const double weight = inverse_of(squares) / static_cast<double>(samples);
  for (int64_t c = lane; c < call.c_pad; c += kLanes) {
    double sum = is_sample && c < call.shape.channels ? place[c] * weight : 0;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    if (p == 0) call.partial_mean[(image * kGroups + group) * call.c_pad + c] = sum;
  }
}

template <Product kProduct>
__global__ void __launch_bounds__(kPositionThreads, 4) prepare_kernel(const Affinity call) {
  __shared__ double shared[kLanes][kPositions];
  __shared__ FloatTile key_tile, delta_tile;
  const int blocks = static_cast<int>(call.n_pad / kPositions);
  const int64_t image = blockIdx.x / blocks, channels = call.shape.channels;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks) * kPositions, position = start + p;
  const bool is_position = position < call.shape.positions;
  const Place student(call.student, call.shape, image, is_position ? position : 0);
  const Place teacher(call.teacher, call.shape, image, is_position ? position : 0);
  const auto [ss, tt, st] = Squares(student, teacher, is_position, channels, shared);
  const double s_inverse = inverse_of(ss), t_inverse = inverse_of(tt);
  float scale = 1, key_scale = 1;
  if (kProduct == Product::float16) {
    // From |s|^2 + |t|^2 - 2<s, t>, which cancels; above its rounding error it is needed to within a factor only.
    const double size = ss * s_inverse * s_inverse + tt * t_inverse * t_inverse - 2 * st * s_inverse * t_inverse;
    scale = exp2_of(kHalfExponent - 1 - ceilf(0.5f * log2f(fmaxf(static_cast<float>(size), 1e-15f))));
    key_scale = kHalfScale;
  }
  double tk = 0, mk = 0, dk = 0, dd = 0;
  for (int64_t start_c = 0; start_c < call.c_pad; start_c += kColumns) {
    __syncthreads();
    for (int column = lane; column < kColumns; column += kLanes) {
      const int64_t c = start_c + column;
      double k = 0, d = 0;
      if (is_position && c < channels) {
        double mean = 0;
        for (int group = 0; group < kGroups; group++)
          mean += call.partial_mean[(image * kGroups + group) * call.c_pad + c];
        const double t = teacher[c] * t_inverse;
        k = t - mean;
        d = student[c] * s_inverse - t;
        tk += t * k;
        mk += mean * k;
        dk += d * k;
        dd += d * d;
      }
      key_tile[p][column] = static_cast<float>(k) * key_scale;
      delta_tile[p][column] = static_cast<float>(d) * scale;
    }
    __syncthreads();
    const int64_t row = image * call.n_pad + start;
    store_tile<kProduct>(call.keys, key_tile, row, call.c_pad, start_c, call.dropped_bits);
    store_tile<kProduct>(call.delta, delta_tile, row, call.c_pad, start_c, call.dropped_bits);
  }
  tk = sum_of_lanes(tk, shared);
  mk = sum_of_lanes(mk, shared);
  dk = sum_of_lanes(dk, shared);
  dd = sum_of_lanes(dd, shared);
  if (lane != 0) return;
  const int64_t row = image * call.n_pad + position;
  const double temperature = temperature_of(call);
  const float own = static_cast<float>(dk / temperature);
  const bool is_shifted = temperature < kOwnShiftBelow;
  call.bias[row] = is_position ? static_cast<float>(mk / temperature * kLog2E) : kNever;
  call.own_logit[row] = is_position ? static_cast<float>(tk / temperature * kLog2E) : -kNever;
  call.c_shift[row] = is_shifted ? own : own * 0;
  call.c_own[row] = is_shifted ? own * 0 : own;
  call.c_scale[row] = static_cast<float>(1 / temperature) / (scale * key_scale);
  call.c_bound[row] = static_cast<float>(2 * sqrt(dd) / temperature);
  call.inverse_norm[row] = s_inverse;
}

// What a row's own key adds to the sum of weights times keys.
DSKD_DEVICE float own_weight_of(float own, float u, float teacher_shift, float student_shift, float student_rest) {
  const float expm1_own = fabsf(own) <= kRadius ? expm1_tail(own) + own : expm1f(own);
  // Of a far row, the weight is the difference of two probabilities.
  return exp2_of(student_shift + student_rest) - exp2_of(teacher_shift) + exp2_of(teacher_shift) * (expm1_own - u);
}

// gradient_i = (g_i - <g_i, s_i> s_i) / |student_i|, with g_i that of the unit vector s_i.
template <Product kProduct>
__global__ void __launch_bounds__(kPositionThreads, 4) project_kernel(const Affinity call) {
  using Element = typename Operand<kProduct>::type;
  __shared__ double shared[kLanes][kPositions];
  __shared__ FloatTile tile;
  const int blocks = static_cast<int>(call.n_pad / kPositions);
  const int64_t image = blockIdx.x / blocks, channels = call.shape.channels;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks) * kPositions, first_row = image * call.n_pad + start;
  const bool is_position = start + p < call.shape.positions;
  const Place student(call.student, call.shape, image, is_position ? start + p : 0);
  const Place to(call.gradient, call.shape, image, is_position ? start + p : 0);
  const double inverse = call.inverse_norm[first_row + p];
  // 1/|student| beyond the largest float32 would turn a gradient of 0 into NaN.
  const float limited = inverse > kLargest ? kLargest : static_cast<float>(inverse);
  float along = 0;
  for (int sweep = 0; sweep < 2; sweep++) {
    for (int64_t start_c = 0; start_c < channels; start_c += kColumns) {
      __syncthreads();
      const int column = static_cast<int>(threadIdx.x) % kColumns;
      for (int r = static_cast<int>(threadIdx.x) / kColumns; r < kPositions; r += kPositionThreads / kColumns) {
        const int64_t row = first_row + r, at = row * call.c_pad + start_c + column;
        const float shift = call.teacher_shift[row];
        const float weight =
            own_weight_of(call.c_own[row], call.u[row], shift, call.student_shift[row], call.student_rest[row]);
        const float g = call.raw[at] + weight * Operand<kProduct>::to(static_cast<const Element*>(call.keys)[at]);
        // The shift first: the factor alone may be too small for float32 to carry both.
        tile[r][column] = g * exp2_of(-shift) * call.factor[row];
      }
      __syncthreads();
      for (int k = lane; k < kColumns; k += kLanes) {
        const int64_t c = start_c + k;
        if (!is_position || c >= channels) continue;
        const float s = static_cast<float>(student[c] * inverse);
        if (sweep == 0) {
          along += tile[p][k] * s;
        } else {
          static_cast<float*>(call.gradient.data)[to.offset + c * to.stride_c] = (tile[p][k] - along * s) * limited;
        }
      }
    }
    if (sweep == 0) along = static_cast<float>(sum_of_lanes(along, shared));
  }
}

dim3 blocks_of(const Affinity& call) {
  return dim3(static_cast<unsigned>(call.shape.batch * (call.n_pad / kPositions)));
}

}  // namespace

const char* prepare(const Affinity& call, void* stream) {
  const unsigned groups = static_cast<unsigned>(call.shape.batch * kGroups);
  const char* failed = launch("centre", centre_kernel, dim3(groups), kPositionThreads, 0, stream, call);
  if (failed != nullptr) return failed;
  return with_product(call.product, [&](auto product) {
    return launch("prepare", prepare_kernel<product.value>, blocks_of(call), kPositionThreads, 0, stream, call);
  });
}

const char* project(const Affinity& call, void* stream) {
  return with_product(call.product, [&](auto product) {
    return launch("project", project_kernel<product.value>, blocks_of(call), kPositionThreads, 0, stream, call);
  });
}

}  // namespace dskd
