// The two-shot all_reduce of peer_all_reduce.h: one launch, a warp a block as in all kernels here (operations.cuh).
//
// Grid: thread blocks of 4 warps, as many as the largest message has blocks for, up to kMostThreadBlocks; on all ranks equally
// many, because a message's size is the same on all. Warp w takes blocks w, w + warps ... of each message, so what thread block
// b reads from another rank was written there by its thread block b. Hence they wait for each other one by one: nothing waits for
// a whole grid, and a grid need not fit on the GPU at once, because thread blocks start in the order of their numbers.
//
// Why two waits are enough: a rank comes to the end of a call only after all ranks have read its messages, and writes the next
// call's means only after all have begun that one, so that they have read the means of this one. In between it writes messages
// while others may read means; they never overlap.
#include "lightning_accel/peer_all_reduce.h"

#include <algorithm>

#include "launch.cuh"
#include "operations.cuh"
#include "system.cuh"

namespace accel::cuda {
namespace {

constexpr unsigned kPollNanoseconds = 40;
constexpr unsigned kPollsAlone = 4096;  // between two looks at the host's word, which is far away

// Where the parts of a rank's memory are.
__device__ __forceinline__ uint32_t* flag_at(uint8_t* memory, int thread_block, int rank) {
  return reinterpret_cast<uint32_t*>(memory) + thread_block * kMostPeers + rank;
}
__device__ __forceinline__ uint32_t* round_at(uint8_t* memory, int thread_block) {
  return reinterpret_cast<uint32_t*>(memory + kPeerFlagsBytes) + thread_block;
}
__device__ __forceinline__ uint32_t* failed_at(uint8_t* memory) {
  return reinterpret_cast<uint32_t*>(memory + kPeerFlagsBytes + kPeerRoundsBytes);
}

// What a call is made of, as the kernel sees it.
template <class Codec>
struct Call {
  Blocks everything;
  Blocks own;
  int64_t first_block[kMostPeers + 1];  // message k: blocks first_block[k] ... first_block[k + 1] - 1 of `everything`
  int num_messages;
  int64_t stride_bytes;
  Peers peers;
  Division<typename Codec::Value> division;
  Residuals worker;
  Residuals server;
  uint32_t* failure;
  uint64_t timeout_ns;

  __device__ __forceinline__ uint8_t* memory() const { return peers.memory[peers.rank]; }
  __device__ __forceinline__ uint8_t* messages(int rank) const { return peers.memory[rank] + kPeerMessagesOffset; }
  __device__ __forceinline__ uint8_t* mean(int rank) const { return peers.memory[rank] + peers.memory_bytes - stride_bytes; }
};

// Every rank's message for this one, at `offset` of its memory.
struct Sources {
  const Peers& peers;
  int64_t offset;
  int64_t count;
};
__device__ __forceinline__ const uint8_t* message_at(const Sources& sources, int64_t k) {
  return sources.peers.memory[k] + sources.offset;
}

// Tells thread block b of every rank that this one has come to round `round`, and waits until theirs have: then this one sees
// what they wrote before, and they what it wrote. False, in all threads, if one did not come in time.
template <class Codec>
__device__ __forceinline__ bool meet(const Call<Codec>& call, uint32_t round) {
  __syncthreads();  // the release below is for what all threads wrote
  const int b = static_cast<int>(blockIdx.x);
  const int peer = static_cast<int>(threadIdx.x);
  bool has_come = true;
  if (peer < call.peers.count) {
    store_release(flag_at(call.peers.memory[peer], b, call.peers.rank), round);
    const uint64_t start = nanoseconds();
    // The difference, because rounds wrap.
    for (unsigned polls = 1; static_cast<int32_t>(load_acquire(flag_at(call.memory(), b, peer)) - round) < 0; ++polls) {
      const bool is_late = nanoseconds() - start > call.timeout_ns;
      if (is_late || (polls % kPollsAlone == 0 && load_acquire(call.failure) != 0)) {
        has_come = false;
        if (is_late) {
          store_release(call.failure, static_cast<uint32_t>(1 + peer));
        }
        store_release(failed_at(call.memory()), 1u);
        break;
      }
      __nanosleep(kPollNanoseconds);
    }
  }
  return __syncthreads_and(has_come) != 0;
}

// For this warp's share of each message: body(message, block of `everything`).
template <class Codec, class Body>
__device__ __forceinline__ void for_each_message_block(const Call<Codec>& call, Body body) {
  for (int k = 0; k < call.num_messages; ++k) {
    const int64_t first = call.first_block[k];
    for_each_index(call.first_block[k + 1] - first, [&](int64_t i) { body(k, first + i); });
  }
}

template <class Tensor>
__device__ __forceinline__ void fill_nan(const Segment& segment, int64_t block, int numel, Tensor* tensor) {
  using Value = std::conditional_t<std::is_same_v<Tensor, double>, double, float>;
  for (int i = lane(); i < numel; i += kWarpLanes) {
    tensor[segment.tensor_offset + block * kBlockNumel + i] = store_value<Tensor>(static_cast<Value>(NAN));
  }
}

template <class Codec, class Tensor, bool kHasFeedback>
__device__ __forceinline__ bool all_reduce(const Call<Codec>& call, Tensor* tensor) {
  if (!__syncthreads_and(load_acquire(failed_at(call.memory())) == 0)) {
    return false;
  }
  const int b = static_cast<int>(blockIdx.x);
  const uint32_t round = *round_at(call.memory(), b);

  // (1)
  for_each_message_block(call, [&](int, int64_t i) {
    with_block(call.everything, i, [&](const Segment& segment, int64_t block, int numel) {
      encode_tensor<Codec, kHasFeedback>(segment, block, numel, tensor, call.messages(call.peers.rank), call.worker);
    });
  });
  if (!meet(call, round + 1)) {  // (2)
    return false;
  }
  // (3)
  const int own = call.num_messages == 1 ? 0 : call.peers.rank;
  const Sources sources{call.peers, kPeerMessagesOffset + own * call.stride_bytes, call.peers.count};
  for_each_block(call.own, [&](const Segment& segment, int64_t block, int numel) {
    sum_messages<Codec, kHasFeedback>(segment, block, numel, sources, call.division, call.mean(call.peers.rank), call.server);
  });
  if (!meet(call, round + 2)) {  // (4)
    return false;
  }
  if (threadIdx.x == 0) {
    *round_at(call.memory(), b) = round + 2;
  }
  // (5)
  for_each_message_block(call, [&](int k, int64_t i) {
    const uint8_t* mean = call.num_messages == 1 ? call.mean(call.peers.rank) : call.mean(k) - k * call.stride_bytes;
    with_block(call.everything, i, [&](const Segment& segment, int64_t block, int numel) {
      decode_tensor<Codec>(segment, block, numel, mean, tensor);
    });
  });
  return true;
}

template <class Codec, class Tensor, bool kHasFeedback>
__global__ void __launch_bounds__(kThreads) all_reduce_kernel(const __grid_constant__ Call<Codec> call, Tensor* tensor) {
  if (!all_reduce<Codec, Tensor, kHasFeedback>(call, tensor)) {
    // What this thread block would have decoded, and no more: others may have come to their end.
    for_each_message_block(call, [&](int, int64_t i) {
      with_block(call.everything, i,
                 [&](const Segment& segment, int64_t block, int numel) { fill_nan(segment, block, numel, tensor); });
    });
  }
}

}  // namespace

void all_reduce_peers(const PeerMessages& messages, const Segment* everything_segments, const Segment* own_segments, void* tensor,
                      const Peers& peers, float divisor, const Residuals& worker, const Residuals& server, int32_t* failure,
                      double timeout_seconds, void* stream) {
  const Plan& everything = messages.everything;
  const auto launch = [&](auto codec, auto element, auto feedback) {
    using Codec = typename decltype(codec)::type;
    using Tensor = typename decltype(element)::type;
    Call<Codec> call{{everything_segments, static_cast<int>(everything.segments().size()), everything.num_blocks()},
                     {own_segments, static_cast<int>(messages.own.segments().size()), messages.own.num_blocks()},
                     {},
                     messages.is_whole ? 1 : peers.count,
                     messages.stride_bytes,
                     peers,
                     Division<typename Codec::Value>(divisor),
                     worker,
                     server,
                     reinterpret_cast<uint32_t*>(failure),
                     static_cast<uint64_t>(timeout_seconds * 1e9)};
    int64_t most_blocks = 0;
    for (int k = 0; k < call.num_messages; ++k) {
      const int64_t end = (k + 1) * messages.stride_bytes;
      int64_t next = call.first_block[k];
      for (const Segment& segment : everything.segments()) {
        if (segment.wire_offset < end) {
          next = std::max(next, segment.first_block + num_blocks(segment.numel));
        }
      }
      call.first_block[k + 1] = next;
      most_blocks = std::max(most_blocks, next - call.first_block[k]);
    }
    const int64_t thread_blocks = std::min<int64_t>((most_blocks + kWarps - 1) / kWarps, kMostThreadBlocks);
    launch_thread_blocks(all_reduce_kernel<Codec, Tensor, decltype(feedback)::value>, thread_blocks, stream, call,
                         static_cast<Tensor*>(tensor));
  };
  visit_dtype(everything.dtype(), [&](auto element) {
    if (everything.codec() == CodecId::kNone) {
      launch(Type<Cast<typename decltype(element)::type>>{}, element, std::false_type{});
    } else {
      ACCEL_CHECK(everything.codec() == CodecId::kInt8, "peers all_reduce by codec int8 or none");
      with_feedback<float>(worker, [&](auto feedback) { launch(Type<Int8>{}, element, feedback); });
    }
  });
}

}  // namespace accel::cuda
