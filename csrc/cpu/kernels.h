// What the operators hand to the kernels, and the kernels of each CPU capability.
//
// Everything but operators.cpp and brgemm.cpp is compiled once per capability, with DSKD_CAPABILITY naming it and the
// instruction set that belongs to it. Nothing there may come from the standard library's templates: the linker would
// merge their instances, and code for one processor would run on another.
#pragma once

#include "../common/maps.h"

namespace dskd {

// Rows and keys are worked on in slabs of kRows and tiles of kKeys; prepared keys are padded to multiples of kPad, as
// are channels.
constexpr int64_t kRows = 64;
constexpr int64_t kKeys = 128;
constexpr int64_t kPad = 16;

// What the products multiply; they accumulate in float32, of float64 operands in float64.
enum class Operand { float32, bfloat16, float64 };

// The prepared keys of one image.
struct Keys {
  double* mean;   // (C_PAD): subtracted from the unit teacher vectors
  double* bias;   // (N_PAD): <mean, k_j> / (T log 2), kNever in the padding
  float* bias32;  // the same
  void* columns;  // tiles of kKeys keys (the last may be smaller): (C_PAD, keys); of bfloat16 (C_PAD / 2, keys, 2)
  void* rows;     // (N_PAD / 2, C_PAD, 2) of bfloat16, if a gradient is wanted
};

// Hands out parts of a piece of memory, aligned to 64 bytes, or of none, to learn how much they need.
namespace {
struct Parts {
  uintptr_t memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(memory + static_cast<uintptr_t>(used));
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};
}  // namespace

struct Affinity {
  Shape shape;
  Maps student, teacher;
  int64_t n_pad, c_pad, panel;  // panel: keys whose weights are held at a time
  double temperature;
  Operand operand;
  int dropped_bits;  // of the fraction of float32 operands, which are rounded to nearest
  bool use_brgemm;
  void* kl;       // (B, N) float32, of float64 operands float64
  Maps gradient;  // likewise; data is null if none is wanted
};

struct Cosine {
  Shape shape;
  Maps student, teacher;
  void* distance;       // (B, N) float32, or float64 if an input is
  const void* weights;  // likewise: of the positions' gradients
  Maps gradient;
};

// The kernels of a capability. `scratch` is aligned to 64 bytes and has as many as the function of that name says.
#define DSKD_KERNELS(capability)                                                                     \
  namespace capability {                                                                             \
  /* The centre of an image's keys, then a block of kRows of them. */                                \
  void centre(const Affinity& call, int64_t image, const Keys& keys, char* scratch);                 \
  void prepare(const Affinity& call, int64_t image, int64_t block, const Keys& keys, char* scratch); \
  /* KL and gradient of a slab of kRows positions. */                                                \
  void affinity(const Affinity& call, int64_t image, int64_t slab, const Keys& keys, char* scratch); \
  int64_t scratch_bytes(const Affinity& call);                                                       \
  /* Distance and gradient of a block of kRows positions. */                                         \
  void cosine(const Cosine& call, int64_t image, int64_t block, char* scratch);                      \
  int64_t scratch_bytes(const Cosine& call);                                                         \
  }

DSKD_KERNELS(DEFAULT)
#if defined(__x86_64__)
DSKD_KERNELS(AVX2)
DSKD_KERNELS(AVX512)
#endif

// C (m, n) = or += A (m, k) B (k, n) by oneDNN's kernels; of bfloat16, pairs of B's rows are interleaved.
bool has_brgemm(Operand operand);
void brgemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
            int64_t ldc, bool add);
void brgemm(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, float* c,
            int64_t ldc, bool add);
void brgemm_release(Operand operand);

}  // namespace dskd
