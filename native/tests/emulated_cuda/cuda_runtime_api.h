// As much of CUDA as native/cuda uses, on the host: a .cu file that is included behind this header is plain C++, and its kernels
// run with a fiber for each thread of a thread block, one thread block after another. Each thread of the host that launches a
// kernel is a GPU of its own, so kernels of several GPUs run at once and may wait for each other.
//
// A fiber runs until its lane meets the warp in a shuffle or a vote, or the thread block at a barrier, leaves there what it
// brings, and hands over to the next; when it runs again all of the warp have brought theirs. Lanes that do not meet in the same
// place are an error, as they are on a GPU.
#pragma once

#include <ucontext.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int kLanes = 32;
constexpr int kMostThreads = 256;
constexpr size_t kStackBytes = size_t{256} << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool is_done;
  int meetings;  // how many meetings of its warp it has been in
};

struct Meeting {
  int place;  // kind of meeting
  uint32_t brought[kLanes];
};

struct Warp {
  Meeting meetings[2];  // a lane may come to the next one before the others have left
};

struct Barrier {
  int passed;   // how often all threads have passed
  int arrived;  // threads that wait now
  bool all_true;
  bool result;  // of the last passage
};

struct ThreadBlock {
  std::array<Thread, kMostThreads> threads;
  std::array<Warp, kMostThreads / kLanes> warps;
  Barrier barrier;
  ucontext_t scheduler;
  int current;
  std::function<void()> kernel;
};
inline thread_local ThreadBlock block;

// Called on this GPU whenever a thread block has passed a barrier: tests delay some there.
inline thread_local std::function<void()> after_barrier;

inline void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "emulated CUDA: %s, thread %d of thread block %u\n", what, block.current, blockIdx.x);
    std::abort();
  }
}

inline void yield() { swapcontext(&block.threads[block.current].context, &block.scheduler); }

// Returns what all lanes bring to this meeting.
inline const uint32_t* meet(unsigned lanes, int place, uint32_t mine) {
  require(lanes == 0xFFFFFFFFu, "a shuffle or vote is not of the whole warp");
  Thread& thread = block.threads[block.current];
  Meeting& meeting = block.warps[block.current / kLanes].meetings[thread.meetings++ % 2];
  require(block.current % kLanes == 0 || meeting.place == place, "lanes meet in different shuffles or votes");
  meeting.place = place;
  meeting.brought[block.current % kLanes] = mine;
  yield();
  return meeting.brought;
}

// Tells whether all threads of the thread block have brought true.
inline bool meet_all(bool mine) {
  Barrier& barrier = block.barrier;
  const int passed = barrier.passed;
  barrier.all_true = (barrier.arrived++ == 0 || barrier.all_true) && mine;
  while (barrier.passed == passed) {
    yield();
  }
  if (block.current == 0 && after_barrier) {
    after_barrier();
  }
  return barrier.result;
}

inline void run_thread() {
  block.kernel();
  block.threads[block.current].is_done = true;
}

inline void run_thread_block() {
  const int num_threads = static_cast<int>(blockDim.x);
  require(num_threads <= kMostThreads && num_threads % kLanes == 0, "the thread block has too many threads, or parts of warps");
  block.barrier = {};
  for (int i = 0; i < num_threads; ++i) {
    Thread& thread = block.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &block.scheduler;
    thread.is_done = false;
    thread.meetings = 0;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int running = num_threads; running > 0;) {
    for (int i = 0; i < num_threads; ++i) {
      block.current = i;
      threadIdx.x = static_cast<unsigned>(i);
      Thread& thread = block.threads[i];
      if (!thread.is_done) {
        swapcontext(&block.scheduler, &thread.context);
        running -= thread.is_done;
      }
      require(i % kLanes == 0 || thread.is_done == block.threads[i - 1].is_done, "some lanes have left the kernel, others not");
    }
    require(running == num_threads || block.barrier.arrived == 0, "a thread has left before a barrier");
    if (block.barrier.arrived == num_threads) {  // at a round's end, so that all go on in the same one
      block.barrier = {block.barrier.passed + 1, 0, true, block.barrier.all_true};
    }
  }
}

}  // namespace emulated

inline uint32_t __shfl_xor_sync(unsigned lanes, uint32_t mine, int distance) {
  const int current = emulated::block.current % emulated::kLanes;
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
inline int __syncthreads_and(int mine) { return emulated::meet_all(mine != 0); }
inline void __syncthreads() { emulated::meet_all(true); }
inline void __nanosleep(unsigned) { emulated::yield(); }

// What system.cuh has in PTX.
namespace accel::cuda {
inline void store_release(uint32_t* word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
inline uint32_t load_acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
inline uint64_t nanoseconds() {
  return static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}
}  // namespace accel::cuda

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
  emulated::block.kernel = [=] { kernel(arguments...); };
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    emulated::run_thread_block();
  }
  return cudaSuccess;
}
