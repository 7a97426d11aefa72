// Kernels over pairs of positions: the KL map, and its gradient with respect to the unit student vectors.
//
// The form, the names and the two kinds of rows (near and other) are those of kernels/README.md. A block of 8 warps
// works on 64 rows and goes through the keys in tiles of 64: four groups of 16 rows by two halves of the keys. Operands
// come in pieces of 128 bytes a row, the next being copied while one is multiplied.
#include "arithmetic.cuh"

namespace dskd {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = kHasTensorCores ? 2 : 1;
// Words of 32 bits in a row of a piece; the padding spreads rows over the banks.
constexpr int kPieceWords = 32, kStrideWords = kPieceWords + 4;
constexpr int kMatrixWords = kTile * kStrideWords, kStageWords = 3 * kMatrixWords;
// Channels whose gradient a block sums up in registers.
constexpr int kChannels = 256;

// The student's logits reach 2/T. Up to kFar their exponentials, and sums of 2^17 of them, are in float32's range; they
// cannot exceed it unless T < 1/kFarBelow. There a second sum is kept, lowered by kFarShift.
constexpr float kFar = 95.0f, kFarShift = 190.0f;
constexpr double kFarBelow = 32.0;

template <Product kProduct>
struct Piece {
  using Element = typename Operand<kProduct>::type;
  static constexpr int kChannelsOf = kPieceWords * 4 / static_cast<int>(sizeof(Element));
  static constexpr bool kIsHalf = sizeof(Element) == 2;
  // The weights of a tile in shared memory.
  static constexpr int kWeightWords = kTile * static_cast<int>(sizeof(Element)) / 4 + 4;
};

template <Product kProduct>
constexpr int shared_bytes(int stages, bool with_weights) {
  return (stages * kStageWords + (with_weights ? kTile * Piece<kProduct>::kWeightWords : 0)) * 4;
}

// Where a thread stands: row group and half of its warp, and its place in a matrix fragment.
struct Lane {
  int group, half, g, t;
  DSKD_DEVICE Lane() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    group = warp / 2;
    half = warp % 2;
    g = lane / 4;
    t = lane % 4;
  }
};

// Brings piece after piece of the operands into shared memory: of every tile of keys first all channels, with the rows'
// keys and differences, then `extra` pieces of the keys alone, from channel `first` on.
template <Product kProduct>
struct Pieces {
  using Element = typename Piece<kProduct>::Element;

  const Element *keys, *delta;  // of the image
  int64_t c_pad;
  int start_i, tiles, common, extra, first;
  uint32_t* shared;
  int tile = 0, piece = 0, filled = 0, used = 0;

  DSKD_DEVICE void start() {
    if (tile < tiles) {
      const bool with_rows = piece < common;
      const int channel = (with_rows ? piece : piece - common) * Piece<kProduct>::kChannelsOf + (with_rows ? 0 : first);
      uint32_t* to = shared + filled * kStageWords;
      for (int part = static_cast<int>(threadIdx.x); part < kTile * 8; part += kThreads) {
        const int row = part / 8, word = part % 8 * 4;
        const int64_t inside = channel + part % 8 * static_cast<int>(16 / sizeof(Element));
        uint32_t* place = to + row * kStrideWords + word;
        copy_async(place, keys + (static_cast<int64_t>(tile) * kTile + row) * c_pad + inside);
        if (with_rows) {
          copy_async(place + kMatrixWords, keys + static_cast<int64_t>(start_i + row) * c_pad + inside);
          copy_async(place + 2 * kMatrixWords, delta + static_cast<int64_t>(start_i + row) * c_pad + inside);
        }
      }
      if (++piece == common + extra) {
        piece = 0;
        tile++;
      }
      filled = (filled + 1) % kStages;
    }
    commit_copies();
  }

  DSKD_DEVICE const uint32_t* acquire() {
    start();
    wait_for_copies<kStages - 1>();
    __syncthreads();
    return shared + used * kStageWords;
  }

  DSKD_DEVICE void release() {
    __syncthreads();
    used = (used + 1) % kStages;
  }
};

// sum += the warp's 16 rows times 8 * kColumns columns, both given as rows of a piece.
template <Product kProduct, int kColumns>
DSKD_DEVICE void multiply_piece(float (&sum)[kColumns][4], const uint32_t* rows, const uint32_t* columns,
                                const Lane& lane) {
  if constexpr (kProduct == Product::plain) {
    for (int w = 0; w < kPieceWords; w++) {
      const float a0 = float_of(rows[lane.g * kStrideWords + w]), a1 = float_of(rows[(lane.g + 8) * kStrideWords + w]);
#pragma unroll
      for (int n = 0; n < kColumns; n++) {
        const uint32_t* column = columns + (8 * n + 2 * lane.t) * kStrideWords + w;
        const float b0 = float_of(column[0]), b1 = float_of(column[kStrideWords]);
        sum[n][0] += a0 * b0;
        sum[n][1] += a0 * b1;
        sum[n][2] += a1 * b0;
        sum[n][3] += a1 * b1;
      }
    }
  } else {
#pragma unroll
    for (int w = 0; w < kPieceWords; w += 8) {
      const uint32_t *upper = rows + lane.g * kStrideWords + w + lane.t, *lower = upper + 8 * kStrideWords;
      const uint32_t a[4] = {upper[0], lower[0], upper[4], lower[4]};
#pragma unroll
      for (int n = 0; n < kColumns; n++) {
        const uint32_t* column = columns + (8 * n + lane.g) * kStrideWords + w + lane.t;
        const uint32_t b[2] = {column[0], column[4]};
        multiply<kProduct>(sum[n], a, b);
      }
    }
  }
}

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
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) a[n][e] = c[n][e] = 0;
  for (int piece = 0; piece < pieces.common; piece++) {
    const uint32_t* stage = pieces.acquire();
    const uint32_t* columns = stage + lane.half * 32 * kStrideWords;
    const uint32_t* row_keys = stage + kMatrixWords + lane.group * 16 * kStrideWords;
    multiply_piece<kProduct>(a, row_keys, columns, lane);
    multiply_piece<kProduct>(c, row_keys + kMatrixWords, columns, lane);
    pieces.release();
  }
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

DSKD_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

DSKD_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
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
  Pieces<kProduct> pieces{static_cast<const Element*>(call.keys) + offset,
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

// sum += the warp's 16 rows of weights times its half of a piece's channels.
template <Product kProduct, int kColumns>
DSKD_DEVICE void multiply_weights(float (&sum)[kColumns][4], const uint32_t* weights, const uint32_t* keys,
                                  const Lane& lane) {
  constexpr int kWeightWords = Piece<kProduct>::kWeightWords;
  const int channel = lane.half * 8 * kColumns;
  if constexpr (kProduct == Product::plain) {
    for (int j = 0; j < kTile; j++) {
      const float a0 = float_of(weights[lane.g * kWeightWords + j]),
                  a1 = float_of(weights[(lane.g + 8) * kWeightWords + j]);
#pragma unroll
      for (int n = 0; n < kColumns; n++) {
        const uint32_t* key = keys + j * kStrideWords + channel + 8 * n + 2 * lane.t;
        const float b0 = float_of(key[0]), b1 = float_of(key[1]);
        sum[n][0] += a0 * b0;
        sum[n][1] += a0 * b1;
        sum[n][2] += a1 * b0;
        sum[n][3] += a1 * b1;
      }
    }
  } else {
    constexpr int kKeysOf = Piece<kProduct>::kIsHalf ? 16 : 8;  // of a fragment
    for (int j = 0; j < kTile; j += kKeysOf) {
      const uint32_t *upper = weights + lane.g * kWeightWords + j * 8 / kKeysOf + lane.t,
                     *lower = upper + 8 * kWeightWords;
      const uint32_t a[4] = {upper[0], lower[0], upper[4], lower[4]};
#pragma unroll
      for (int n = 0; n < kColumns; n++) {
        const int at = channel + 8 * n + lane.g;
        uint32_t b[2];
        if constexpr (Piece<kProduct>::kIsHalf) {
          const uint16_t* key = reinterpret_cast<const uint16_t*>(keys) + (j + 2 * lane.t) * 2 * kStrideWords + at;
          b[0] = key[0] | static_cast<uint32_t>(key[2 * kStrideWords]) << 16;
          b[1] = key[16 * kStrideWords] | static_cast<uint32_t>(key[18 * kStrideWords]) << 16;
        } else {
          b[0] = keys[(j + lane.t) * kStrideWords + at];
          b[1] = keys[(j + lane.t + 4) * kStrideWords + at];
        }
        multiply<kProduct>(sum[n], a, b);
      }
    }
  }
}

template <Product kProduct, bool kNear, bool kFarRows>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const Affinity call) {
  if constexpr (kHasTensorCores || kProduct == Product::plain) {
    using Element = typename Piece<kProduct>::Element;
    constexpr int kWeightWords = Piece<kProduct>::kWeightWords, kChannelsOf = Piece<kProduct>::kChannelsOf;
    constexpr int kMost = kChannels / kChannelsOf, kColumns = kChannelsOf / 16;
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
    float sum[kMost][kColumns][4];
#pragma unroll
    for (int p = 0; p < kMost; p++)
#pragma unroll
      for (int n = 0; n < kColumns; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[p][n][k] = 0;
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
      // The barrier of the next piece makes the weights visible, and that of the next tile's first one keeps them.
#pragma unroll
      for (int p = 0; p < kMost; p++) {
        if (p < pieces.extra) {
          const uint32_t* stage = pieces.acquire();
          multiply_weights<kProduct>(sum[p], weights + lane.group * 16 * kWeightWords, stage, lane);
          pieces.release();
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kMost; p++) {
      if (p < pieces.extra) {
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int channel = first + p * kChannelsOf + (lane.half * kColumns + n) * 8 + 2 * lane.t + k % 2;
            call.raw[(image * call.n_pad + rows.place[k / 2]) * call.c_pad + channel] = sum[p][n][k];
          }
        }
      }
    }
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
