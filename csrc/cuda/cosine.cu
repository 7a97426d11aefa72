// The local branch's cosine distance map and its gradient. Compiled with --fmad=false, as prepare.cu.
#include "positions.cuh"

namespace dskd {
namespace {

__global__ void __launch_bounds__(kPositionThreads, 4) cosine_kernel(const Cosine call) {
  __shared__ double shared[kLanes][kPositions];
  const int64_t blocks = (call.shape.positions + kPositions - 1) / kPositions, channels = call.shape.channels;
  const int64_t image = blockIdx.x / blocks;
  const int lane = static_cast<int>(threadIdx.x) / kPositions, p = static_cast<int>(threadIdx.x) % kPositions;
  const int64_t position = static_cast<int64_t>(blockIdx.x % blocks) * kPositions + p;
  const bool is_position = position < call.shape.positions;
  const Place student(call.student, call.shape, image, is_position ? position : 0);
  const Place teacher(call.teacher, call.shape, image, is_position ? position : 0);
  const auto [ss, tt, st] = Squares(student, teacher, is_position, channels, shared);
  if (!is_position) return;
  // One root of the product, and a division by it, are exact where the student is its teacher times a power of two.
  const double product = ss * tt, root = sqrt(product);
  const double cosine = product > 0 ? st / root : product * 0;
  const double scale = product > 0 ? 1 / root : product * 0;
  const double value = 1 - cosine < 0 ? 0.0 : 1 - cosine;
  if (lane == 0) call.distance[image * call.shape.positions + position] = static_cast<float>(value);
  if (call.gradient.data == nullptr) return;
  // (<s, t> s - t) / |student|, times the position's weight
  const Place to(call.gradient, call.shape, image, position);
  const double weight = call.weights[image * call.shape.positions + position];
  const double along = weight * (ss > 0 ? cosine / ss : ss * 0), across = weight * scale;
#pragma unroll 1
  for (int64_t c = lane; c < channels; c += kLanes)
    static_cast<float*>(call.gradient.data)[to.offset + c * to.stride_c] =
        static_cast<float>(student[c] * along - teacher[c] * across);
}

}  // namespace

const char* cosine(const Cosine& call, void* stream) {
  const unsigned blocks =
      static_cast<unsigned>(call.shape.batch * ((call.shape.positions + kPositions - 1) / kPositions));
  return launch("cosine", cosine_kernel, dim3(blocks), kPositionThreads, 0, stream, call);
}

}  // namespace dskd
