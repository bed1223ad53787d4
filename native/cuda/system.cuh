// Words that several processors share, GPUs and the host, and time.
#pragma once

#include <cstdint>

namespace accel::cuda {
namespace {

#if defined(__CUDACC__)

// Whoever reads the word by load_acquire, on any processor, sees what this thread wrote or saw before.
__device__ __forceinline__ void store_release(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// Time since an arbitrary moment, in steps of about a microsecond.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

#endif

}  // namespace
}  // namespace accel::cuda
