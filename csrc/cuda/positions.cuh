// Reading and writing blocks of positions of (B, C, H, W) tensors of any strides.
//
// A block of 256 threads works on 32 positions: a warp's lanes are the positions, its eight warps take every eighth
// channel.
#pragma once

#include "arithmetic.cuh"

namespace dskd {
namespace {

constexpr int kPositions = 32, kLanes = 8, kPositionThreads = kPositions * kLanes;
// Channels of a tile that passes through shared memory, where rows are one longer to spread over the banks.
constexpr int kColumns = 32;
using FloatTile = float[kPositions][kColumns + 1];

// One position of a tensor.
struct Place {
  const void* data;
  Dtype dtype;
  int64_t offset, stride_c;

  DSKD_DEVICE Place(const Maps& maps, const Shape& shape, int64_t image, int64_t position)
      : data(maps.data), dtype(maps.dtype), stride_c(maps.stride_c) {
    offset = image * maps.stride_b + position / shape.width * maps.stride_h + position % shape.width * maps.stride_w;
  }

  DSKD_DEVICE double operator[](int64_t channel) const {
    const int64_t at = offset + channel * stride_c;
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(data)[at];
    return dtype == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
  }
};

// The sum over a position's eight threads, in the same order each time.
DSKD_DEVICE double sum_of_lanes(double x, double (&shared)[kLanes][kPositions]) {
  const int p = static_cast<int>(threadIdx.x) % kPositions, lane = static_cast<int>(threadIdx.x) / kPositions;
  __syncthreads();
  shared[lane][p] = x;
  __syncthreads();
  double sum = 0;
  for (int l = 0; l < kLanes; l++) sum += shared[l][p];
  return sum;
}

// |student|^2, |teacher|^2 and <student, teacher> of a position.
struct Squares {
  double ss = 0, tt = 0, st = 0;

  DSKD_DEVICE Squares(const Place& student, const Place& teacher, bool is_position, int64_t channels,
                      double (&shared)[kLanes][kPositions]) {
#pragma unroll 1
    for (int64_t c = threadIdx.x / kPositions; is_position && c < channels; c += kLanes) {
      const double x = student[c], y = teacher[c];
      ss += x * x;
      tt += y * y;
      st += x * y;
    }
    ss = sum_of_lanes(ss, shared);
    tt = sum_of_lanes(tt, shared);
    st = sum_of_lanes(st, shared);
  }
};

// 1/|x| from |x|^2; 0 for a vector of zeros, which has no direction.
DSKD_DEVICE double inverse_of(double squares) { return squares > 0 ? 1 / sqrt(squares) : squares * 0; }

// The first `rows` rows of a tile, as operands from row `row` and channel `channel` on.
template <Product kProduct>
DSKD_DEVICE void store_tile(void* to, const FloatTile& tile, int64_t row, int64_t c_pad, int64_t channel,
                            int dropped_bits, int64_t rows = kPositions) {
  using Element = typename Operand<kProduct>::type;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  for (int r = static_cast<int>(threadIdx.x) / kColumns; r < kPositions && r < rows; r += kPositionThreads / kColumns)
    static_cast<Element*>(to)[(row + r) * c_pad + channel + column] =
        Operand<kProduct>::from(tile[r][column], dropped_bits);
}

}  // namespace
}  // namespace dskd
