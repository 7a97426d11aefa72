// What the operator affinity_distillation hands to its kernels, and these; see kernels.h.
#pragma once

#include "kernels.h"

namespace dskd {

// Logits of keys that take no part, in units of log 2: far below all others, whose exp2 is 0.
constexpr float kExcluded = -1e30f;

// Keys to be prepared, (B, C, K, 1).
struct KeySource {
  Maps keys;
  Shape shape;
  int64_t n_pad, c_pad;
  Operand operand;
  int dropped_bits;
  bool normalize;
};

// The prepared keys of one image, or of all.
struct PackedKeys {
  double* centre;  // (C): subtracted from the keys
  float* bias;     // (N_PAD): 0, for keys that are not finite NaN
  void* columns;   // as those of Keys
  void* rows;      // likewise; null if none are there
};

struct Distillation {
  Shape shape;
  Maps student, teacher;
  int64_t n_pad, c_pad, panel;  // panel: keys whose weights are held at a time
  double student_temperature, teacher_temperature;
  Operand operand;
  int dropped_bits;
  bool use_brgemm, normalize;
  bool may_be_far;     // exponentials may leave float32's range
  bool keeps_teacher;  // a gradient needs sum E k, as there are several panels or splits
  void* kl;            // (B, N)
  Dtype kl_dtype;
  Maps gradient;  // data is null if none is wanted
};

// Rows, of one image or of all, and the keys that they share.
struct Group {
  PackedKeys keys;
  int64_t key_count;
  const float* bias;    // (N_PAD): kExcluded for keys that take no part, NaN for those not finite; null if none is
  const int64_t* rows;  // positions, counted over all images
  int64_t row_count;
  const int64_t* tiles;  // the first keys of those tiles in which a key takes part
};

// Sums over keys of a slab's rows, of which a and c are the logits of kernels/README.md: about the largest a and a c
// near the weighted mean.
struct RowSums {
  double m[kRows];  // the largest a, in units of log 2
  double h[kRows];  // about the mean of c
  double z[kRows];  // sum E with E = exp2(a - m)
  double s[kRows];  // sum E (c - h)
  double v[kRows];  // sum E (expm1(c - h) - (c - h)), divided by 2^x
  double x[kRows];  // 0, or where v could overflow about its exponent
};

// A slab's sums over a part of the keys. `gradient` and, if kept, `teacher_sum` are those of float32 or float64
// operands turned over: (C_PAD, columns) for (rows, C_PAD).
struct Partial {
  RowSums* sums;
  void* gradient;  // sum of (p_s - p_t) Z times keys, then of E times keys
};

#define DSKD_DISTILLATION_KERNELS(capability)                                                                         \
  namespace capability {                                                                                              \
  /* The centre of an image's keys. */                                                                                \
  void centre_keys(const KeySource& source, int64_t image, double* centre, char* scratch);                            \
  /* A block of at most kRows keys, those at `positions`, as prepared keys from `start` on in one tile, and after     \
     them `padding` keys of zeros. */                                                                                 \
  void prepare_keys(const KeySource& source, int64_t image, const int64_t* positions, int64_t count, int64_t padding, \
                    int64_t start, const PackedKeys& to, char* scratch);                                              \
  int64_t scratch_bytes(const KeySource& source);                                                                     \
  /* A slab of kRows rows and `tile_count` tiles; writes KL and gradient, or if there is one, `partial`. */           \
  void distill(const Distillation& call, const Group& group, int64_t slab, const int64_t* tiles, int64_t tile_count,  \
               const Partial* partial, char* scratch);                                                                \
  /* KL and gradient of a slab from those of its splits, which it writes to. */                                       \
  void merge_splits(const Distillation& call, const Group& group, int64_t slab, const Partial* parts, int64_t count,  \
                    char* scratch);                                                                                   \
  int64_t scratch_bytes(const Distillation& call);                                                                    \
  int64_t partial_bytes(const Distillation& call);                                                                    \
  }

DSKD_DISTILLATION_KERNELS(DEFAULT)
#if defined(__x86_64__)
DSKD_DISTILLATION_KERNELS(AVX2)
DSKD_DISTILLATION_KERNELS(AVX512)
#endif

}  // namespace dskd
