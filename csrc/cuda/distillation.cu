// Affinity distillation over pairs of a row and a key: the KL map, and its gradient with respect to the vectors of the
// student that are compared with keys.
//
// The form and the names are those of kernels/README.md, blocks and tiles those of tiles.cuh. The keys are split among
// blocks where the rows are few. A thread has sums of its own, of the keys that it sees, and they are merged at the
// end.
#include "distillation.cuh"
#include "tiles.cuh"

namespace dskd {
namespace {

// Which rows and which tiles of keys a block works on. Blocks that run at the same time see the same keys.
struct Part {
  int64_t group, split;
  int start_i, first_tile, end_tile;

  DSKD_DEVICE Part(const Distillation& call, const Splits& splits) {
    const int blocks = static_cast<int>(call.n_pad / kTile);
    const int64_t of_split = call.groups * blocks, index = blockIdx.x % of_split;
    split = blockIdx.x / of_split;
    group = index / blocks;
    start_i = static_cast<int>(index % blocks) * kTile;
    const int tiles = static_cast<int>(call.k_pad / kTile);
    first_tile = static_cast<int>(split) * splits.tiles;
    end_tile = first_tile + splits.tiles < tiles ? first_tile + splits.tiles : tiles;
  }

  // The block's first row, in all splits.
  DSKD_DEVICE int64_t first_row(const Distillation& call) const {
    return (split * call.groups + group) * call.n_pad + start_i;
  }
};

DSKD_DEVICE bool takes_part(const Distillation& call, int64_t group, int64_t row) {
  return row < call.rows && (call.row_mask == nullptr || call.row_mask[group * call.rows + row]);
}

// Whether a row of the block takes part.
DSKD_DEVICE bool is_served(const Distillation& call, const Part& part) {
  return __syncthreads_or(takes_part(call, part.group, part.start_i + static_cast<int>(threadIdx.x) % kTile));
}

template <Product kProduct>
DSKD_DEVICE Pieces<kProduct> pieces_of(const Distillation& call, const Part& part, int extra, int first,
                                       uint32_t* shared) {
  using Element = typename Piece<kProduct>::Element;
  const int64_t offset = part.group * call.n_pad * call.c_pad;
  Pieces<kProduct> pieces{static_cast<const Element*>(call.keys) + part.group * call.keys_stride,
                          static_cast<const Element*>(call.rows_teacher) + offset,
                          static_cast<const Element*>(call.rows_delta) + offset,
                          call.c_pad,
                          part.start_i,
                          part.end_tile,
                          static_cast<int>(call.c_pad / Piece<kProduct>::kChannelsOf),
                          extra,
                          first,
                          shared,
                          part.first_tile};
  if (kStages > 1) pieces.start();
  return pieces;
}

// What turns products into logits.
template <Product kProduct>
struct Scales {
  float a, c[2];
  const bool* mask;
  int count;

  DSKD_DEVICE Scales(const Distillation& call, const Part& part, const Lane& lane) {
    const double scale = kProduct == Product::float16 ? static_cast<double>(kHalfScale) * kHalfScale : 1.0;
    a = static_cast<float>(kLog2E / (temperature_of(call.teacher_temperature, call.teacher_temperature_at) * scale));
    const float* c_scale = call.c_scale + part.group * call.n_pad + part.start_i + lane.group * 16 + lane.g;
    c[0] = c_scale[0];
    c[1] = c_scale[8];
    mask = call.key_mask == nullptr ? nullptr : call.key_mask + part.group * call.key_mask_stride;
    count = static_cast<int>(call.count);
  }
};

// a and c of the thread's part of a tile, in units of log 2 the one.
template <Product kProduct>
DSKD_DEVICE void logits(Pieces<kProduct>& pieces, const Scales<kProduct>& scales, int start_j, const Lane& lane,
                        float (&a)[4][4], float (&c)[4][4]) {
  multiply_tile(pieces, lane, a, c);
#pragma unroll
  for (int n = 0; n < 4; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int j = start_j + lane.half * 32 + 8 * n + 2 * lane.t + e;
      const float bias = j < scales.count && (scales.mask == nullptr || scales.mask[j]) ? 0.0f : -INFINITY;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        a[n][2 * r + e] = a[n][2 * r + e] * scales.a + bias;
        c[n][2 * r + e] *= scales.c[r];
      }
    }
  }
}

template <Product kProduct>
__global__ void __launch_bounds__(kThreads, kProduct == Product::plain ? 1 : 2)
    forward_kernel(const Distillation call) {
  if constexpr (kHasTensorCores || kProduct == Product::plain) {
    DSKD_SHARED(memory);
    const Part part(call, call.forward);
    if (!is_served(call, part)) return;
    const Lane lane;
    const Scales<kProduct> scales(call, part, lane);
    auto pieces = pieces_of<kProduct>(call, part, 0, 0, reinterpret_cast<uint32_t*>(memory));
    Sums sums[2];
    for (int tile = part.first_tile; tile < part.end_tile; tile++) {
      float a[4][4], c[4][4];
      logits(pieces, scales, tile * kTile, lane, a, c);
#pragma unroll
      for (int r = 0; r < 2; r++) sums[r].add(a, c, r);
    }
    // The four threads of a row, then the second half of the keys, through shared memory that the pieces have left.
    DistilledSums* other = reinterpret_cast<DistilledSums*>(memory);
    const int row = lane.group * 16 + lane.g;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sums[r].add(sums[r].of_lane(1));
      sums[r].add(sums[r].of_lane(2));
      if (lane.half == 1 && lane.t == 0) other[row + 8 * r] = sums[r];
    }
    __syncthreads();
    if (lane.half == 1 || lane.t != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sums[r].add(other[row + 8 * r]);
      call.sums[part.first_row(call) + row + 8 * r] = sums[r];
    }
  }
}

constexpr int kRowThreads = 128;

// A row's KL, and what the gradient needs of it, from the sums of the splits in their order.
__global__ void __launch_bounds__(kRowThreads) finish_kernel(const Distillation call) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (at >= call.groups * call.rows) return;
  const int64_t group = at / call.rows, place = group * call.n_pad + at % call.rows;
  Sums sums;
  const bool is_row = takes_part(call, group, at % call.rows);
  for (int64_t split = 0; is_row && split < call.forward.count; split++)
    sums.add(call.sums[split * call.groups * call.n_pad + place]);
  DistilledRow row{};
  double divergence = 0;
  if (is_row && sums.z != 0) {
    const double z = sums.z, mean = sums.s / z, v = sums.v / z;
    double u = v + mean, log_ratio = log2(1 + u);
    divergence = u <= 0.5 ? v - log1p_tail(u) : log1p(u) - mean;
    if (sums.lift > 0) {
      // Of v alone, next to which nothing else has a digit.
      log_ratio = sums.lift + log2(v);
      divergence = log_ratio * kLn2 - mean;
      u = exp2(log_ratio);
    }
    row.m = sums.m;
    row.h = sums.h;
    row.u = static_cast<float>(u > 0x1p100 ? 0x1p100 : u);
    row.lift = static_cast<float>(ceil(log_ratio));
    row.rest = static_cast<float>(exp2(row.lift - log_ratio));
    row.factor = static_cast<float>(1 / (z * temperature_of(call.student_temperature, call.student_temperature_at)));
    if (call.product == Product::float16) {
      // |E expm1(x)| is at most 1.72 |E x| <= 2.84 sqrt(E tail) where |x| <= 1, else 2.8 E tail, tail being expm1(x) -
      // x; and z is the most that E / p can be.
      const double bound = (2.84 * sqrt(v * z) + 2.8 * v * z + u) / (1 + u),
                   limit = sums.lift > 0 || bound > z ? z : bound;
      row.shift = static_cast<float>(kHalfExponent - ceil(log2(limit < 1e-18 ? 1e-18 : limit)));
      row.factor /= kHalfScale;
    }
  }
  // Rounding may bring v below log1p_tail(u).
  call.kl[at] = static_cast<float>(divergence < 0 ? 0 : divergence);
  call.row[place] = row;
}

template <Product kProduct>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const Distillation call) {
  if constexpr (kHasTensorCores || kProduct == Product::plain) {
    using Element = typename Piece<kProduct>::Element;
    constexpr int kWeightWords = Piece<kProduct>::kWeightWords, kChannelsOf = Piece<kProduct>::kChannelsOf;
    constexpr bool kShifted = kProduct == Product::float16;  // elsewhere the shift is 0
    DSKD_SHARED(memory);
    uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
    uint32_t* weights = shared + kStages * kStageWords;
    const Part part(call, call.backward);
    if (!is_served(call, part)) return;
    const Lane lane;
    const Scales<kProduct> scales(call, part, lane);
    DistilledRow rows[2];
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      rows[r] = call.row[part.group * call.n_pad + part.start_i + lane.group * 16 + lane.g + 8 * r];
      inverse[r] = 1 / (1 + rows[r].u);
      if (kShifted) rows[r].lift -= rows[r].shift;
    }
    const int first = static_cast<int>(blockIdx.y) * kChannels, rest = static_cast<int>(call.c_pad) - first;
    const int channels = rest < kChannels ? rest : kChannels;
    auto pieces = pieces_of<kProduct>(call, part, channels / kChannelsOf, first, shared);
    WeightedKeys<kProduct> sum;
    for (int tile = part.first_tile; tile < part.end_tile; tile++) {
      float a[4][4], c[4][4];
      logits(pieces, scales, tile * kTile, lane, a, c);
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int r = k / 2;
          const float below = a[n][k] - rows[r].m, x = c[n][k] - rows[r].h;
          const float e = exp2_of(kShifted ? below + rows[r].shift : below);
          const float near = e * ((expm1_tail(x) + (x - rows[r].u)) * inverse[r]);
          const float other = exp2_of(below + x * static_cast<float>(kLog2E) - rows[r].lift) * rows[r].rest - e;
          const int row = lane.group * 16 + lane.g + 8 * r, j = lane.half * 32 + 8 * n + 2 * lane.t + k % 2;
          reinterpret_cast<Element*>(weights + row * kWeightWords)[j] =
              Operand<kProduct>::from(fabsf(x) <= kRadius ? near : other, call.dropped_bits);
        }
      }
      sum.add_tile(pieces, weights, lane);
    }
    sum.store(call.raw + (part.first_row(call) + lane.group * 16 + lane.g) * call.c_pad, call.c_pad, pieces, lane);
  }
}

template <Product kProduct>
const char* launch_all(const Distillation& call, int capability, void* stream) {
  const int stages = capability >= 80 ? 2 : 1;
  const int64_t blocks = call.groups * (call.n_pad / kTile);
  const char* failed =
      launch("forward", forward_kernel<kProduct>, dim3(static_cast<unsigned>(blocks * call.forward.count)), kThreads,
             shared_bytes<kProduct>(stages, false), stream, call);
  if (failed != nullptr) return failed;
  const int64_t rows = call.groups * call.rows;
  failed = launch("finish", finish_kernel, dim3(static_cast<unsigned>((rows + kRowThreads - 1) / kRowThreads)),
                  kRowThreads, 0, stream, call);
  if (failed != nullptr || call.gradient.data == nullptr) return failed;
  const unsigned parts = static_cast<unsigned>((call.c_pad + kChannels - 1) / kChannels);
  return launch("gradient", gradient_kernel<kProduct>, dim3(static_cast<unsigned>(blocks * call.backward.count), parts),
                kThreads, shared_bytes<kProduct>(stages, true), stream, call);
}

}  // namespace

const char* distillation(const Distillation& call, int capability, void* stream) {
  return with_product(call.product, [&](auto product) { return launch_all<product.value>(call, capability, stream); });
}

}  // namespace dskd
