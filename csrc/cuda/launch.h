// The kernels as operators.cpp sees them, and as a test on a machine without a GPU calls them.
#pragma once

#include <initializer_list>
#include <string>

#include "../common/maps.h"

namespace dskd {

// How the products multiply. With tensor cores: operands of that type. Without: float32 operands, rounded to nearest.
enum class Product { bfloat16, float16, tfloat32, plain };

// Rows of a block and keys of a tile; operands are padded to multiples of it. Channels are padded to multiples of kPad.
constexpr int kTile = 64;
constexpr int kPad = 64;
// Channels whose gradient a block sums up in registers.
constexpr int kChannels = 256;
// Groups of sampled positions whose mean centres the keys, and positions in each.
constexpr int kGroups = 8;
constexpr int kGroup = 32;

// What is computed (of inputs that are not float64), and scratch memory on the device. Per image: (N_PAD, C_PAD),
// (N_PAD) and (kGroups, C_PAD).
struct Affinity {
  Shape shape;
  Maps student, teacher;
  int64_t n_pad, c_pad;
  double temperature;            // used where temperature_at is null
  const double* temperature_at;  // in the device's memory, where the host does not know it
  Product product;
  int dropped_bits;  // of the fraction of plain operands
  float* kl;         // (B, N)
  Maps gradient;     // float32; data is null if none is wanted

  double* partial_mean;
  void *keys, *delta;    // operands: centred keys k_j, differences s_i - t_i
  float* bias;           // <mean, k_j> / (T log 2), kNever in the padding
  float* own_logit;      // <t_i, k_i> / (T log 2)
  float* c_shift;        // what is subtracted from <delta_i, k_j> / T to give c
  float* c_scale;        // what a product of operands is multiplied by to give <delta_i, k_j> / T
  float* c_bound;        // no |c| is larger
  float* c_own;          // c of the row's own key
  double* inverse_norm;  // 1/|student_i|
  // What the gradient needs of a row, from the forward kernel.
  float *u, *teacher_shift, *student_shift, *student_rest, *factor;
  float* raw;  // (N_PAD, C_PAD): sum of weights times keys, the own key's apart
};

struct Cosine {
  Shape shape;
  Maps student, teacher;
  float* distance;       // (B, N)
  const float* weights;  // (B, N), of the positions' gradients
  Maps gradient;         // float32; data is null if none is wanted
};

// How a call multiplies on a device of that capability, 80 for 8.0; false if the precision is none.
template <class Call>
bool choose_product(Call& call, const std::string& precision, int capability) {
  const bool has_tensor_cores = capability >= 80;
  call.product = Product::plain;
  if (precision == "fp32") return true;
  if (precision == "bf16") {
    if (has_tensor_cores) call.product = Product::bfloat16;
    call.dropped_bits = has_tensor_cores ? 0 : 16;
    return true;
  }
  // Both have 10 bits of fraction.
  if (has_tensor_cores) call.product = precision == "fp16" ? Product::float16 : Product::tfloat32;
  call.dropped_bits = has_tensor_cores ? 0 : 13;
  return precision == "fp16" || precision == "tf32";
}

// Pads a call's sizes and points it at scratch memory: allocate(count, size) gives `count` elements of `size` bytes,
// aligned to 16.
template <class Allocate>
void take_scratch(Affinity& call, Allocate allocate) {
  call.n_pad = (call.shape.positions + kTile - 1) / kTile * kTile;
  call.c_pad = (call.shape.channels + kPad - 1) / kPad * kPad;
  const int64_t rows = call.shape.batch * call.n_pad, size = call.product < Product::tfloat32 ? 2 : 4;
  const auto floats = [&](int64_t count) { return static_cast<float*>(allocate(count, 4)); };
  call.partial_mean = static_cast<double*>(allocate(call.shape.batch * kGroups * call.c_pad, 8));
  call.keys = allocate(rows * call.c_pad, size);
  call.delta = allocate(rows * call.c_pad, size);
  for (float** each : {&call.bias, &call.own_logit, &call.c_shift, &call.c_scale, &call.c_bound, &call.c_own})
    *each = floats(rows);
  call.inverse_norm = static_cast<double*>(allocate(rows, 8));
  if (call.gradient.data == nullptr) return;
  for (float** each : {&call.u, &call.teacher_shift, &call.student_shift, &call.student_rest, &call.factor})
    *each = floats(rows);
  call.raw = floats(rows * call.c_pad);
}

// Each returns the name of what failed, null if all was launched; `stream` is a cudaStream_t. `capability` is that of
// the current device, 80 for 8.0.
const char* prepare(const Affinity& call, void* stream);
const char* affinity(const Affinity& call, int capability, void* stream);
const char* project(const Affinity& call, void* stream);
const char* cosine(const Cosine& call, void* stream);

}  // namespace dskd
