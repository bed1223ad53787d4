// Marks the functions that host and device share.
//
// `static` on the host is not style: the CPU kernels are compiled once for each instruction set, and an inline function with
// external linkage would be merged by the linker, so that the AVX-512 body could run on a machine without AVX-512.
#pragma once

#if defined(__CUDACC__)
#define ACCEL_INLINE static __host__ __device__ __forceinline__
#define ACCEL_MEMBER __host__ __device__ __forceinline__
#else
#define ACCEL_INLINE static inline __attribute__((always_inline))
#define ACCEL_MEMBER inline __attribute__((always_inline))
#endif
