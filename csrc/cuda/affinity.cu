// Kernels over pairs of positions: the KL map, and its gradient with respect to the unit student vectors.
//
// The form, the names and the two kinds of rows (near and other) are those of kernels/README.md, blocks and tiles those
// of tiles.cuh.
#include "tiles.cuh"

namespace dskd {
namespace {

// The student's logits reach 2/T. Up to kFar their exponentials, and sums of 2^17 of them, are in float32's range; they
// cannot exceed it unless T < 1/kFarBelow. There a second sum is kept, lowered by kFarShift.
constexpr float kFar = 95.0f, kFarShift = 190.0f;
constexpr double kFarBelow = 32.0;

// What a thread knows of its two rows, g and g + 8 of its group.
struct RowPair {
  int place[2];
  float constant[2], c_shift[2], c_scale[2];

  DSKD_DEVICE RowPair(const Affinity& call, int64_t image, int start_i, const Lane& lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      place[r] = start_i + lane.group * 16 + lane.g + 8 * r;
      const int64_t at = image * call.n_pad + place[r];
      constant[r] = call.own_logit[at];
      c_shift[r] = call.c_shift[at];
      c_scale[r] = call.c_scale[at];
    }
  }
};

// a and c of the thread's part of a tile: 16 pairs of its two rows and eight keys, in units of log 2 the one.
template <Product kProduct>
DSKD_DEVICE void logits(Pieces<kProduct>& pieces, const RowPair& rows, const float* bias, int start_j,
                        float logit_scale, const Lane& lane, float (&a)[4][4], float (&c)[4][4]) {
  multiply_tile(pieces, lane, a, c);
#pragma unroll
  for (int n = 0; n < 4; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int r = e / 2, j = start_j + lane.half * 32 + 8 * n + 2 * lane.t + e % 2;
      a[n][e] = a[n][e] * logit_scale + (bias[j] - rows.constant[r]);
      c[n][e] = c[n][e] * rows.c_scale[r] - rows.c_shift[r];
      if (j == rows.place[r]) a[n][e] = kNever;  // the own key is added exactly
    }
  }
}

// Sums over the keys of a row, its own apart: E, E c, E (expm1(c) - c), E exp(c), the last lowered; the largest weight.
struct Sums {
  float z = 0, first = 0, tail = 0, z_student = 0, z_far = 0, largest = 0;

  DSKD_DEVICE void add(const Sums& other) {
    z += other.z;
    first += other.first;
    tail += other.tail;
    z_student += other.z_student;
    z_far += other.z_far;
    largest = fmaxf(largest, other.largest);
  }
};

// A row's KL, and what the gradient needs of it.
template <Product kProduct, bool kNear, bool kFarRows>
DSKD_DEVICE void finish_row(const Affinity& call, int64_t image, int row, const Sums& others) {
  const int64_t place = image * call.n_pad + row;
  const float own = call.c_own[place];
  const bool is_close = fabsf(own) <= kRadius;
  const double z = 1.0 + others.z, first = static_cast<double>(others.first) + own;
  const double tail =
      static_cast<double>(others.tail) + (kNear || is_close ? expm1_tail(own) : expm1(static_cast<double>(own)) - own);
  const double z_student = static_cast<double>(others.z_student) + exp(static_cast<double>(own));
  const double mean = first / z, v = tail / z;
  double u = v + mean;
  // Where most of the student's weight has left the row's own key, 1 + u has lost its digits.
  const double ratio = kNear || u > -0.5 ? 1 + u : z_student / z;
  double divergence = u <= 0.5 && u >= -0.5 ? v - log1p_tail(u) : log(ratio) - mean;
  float teacher_exponent = 0, top = 0;
  if (kProduct == Product::float16) {
    // No |E (expm1(c) - u)| of the row is larger than this, nor are all smaller than a fraction 1/(2N) of it.
    const float largest = others.largest + fabsf(static_cast<float>(u)) * fminf(others.z, 1.0f);
    teacher_exponent = kHalfExponent - ceilf(log2f(fmaxf(largest, 1e-30f)));
    top = kHalfExponent;
  }
  float student_exponent = teacher_exponent, student_rest = 0;
  double share = 1 / (z * ratio);
  if (kFarRows && !kNear) {
    const double lowered = static_cast<double>(others.z_far) + exp((own * kLog2E - kFarShift) * kLn2);
    if (lowered >= 0x1p-95) {  // 2^(kFar - kFarShift)
      // A far row's weights are the difference of two probabilities: 2^(a - log2 z), and likewise the student's.
      const double log_student = log(lowered) / kLn2 + kFarShift, log_teacher = log(z) / kLn2;
      divergence = (log_student - log_teacher) * kLn2 - mean;
      teacher_exponent = top - static_cast<float>(log_teacher);
      // In two numbers: rounded to one of some hundred's size it would leave four digits of the probabilities.
      student_exponent = top - static_cast<float>(log_student);
      student_rest = static_cast<float>(top - log_student - student_exponent);
      share = 1 / z;
      u = 0;
    }
  }
  // Rounding may bring v below log1p_tail(u). T^2 as one factor would underflow with the smallest T.
  divergence = divergence < 0 ? 0 : divergence;
  const double temperature = temperature_of(call);
  if (row < call.shape.positions)
    call.kl[image * call.shape.positions + row] = static_cast<float>(divergence * temperature * temperature);
  if (call.gradient.data == nullptr) return;
  call.u[place] = static_cast<float>(u);
  call.teacher_shift[place] = teacher_exponent;
  call.student_shift[place] = student_exponent;
  call.student_rest[place] = student_rest;
  call.factor[place] = static_cast<float>(share * temperature / (kProduct == Product::float16 ? kHalfScale : 1.0f));
}

template <Product kProduct>
DSKD_DEVICE float logit_scale_of(const Affinity& call) {
  const double scale = kProduct == Product::float16 ? static_cast<double>(kHalfScale) * kHalfScale : 1.0;
  return static_cast<float>(kLog2E / (temperature_of(call) * scale));
}

// Whether a block of rows is of the launch's kind; a block of NaN alone is near, where all others must be.
DSKD_DEVICE bool is_served(const Affinity& call, int64_t image, int start_i, bool near, bool far_rows) {
  const int row = start_i + static_cast<int>(threadIdx.x) % kTile;
  const bool has_other = __syncthreads_or(call.c_bound[image * call.n_pad + row] > kRadius);
  return has_other ? !near && (temperature_of(call) * kFarBelow < 1) == far_rows : near;
}

template <Product kProduct>
DSKD_DEVICE Pieces<kProduct> pieces_of(const Affinity& call, int64_t image, int start_i, int extra, int first,
                                       uint32_t* shared) {
  using Element = typename Piece<kProduct>::Element;
  const int64_t offset = image * call.n_pad * call.c_pad;
  const Element* keys = static_cast<const Element*>(call.keys) + offset;
  Pieces<kProduct> pieces{keys,
                          keys,
                          static_cast<const Element*>(call.delta) + offset,
                          call.c_pad,
                          start_i,
                          static_cast<int>(call.n_pad / kTile),
                          static_cast<int>(call.c_pad / Piece<kProduct>::kChannelsOf),
                          extra,
                          first,
                          shared};
  if (kStages > 1) pieces.start();
  return pieces;
}

template <Product kProduct, bool kNear, bool kFarRows>
__global__ void __launch_bounds__(kThreads, kProduct == Product::plain || kFarRows ? 1 : 2)
    forward_kernel(const Affinity call) {
  if constexpr (kHasTensorCores || kProduct == Product::plain) {
    DSKD_SHARED(memory);
    uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
    const int blocks = static_cast<int>(call.n_pad / kTile);
    const int64_t image = blockIdx.x / blocks;
    const int start_i = static_cast<int>(blockIdx.x % blocks) * kTile;
    if (!is_served(call, image, start_i, kNear, kFarRows)) return;
    const Lane lane;
    const RowPair rows(call, image, start_i, lane);
    auto pieces = pieces_of<kProduct>(call, image, start_i, 0, 0, shared);
    const float* bias = call.bias + image * call.n_pad;
    const float logit_scale = logit_scale_of<kProduct>(call);
    Sums sums[2];
    for (int tile = 0; tile < pieces.tiles; tile++) {
      float a[4][4], c[4][4];
      logits(pieces, rows, bias, tile * kTile, logit_scale, lane, a, c);
      // A tile's sums by themselves: long sums lose digits.
      Sums part[2];
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          Sums& to = part[k / 2];
          const float c_ij = c[n][k], e = exp2_of(a[n][k]), linear = e * c_ij;
          float term = e * expm1_tail(c_ij), weight = term + linear;
          if (!kNear) {
            const float logit = a[n][k] + c_ij * static_cast<float>(kLog2E);
            const float x = exp2_of(kFarRows ? fminf(logit, kFar) : logit);
            const bool is_close = fabsf(c_ij) <= kRadius;
            term = is_close ? term : x - (e + linear);
            weight = is_close ? weight : x - e;
            // fminf would drop a NaN.
            to.z_student += logit != logit ? logit : x;
            if (kFarRows) to.z_far += exp2_of(logit - kFarShift);
          }
          to.z += e;
          to.first += linear;
          to.tail += term;
          if (kProduct == Product::float16) to.largest = fmaxf(to.largest, fabsf(weight));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) sums[r].add(part[r]);
    }
    // The second half of the keys, through shared memory that the pieces have left.
    Sums* other = reinterpret_cast<Sums*>(memory);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sums[r] = {quad_sum(sums[r].z),         quad_sum(sums[r].first), quad_sum(sums[r].tail),
                 quad_sum(sums[r].z_student), quad_sum(sums[r].z_far), quad_max(sums[r].largest)};
      if (lane.half == 1 && lane.t == 0) other[rows.place[r] - start_i] = sums[r];
    }
    __syncthreads();
    if (lane.half == 1 || lane.t != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sums[r].add(other[rows.place[r] - start_i]);
      finish_row<kProduct, kNear, kFarRows>(call, image, rows.place[r], sums[r]);
    }
  }
}

template <Product kProduct, bool kNear, bool kFarRows>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const Affinity call) {
  if constexpr (kHasTensorCores || kProduct == Product::plain) {
    using Element = typename Piece<kProduct>::Element;
    constexpr int kWeightWords = Piece<kProduct>::kWeightWords, kChannelsOf = Piece<kProduct>::kChannelsOf;
    constexpr bool kShifted = kProduct == Product::float16 || kFarRows;  // elsewhere the shifts are 0
    DSKD_SHARED(memory);
    uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
    uint32_t* weights = shared + kStages * kStageWords;
    const int blocks = static_cast<int>(call.n_pad / kTile);
    const int64_t image = blockIdx.x / blocks;
    const int start_i = static_cast<int>(blockIdx.x % blocks) * kTile, first = static_cast<int>(blockIdx.y) * kChannels;
    if (!is_served(call, image, start_i, kNear, kFarRows)) return;
    const Lane lane;
    const RowPair rows(call, image, start_i, lane);
    float u[2], teacher_shift[2], student_shift[2], student_rest[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t place = image * call.n_pad + rows.place[r];
      u[r] = call.u[place];
      teacher_shift[r] = call.teacher_shift[place];
      student_shift[r] = call.student_shift[place];
      student_rest[r] = call.student_rest[place];
    }
    const int channels =
        static_cast<int>(call.c_pad) - first < kChannels ? static_cast<int>(call.c_pad) - first : kChannels;
    auto pieces = pieces_of<kProduct>(call, image, start_i, channels / kChannelsOf, first, shared);
    const float* bias = call.bias + image * call.n_pad;
    const float logit_scale = logit_scale_of<kProduct>(call);
    WeightedKeys<kProduct> sum;
    for (int tile = 0; tile < pieces.tiles; tile++) {
      float a[4][4], c[4][4];
      logits(pieces, rows, bias, tile * kTile, logit_scale, lane, a, c);
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int r = k / 2;
          const float c_ij = c[n][k], e = exp2_of(kShifted ? a[n][k] + teacher_shift[r] : a[n][k]);
          float weight = e * (expm1_tail(c_ij) + (c_ij - u[r]));
          if (!kNear) {
            float logit = a[n][k] + c_ij * static_cast<float>(kLog2E);  // to the bit as in the forward kernel
            bool is_close = fabsf(c_ij) <= kRadius;
            if (kShifted) logit = logit + student_shift[r] + student_rest[r];
            if (kFarRows) is_close = is_close && student_shift[r] == teacher_shift[r];
            weight = is_close ? weight : exp2_of(logit) - e * (1 + u[r]);
          }
          const int row = lane.group * 16 + lane.g + 8 * r, j = lane.half * 32 + 8 * n + 2 * lane.t + k % 2;
          reinterpret_cast<Element*>(weights + row * kWeightWords)[j] =
              Operand<kProduct>::from(weight, call.dropped_bits);
        }
      }
      sum.add_tile(pieces, weights, lane);
    }
    sum.store(call.raw + (image * call.n_pad + rows.place[0]) * call.c_pad, call.c_pad, pieces, lane);
  }
}

template <Product kProduct, bool kNear, bool kFarRows>
const char* launch_both(const Affinity& call, int capability, void* stream) {
  const int stages = capability >= 80 ? 2 : 1;
  const unsigned blocks = static_cast<unsigned>(call.shape.batch * (call.n_pad / kTile));
  const char* failed = launch("forward", forward_kernel<kProduct, kNear, kFarRows>, dim3(blocks), kThreads,
                              shared_bytes<kProduct>(stages, false), stream, call);
  if (failed != nullptr || call.gradient.data == nullptr) return failed;
  const unsigned parts = static_cast<unsigned>((call.c_pad + kChannels - 1) / kChannels);
  return launch("gradient", gradient_kernel<kProduct, kNear, kFarRows>, dim3(blocks, parts), kThreads,
                shared_bytes<kProduct>(stages, true), stream, call);
}

template <Product kProduct>
const char* launch_kinds(const Affinity& call, int capability, void* stream) {
  const char* failed = launch_both<kProduct, true, false>(call, capability, stream);
  const bool is_known = call.temperature_at == nullptr, is_far = call.temperature * kFarBelow < 1;
  // Rows are near, at the latest, where even opposite vectors are: |s - t| |t_j - t_i| / T <= 4/T.
  if (failed != nullptr || (is_known && call.temperature >= 4 / static_cast<double>(kRadius))) return failed;
  if (is_known && is_far) return launch_both<kProduct, false, true>(call, capability, stream);
  failed = launch_both<kProduct, false, false>(call, capability, stream);
  if (failed != nullptr || is_known) return failed;
  return launch_both<kProduct, false, true>(call, capability, stream);
}

}  // namespace

const char* affinity(const Affinity& call, int capability, void* stream) {
  return with_product(call.product,
                      [&](auto product) { return launch_kinds<product.value>(call, capability, stream); });
}

}  // namespace dskd
