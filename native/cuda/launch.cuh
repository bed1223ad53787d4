// Launches of kernels in which each warp takes blocks of 512 elements (block.cuh).
//
// Grid: one-dimensional, thread blocks of 128 = 4 warps, as many as there are blocks for, up to 64 a multiprocessor; with that
// many each warp takes every (4 gridDim.x)-th block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block.cuh"
#include "lightning_accel/check.h"

namespace accel::cuda {
namespace {

// Upper limit, several times what fits at once, so that the last round leaves few multiprocessors idle.
constexpr int kThreadBlocksPerMultiprocessor = 64;

// Enqueues kernel(arguments...) with `thread_blocks` thread blocks; enqueues nothing if that is 0.
template <class... Parameters, class... Arguments>
void launch_thread_blocks(void (*kernel)(Parameters...), int64_t thread_blocks, void* stream, const Arguments&... arguments) {
  if (thread_blocks == 0) {
    return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(thread_blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  ACCEL_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Enqueues kernel(arguments...) with thread blocks for `num_blocks` blocks of elements.
template <class... Parameters, class... Arguments>
void launch_blocks(void (*kernel)(Parameters...), int64_t num_blocks, void* stream, const Arguments&... arguments) {
  int device = 0;
  int multiprocessors = 0;
  ACCEL_CUDA_CHECK(cudaGetDevice(&device));
  ACCEL_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = (num_blocks + kWarps - 1) / kWarps;
  launch_thread_blocks(kernel, std::min(wanted, int64_t{multiprocessors} * kThreadBlocksPerMultiprocessor), stream, arguments...);
}

}  // namespace
}  // namespace accel::cuda
