// Affinity distillation as operators.cpp sees it, and as a test on a machine without a GPU calls it: what launch.h is
// to the contextual affinity.
#pragma once

#include "launch.h"

namespace dskd {

// Keys that are to be normalised, centred and rounded: those of `shape`, (B', C, K, 1), go to rows `start` and further
// of `packed`, (B', k_pad, c_pad) operands.
struct Keys {
  Shape shape;
  Maps keys;
  bool normalize;
  const double* centre;  // (B', C)
  Product product;
  int dropped_bits;
  int64_t k_pad, c_pad, start;
  void* packed;
};

// The keys that each of `count` blocks goes through for the same rows: `tiles` tiles of kTile.
struct Splits {
  int count, tiles;
};

// What the gradient needs of a row.
struct DistilledRow {
  float m;       // the teacher's largest logit, in units of log 2
  float h;       // what c is relative to
  float u;       // mean of expm1(c - h) under the teacher
  float lift;    // 1 + u is 2^lift / rest; the former may be out of float32's range, where u is 2^100
  float rest;    // between 1/2 and 1
  float shift;   // the exponent that weights are raised by, of fp16
  float factor;  // what weights are multiplied by in the end; 0 where there is no gradient
};

// What a part of the keys adds up to in a row; see kernels/README.md.
struct DistilledSums {
  float m, m_student, lift, h, z, s, v;
};

// What is computed (of inputs that are not float64), and scratch memory on the device. Rows come in groups that see the
// same keys under the same mask: those of an image, or all.
struct Distillation {
  Shape shape;
  Maps student, teacher;
  int64_t groups, rows;  // of a group
  int64_t n_pad, k_pad, c_pad;
  const void* keys;                                 // packed
  int64_t keys_stride;                              // operands from one group's keys to the next's, or 0
  int64_t count;                                    // keys of a group
  const bool *key_mask, *row_mask;                  // (groups or 1, count) and (B, N); null: all take part
  int64_t key_mask_stride;                          // from one group's to the next's, or 0
  double student_temperature, teacher_temperature;  // used where the pointers are null
  const double *student_temperature_at, *teacher_temperature_at;
  bool normalize;
  Product product;
  int dropped_bits;
  Splits forward, backward;
  float* kl;      // (B, N)
  Maps gradient;  // float32; data is null if none is wanted

  void *rows_teacher, *rows_delta;  // operands: t_i, s_i / T_s - t_i / T_t
  float* c_scale;                   // what a product with the latter is multiplied by
  double* inverse_norm;             // 1/|student_i|, 1 if vectors are taken as they are
  DistilledSums* sums;              // (splits, groups, N_PAD)
  DistilledRow* row;                // (groups, N_PAD)
  float* raw;                       // (splits, groups, N_PAD, C_PAD): sums of weights times keys
};

inline int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// As many splits as fill the multiprocessors with two blocks each, where `blocks` would not.
inline Splits splits_of(int64_t blocks, int64_t tiles, int multiprocessors) {
  const int64_t most = 2 * multiprocessors / blocks, wanted = most < 1 ? 1 : most < tiles ? most : tiles;
  const int64_t each = (tiles + wanted - 1) / wanted;
  return {static_cast<int>((tiles + each - 1) / each), static_cast<int>(each)};
}

// Pads a call's sizes, splits its keys, and points it at scratch memory; see `take_scratch` of Affinity. Takes
// 2 N C operands, and for a gradient N C float32, or as much as the multiprocessors' registers hold where that is more.
template <class Allocate>
void take_scratch(Distillation& call, int multiprocessors, Allocate allocate) {
  call.n_pad = padded(call.rows, kTile);
  call.k_pad = padded(call.count, kTile);
  call.c_pad = padded(call.shape.channels, kPad);
  const int64_t rows = call.groups * call.n_pad, tiles = call.k_pad / kTile, blocks = rows / kTile;
  const int64_t size = call.product < Product::tfloat32 ? 2 : 4;
  call.forward = splits_of(blocks, tiles, multiprocessors);
  call.rows_teacher = allocate(rows * call.c_pad, size);
  call.rows_delta = allocate(rows * call.c_pad, size);
  call.c_scale = static_cast<float*>(allocate(rows, 4));
  call.inverse_norm = static_cast<double*>(allocate(rows, 8));
  call.sums = static_cast<DistilledSums*>(allocate(call.forward.count * rows, sizeof(DistilledSums)));
  call.row = static_cast<DistilledRow*>(allocate(rows, sizeof(DistilledRow)));
  if (call.gradient.data == nullptr) return;
  call.backward = splits_of(blocks * ((call.c_pad + kChannels - 1) / kChannels), tiles, multiprocessors);
  call.raw = static_cast<float*>(allocate(call.backward.count * rows * call.c_pad, 4));
}

// As those of launch.h, in this order.
const char* prepare_keys(const Keys& call, void* stream);
const char* prepare_rows(const Distillation& call, void* stream);
const char* distillation(const Distillation& call, int capability, void* stream);
const char* project_rows(const Distillation& call, void* stream);

}  // namespace dskd
