// What the kernels need of a GPU: launching, copies into shared memory, products of matrix fragments.
//
// Compiled for the host, the same names come from the emulation that the tests have.
#pragma once

#include "launch.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define DSKD_DEVICE __device__ __forceinline__
#define DSKD_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace dskd {

constexpr bool kHasTensorCores =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    false;
#else
    true;
#endif

template <class Kernel, class Call>
const char* launch(const char* name, Kernel kernel, dim3 grid, int threads, int shared_bytes, void* stream,
                   const Call& call) {
  if (shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return name;
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(call);
  return cudaGetLastError() == cudaSuccess ? nullptr : name;
}

// 16 bytes into shared memory, there after the wait that follows their group.
DSKD_DEVICE void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *static_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
}

DSKD_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kPending of the groups committed by this thread are under way.
template <int kPending>
DSKD_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// sum (16, 8) += a (16, 16) b (16, 8), of halves; a (16, 8) b (8, 8) of float32 read as tf32. A lane's share, with
// g = lane / 4 and t = lane % 4: sum (g | g + 8, 2t, 2t + 1); of halves a (g | g + 8, 2t, 2t + 1 | the same + 8),
// b (2t, 2t + 1 | the same + 8, g); of float32 a (g | g + 8, t | t + 4), b (t | t + 4, g).
template <Product kProduct>
DSKD_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kProduct == Product::bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kProduct == Product::float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

DSKD_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DSKD_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
DSKD_DEVICE float exp2_of(float x) { return exp2f(x); }
// x / y within two units in the last place, for y up to 2^126.
DSKD_DEVICE float quotient_of(float x, float y) { return __fdividef(x, y); }

}  // namespace dskd

#else
#include "emulation.h"
#endif
