// Tensors as the kernels see them.
#pragma once

#include <cstdint>

namespace dskd {

enum class Dtype { float32, bfloat16, float16, float64 };

// A (B, C, H, W) tensor.
struct Maps {
  void* data;
  Dtype dtype;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

struct Shape {
  int64_t batch, channels, height, width, positions;
};

}  // namespace dskd
