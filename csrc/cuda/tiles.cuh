// What the kernels over pairs of a row and a key share: operands come into shared memory in pieces, and are multiplied.
//
// A block of 8 warps works on 64 rows and goes through the keys in tiles of 64: four groups of 16 rows by two halves of
// the keys. Operands come in pieces of 128 bytes a row, the next being copied while one is multiplied.
#pragma once

#include "arithmetic.cuh"

namespace dskd {
namespace {

constexpr int kThreads = 256;
constexpr int kStages = kHasTensorCores ? 2 : 1;
// Words of 32 bits in a row of a piece; the padding spreads rows over the banks.
constexpr int kPieceWords = 32, kStrideWords = kPieceWords + 4;
constexpr int kMatrixWords = kTile * kStrideWords, kStageWords = 3 * kMatrixWords;

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
// vectors and differences, then `extra` pieces of the keys alone, from channel `first` on.
template <Product kProduct>
struct Pieces {
  using Element = typename Piece<kProduct>::Element;

  const Element *keys, *rows, *delta;  // of the image; the teacher's vectors of the rows, where they are not its keys
  int64_t c_pad;
  int start_i, tiles, common, extra, first;  // the tile after the last
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
          copy_async(place + kMatrixWords, rows + static_cast<int64_t>(start_i + row) * c_pad + inside);
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

// The products of the thread's part of a tile, 16 pairs of its two rows and eight keys: of the rows' vectors, and of
// their differences.
template <Product kProduct>
DSKD_DEVICE void multiply_tile(Pieces<kProduct>& pieces, const Lane& lane, float (&a)[4][4], float (&c)[4][4]) {
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
}

DSKD_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

DSKD_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
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

// The gradient of 64 rows and of at most kChannels channels, before it is scaled: sums of weights times keys.
template <Product kProduct>
struct WeightedKeys {
  static constexpr int kChannelsOf = Piece<kProduct>::kChannelsOf, kMost = kChannels / kChannelsOf;
  static constexpr int kColumns = kChannelsOf / 16;
  float sum[kMost][kColumns][4];

  DSKD_DEVICE WeightedKeys() {
#pragma unroll
    for (int p = 0; p < kMost; p++)
#pragma unroll
      for (int n = 0; n < kColumns; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[p][n][k] = 0;
  }

  // The barrier of the next piece makes the weights visible, and that of the next tile's first one keeps them.
  DSKD_DEVICE void add_tile(Pieces<kProduct>& pieces, const uint32_t* weights, const Lane& lane) {
#pragma unroll
    for (int p = 0; p < kMost; p++) {
      if (p < pieces.extra) {
        const uint32_t* stage = pieces.acquire();
        multiply_weights<kProduct>(sum[p], weights + lane.group * 16 * Piece<kProduct>::kWeightWords, stage, lane);
        pieces.release();
      }
    }
  }

  // `to`: the row of the thread's first row, whose second is eight further; of `c_pad` channels.
  DSKD_DEVICE void store(float* to, int64_t c_pad, const Pieces<kProduct>& pieces, const Lane& lane) const {
#pragma unroll
    for (int p = 0; p < kMost; p++) {
      if (p < pieces.extra) {
#pragma unroll
        for (int n = 0; n < kColumns; n++) {
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int channel = pieces.first + p * kChannelsOf + (lane.half * kColumns + n) * 8 + 2 * lane.t + k % 2;
            to[k / 2 * 8 * c_pad + channel] = sum[p][n][k];
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace dskd
