// As much of CUDA as native/cuda uses, on the host: a .cu file that is included behind this header is plain C++, and its kernels
// run with 32 fibers for the lanes of a warp, one warp after another. Warps must not wait for each other.
//
// A fiber runs until its lane meets the warp in a shuffle or a vote, leaves there what it brings, and hands over to the next
// lane; when it runs again all have brought theirs. Lanes that do not meet in the same place are an error, as they are on a GPU.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool is_done;
  int meetings;  // how many it has been in
};

struct Meeting {
  int place;  // says which kind of meeting it is
  uint32_t brought[kLanes];
};

struct Warp {
  std::array<Lane, kLanes> lanes;
  ucontext_t scheduler;
  int current;
  unsigned first_thread;
  Meeting meetings[2];  // a lane may come to the next one before the others have left
  std::function<void()> kernel;
};
inline Warp warp;

inline void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "emulated CUDA: %s, lane %d of thread block %u\n", what, warp.current, blockIdx.x);
    std::abort();
  }
}

// What all lanes bring to this meeting.
inline const uint32_t* meet(unsigned lanes, int place, uint32_t mine) {
  require(lanes == 0xFFFFFFFFu, "a shuffle or vote is not of the whole warp");
  Lane& lane = warp.lanes[warp.current];
  Meeting& meeting = warp.meetings[lane.meetings++ % 2];
  require(warp.current == 0 || meeting.place == place, "lanes meet in different shuffles or votes");
  meeting.place = place;
  meeting.brought[warp.current] = mine;
  swapcontext(&lane.context, &warp.scheduler);
  return meeting.brought;
}

inline void run_lane() {
  warp.kernel();
  warp.lanes[warp.current].is_done = true;
}

inline void run_warp() {
  for (Lane& lane : warp.lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStackBytes;
    lane.context.uc_link = &warp.scheduler;
    lane.is_done = false;
    lane.meetings = 0;
    makecontext(&lane.context, run_lane, 0);
  }
  for (bool is_running = true; is_running;) {
    for (warp.current = 0; warp.current < kLanes; ++warp.current) {
      threadIdx.x = warp.first_thread + static_cast<unsigned>(warp.current);
      require(!warp.lanes[warp.current].is_done, "a lane has left the kernel before the others");
      swapcontext(&warp.scheduler, &warp.lanes[warp.current].context);
    }
    warp.current = 0;
    is_running = !warp.lanes[0].is_done;
    for (const Lane& lane : warp.lanes) {
      require(lane.is_done == !is_running, "some lanes have left the kernel, others not");
    }
  }
}

}  // namespace emulated

inline uint32_t __shfl_xor_sync(unsigned lanes, uint32_t mine, int distance) {
  const int current = emulated::warp.current;
  return emulated::meet(lanes, distance, mine)[current ^ distance];
}
inline uint32_t __ballot_sync(unsigned lanes, bool mine) {
  const uint32_t* brought = emulated::meet(lanes, 0, mine);
  uint32_t votes = 0;
  for (int lane = 0; lane < emulated::kLanes; ++lane) {
    votes |= brought[lane] << lane;
  }
  return votes;
}
// Byte i of the result is byte `selector >> 4 i & 7` of the eight of low and high.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7u) * 8 & 0xFFu) << 8 * i;
  }
  return result;
}
inline void __syncwarp() {}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

// ---- The runtime's functions

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// One, so that a grid is small and its warps take several blocks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulated::warp.kernel = [=] { kernel(arguments...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (emulated::warp.first_thread = 0; emulated::warp.first_thread < blockDim.x;
         emulated::warp.first_thread += emulated::kLanes) {
      emulated::run_warp();
    }
  }
  return cudaSuccess;
}
