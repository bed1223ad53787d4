// Encode, decode and sum on the GPU: what cpu/kernels.cpp writes, by the same codec headers, so to the bit the same.
//
// In every kernel here one warp owns one block of 512 elements at a time and keeps it in registers, 16 elements a lane, from the
// first read to the last write; no shared memory, no atomics. Memory traffic is what an operation costs, so lanes move up to
// 16 bytes at once and a warp has 1 to 4 KiB under way before it uses the first of it.
//
// Width: with width w a lane's 16 elements are 16 / w runs of w neighbours, run r of lane l starting at element (32 r + l) w of
// the block. So w elements are one access, and the accesses of a warp lie side by side. A block that is full and aligned to
// w elements takes the width that makes 16 bytes of the wider operand; any other takes width 1, where each element is
// guarded by the block's size. Offsets are 64-bit: tensors and messages may be larger than 2^31 elements or bytes.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lightning_accel/check.h"
#include "lightning_accel/codecs.h"
#include "lightning_accel/dispatch.h"

namespace accel::cuda {
namespace {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kLaneNumel = kBlockNumel / kWarpLanes;
constexpr int kThreads = 128;  // a thread block: four warps that know nothing of each other
constexpr int kWarps = kThreads / kWarpLanes;
// Thread blocks a multiprocessor, at most: several times what fits, so that the last round leaves few multiprocessors idle.
constexpr int kThreadBlocksPerMultiprocessor = 64;
constexpr int kVectorBytes = 16;        // what a lane moves at once
constexpr int kLaneBytesInFlight = 64;  // what a lane of the summing kernel asks for before it adds

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpLanes; }

// ---- Which block

// The plan, as a kernel sees it.
struct Blocks {
  const Segment* segments;
  int64_t num_segments;
  int64_t count;
};

// The last segment that starts at `block` or before. Segments without elements start where the next one does, or behind the last
// block, so the last is the one that holds the block. Each step the 32 lanes probe 32 places and keep the stretch between
// two of them: log32 of the segments steps, not log2. All lanes take part and get the same answer.
__device__ __forceinline__ Segment find_segment(const Blocks& blocks, int64_t block) {
  int64_t first = 0;
  int64_t count = blocks.num_segments;  // candidates: segments[first], ..., segments[first + count - 1]
  while (count > 1) {
    const int64_t stride = (count + kWarpLanes - 1) / kWarpLanes;
    const int64_t probe = lane() * stride;
    const bool is_before = probe < count && blocks.segments[first + probe].first_block <= block;
    const int64_t skipped = (__popc(__ballot_sync(kAllLanes, is_before)) - 1) * stride;  // lane 0 is always before
    first += skipped;
    count = count - skipped < stride ? count - skipped : stride;
  }
  return blocks.segments[first];
}

// Calls body(segment, block, numel) for this warp's blocks; `block` counts from the segment's first.
template <class Body>
__device__ __forceinline__ void for_each_block(const Blocks& blocks, Body body) {
  const int64_t num_warps = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes; i < blocks.count; i += num_warps) {
    const Segment segment = find_segment(blocks, i);
    const int64_t block = i - segment.first_block;
    const int64_t left = segment.numel - block * kBlockNumel;
    body(segment, block, left < kBlockNumel ? static_cast<int>(left) : kBlockNumel);
  }
}

// Where a block lies in a message, in bytes.
struct WireOffsets {
  int64_t header;
  int64_t codes;
};

template <class Codec>
__device__ __forceinline__ WireOffsets wire_offsets(const Segment& segment, int64_t block) {
  const int64_t codes = segment.wire_offset + headers_bytes<Codec>(segment.numel);
  return {segment.wire_offset + block * Codec::kHeaderBytes,
          codes + block * (kBlockNumel * static_cast<int64_t>(sizeof(typename Codec::Code)))};
}

// ---- Moving a block between memory and registers

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

template <int kBytes>
struct Vector;
template <>
struct Vector<1> {
  using type = uint8_t;
};
template <>
struct Vector<2> {
  using type = uint16_t;
};
template <>
struct Vector<4> {
  using type = uint32_t;
};
template <>
struct Vector<8> {
  using type = uint64_t;
};
template <>
struct Vector<16> {
  using type = uint4;
};

// Calls body(Width<kWidth>) where the block at `items` can be moved in vectors of kWidth, else body(Width<1>). One way a warp.
template <int kWidth, class T, class Body>
__device__ __forceinline__ void with_width(const T* items, int numel, Body body) {
  if (numel == kBlockNumel && reinterpret_cast<uintptr_t>(items) % (kWidth * sizeof(T)) == 0) {
    body(Width<kWidth>{});
  } else {
    body(Width<1>{});
  }
}

// Assigns `word`. 16 bytes go as one integer: the compiler may split the store of a struct.
template <class Word>
__device__ __forceinline__ void store_word(Word* target, Word word) {
  *target = word;
}
__device__ __forceinline__ void store_word(uint4* target, uint4 word) {
  const uint64_t low = uint64_t{word.y} << 32 | word.x;
  const uint64_t high = uint64_t{word.w} << 32 | word.z;
  *reinterpret_cast<unsigned __int128*>(target) = static_cast<unsigned __int128>(high) << 64 | low;
}

// The place in the block of this lane's i-th element, and whether the block reaches so far.
template <int kWidth>
__device__ __forceinline__ int element(int i) {
  return (i / kWidth * kWarpLanes + lane()) * kWidth + i % kWidth;
}
template <int kWidth>
__device__ __forceinline__ bool has_element(int i, int numel) {
  return kWidth > 1 || element<kWidth>(i) < numel;
}

template <int kWidth, class T>
__device__ __forceinline__ void load(const T* source, int numel, T (&items)[kLaneNumel]) {
  if constexpr (kWidth > 1) {
    using Word = typename Vector<kWidth * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < kLaneNumel; i += kWidth) {
      const Word word = *reinterpret_cast<const Word*>(source + element<kWidth>(i));
      memcpy(&items[i], &word, sizeof(Word));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      items[i] = has_element<1>(i, numel) ? source[element<1>(i)] : T{};
    }
  }
}

template <int kWidth, class T>
__device__ __forceinline__ void store(T* target, int numel, const T (&items)[kLaneNumel]) {
  if constexpr (kWidth > 1) {
    using Word = typename Vector<kWidth * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < kLaneNumel; i += kWidth) {
      Word word;
      memcpy(&word, &items[i], sizeof(Word));
      store_word(reinterpret_cast<Word*>(target + element<kWidth>(i)), word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      if (has_element<1>(i, numel)) {
        target[element<1>(i)] = items[i];
      }
    }
  }
}

// ---- Coding a block that is in registers

template <class T>
__device__ __forceinline__ T shuffle_xor(const T& mine, int distance) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0 && std::is_trivially_copyable<T>::value, "shuffled in 32-bit words");
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  memcpy(words, &mine, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) {
    word = __shfl_xor_sync(kAllLanes, word, distance);
  }
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

template <class Statistic>
__device__ __forceinline__ Statistic merge_over_warp(Statistic statistic) {
  if constexpr (!std::is_empty<Statistic>::value) {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      statistic.merge(shuffle_xor(statistic, distance));
    }
  }
  return statistic;
}

// wire <- header and codes of the block. Each lane computes the same grid; lane 0 writes the header.
template <class Codec, int kWidth>
__device__ __forceinline__ void encode_block(const typename Codec::Value (&values)[kLaneNumel], int numel, uint8_t* wire,
                                             const WireOffsets& at) {
  typename Codec::Statistic statistic;
#pragma unroll
  for (int i = 0; i < kLaneNumel; ++i) {
    if (has_element<kWidth>(i, numel)) {
      statistic.include(values[i]);
    }
  }
  const typename Codec::Grid grid(merge_over_warp(statistic));
  if constexpr (Codec::kHeaderBytes > 0) {
    if (lane() == 0) {
      *reinterpret_cast<typename Codec::Header*>(wire + at.header) = grid.header;
    }
  }
  typename Codec::Code codes[kLaneNumel] = {};
  if (!grid.is_blank) {
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      codes[i] = grid.encode(values[i]);
    }
  }
  store<kWidth>(reinterpret_cast<typename Codec::Code*>(wire + at.codes), numel, codes);
}

// A lane's part of a coded block.
template <class Codec>
struct Coded {
  typename Codec::Header header;
  typename Codec::Code codes[kLaneNumel];
};

template <class Codec, int kWidth>
__device__ __forceinline__ void load_coded(const uint8_t* wire, const WireOffsets& at, int numel, Coded<Codec>& coded) {
  if constexpr (Codec::kHeaderBytes > 0) {
    coded.header = *reinterpret_cast<const typename Codec::Header*>(wire + at.header);
  }
  load<kWidth>(reinterpret_cast<const typename Codec::Code*>(wire + at.codes), numel, coded.codes);
}

// Calls use(i, value) for each of the lane's elements. Poisoned blocks need no branch, which would put the codes' loads behind
// the header's: their scale is NaN, and so is every product with it.
template <class Codec, class Use>
__device__ __forceinline__ void decode_block(const Coded<Codec>& coded, Use use) {
#pragma unroll
  for (int i = 0; i < kLaneNumel; ++i) {
    use(i, Codec::decode(coded.header, coded.codes[i]));
  }
}

// sums <- sums + value of messages[first] + value of messages[first + 1] + ... to the last, in this order. Asks for kTogether
// messages before it adds the first of them, and for fewer at the end.
template <class Codec, int kWidth, int kTogether>
__device__ __forceinline__ void add_messages(const Messages& messages, int64_t first, const WireOffsets& at, int numel,
                                             typename Codec::Value (&sums)[kLaneNumel]) {
  for (; first + kTogether <= messages.count; first += kTogether) {
    Coded<Codec> coded[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      load_coded<Codec, kWidth>(messages.wire + (first + k) * messages.stride_bytes, at, numel, coded[k]);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      decode_block(coded[k], [&](int i, auto value) { sums[i] += value; });
    }
  }
  if constexpr (kTogether > 1) {
    add_messages<Codec, kWidth, kTogether / 2>(messages, first, at, numel, sums);
  }
}

// x / divisor. IEEE division is slow on a GPU, most of all of zeros; by a power of two it is a multiplication, to the bit.
template <class Value>
struct Division {
  Value divisor;
  Value reciprocal;
  bool is_by_power_of_two;

  explicit Division(float by) : divisor(by), reciprocal(Value{1} / divisor) {
    int exponent = 0;
    is_by_power_of_two = std::frexp(by, &exponent) == 0.5f && -100 < exponent && exponent < 100;
  }

  __device__ __forceinline__ void apply(Value (&values)[kLaneNumel]) const {
    if (is_by_power_of_two) {
#pragma unroll
      for (Value& value : values) {
        value *= reciprocal;
      }
    } else {
#pragma unroll
      for (Value& value : values) {
        value /= divisor;
      }
    }
  }
};

// ---- Kernels
//
// Grid: one-dimensional, thread blocks of 128 = 4 warps, as many as the plan has blocks for, up to 64 a multiprocessor; with
// that many each warp takes every (4 gridDim.x)-th block. Any grid gives the same bytes. Alignment: `tensor` of its element,
// messages 16 bytes.

// wire <- code of tensor. A warp reads its block, merges the lanes' statistics by shuffles, and writes header and codes.
template <class Codec, class Tensor>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(Blocks blocks, const Tensor* __restrict__ tensor, uint8_t* __restrict__ wire) {
  using Value = typename Codec::Value;
  constexpr int kWidest = sizeof(Tensor) > sizeof(typename Codec::Code) ? sizeof(Tensor) : sizeof(typename Codec::Code);
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    const Tensor* source = tensor + segment.tensor_offset + block * kBlockNumel;
    with_width<kVectorBytes / kWidest>(source, numel, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      Tensor items[kLaneNumel];
      load<kWidth>(source, numel, items);
      Value values[kLaneNumel];
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        values[i] = load_value<Value>(items[i]);
      }
      encode_block<Codec, kWidth>(values, numel, wire, wire_offsets<Codec>(segment, block));
    });
  });
}

// tensor <- value of wire. A warp reads header (all lanes the same one) and codes of its block and writes its elements.
template <class Codec, class Tensor>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(Blocks blocks, const uint8_t* __restrict__ wire, Tensor* __restrict__ tensor) {
  constexpr int kWidest = sizeof(Tensor) > sizeof(typename Codec::Code) ? sizeof(Tensor) : sizeof(typename Codec::Code);
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    Tensor* target = tensor + segment.tensor_offset + block * kBlockNumel;
    with_width<kVectorBytes / kWidest>(target, numel, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      Coded<Codec> coded;
      load_coded<Codec, kWidth>(wire, wire_offsets<Codec>(segment, block), numel, coded);
      Tensor items[kLaneNumel];
      decode_block(coded, [&](int i, auto value) { items[i] = store_value<Tensor>(value); });
      store<kWidth>(target, numel, items);
    });
  });
}

// accumulator <- accumulator + value of wire; as decode_kernel, with the accumulator's elements read beside the codes. A GPU and
// a CPU make different NaNs of Inf - Inf: store_value makes them the canonical one.
template <class Codec>
__global__ void __launch_bounds__(kThreads)
    decode_accumulate_kernel(Blocks blocks, const uint8_t* __restrict__ wire, typename Codec::Value* __restrict__ accumulator) {
  using Value = typename Codec::Value;
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    Value* target = accumulator + segment.tensor_offset + block * kBlockNumel;
    with_width<kVectorBytes / static_cast<int>(sizeof(Value))>(target, numel, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      Coded<Codec> coded;
      load_coded<Codec, kWidth>(wire, wire_offsets<Codec>(segment, block), numel, coded);
      Value sums[kLaneNumel];
      load<kWidth>(target, numel, sums);
      decode_block(coded, [&](int i, auto value) { sums[i] = store_value<Value>(sums[i] + value); });
      store<kWidth>(target, numel, sums);
    });
  });
}

// wire <- code of (value of messages[0] + value of messages[1] + ...) / divisor, summed in this order. A warp owns the same block
// of all messages: it asks for several messages' codes at once, adds them in order, divides and encodes, all in registers. Codes
// are aligned on both sides, so only a segment's ragged last block takes width 1. `wire` may be one of the messages: a lane
// writes codes only where it has read, and lane 0 the header only after all lanes have used it, which the shuffles see to.
template <class Codec>
__global__ void __launch_bounds__(kThreads)
    decode_sum_encode_kernel(Blocks blocks, Messages messages, Division<typename Codec::Value> division, uint8_t* wire) {
  using Value = typename Codec::Value;
  using Code = typename Codec::Code;
  constexpr int kCodeBytes = sizeof(Code);
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    const WireOffsets at = wire_offsets<Codec>(segment, block);
    with_width<kVectorBytes / kCodeBytes>(reinterpret_cast<const Code*>(wire + at.codes), numel, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      constexpr int kTogether = kWidth > 1 ? kLaneBytesInFlight / (kLaneNumel * kCodeBytes) : 1;
      Value sums[kLaneNumel];
#pragma unroll
      for (Value& sum : sums) {
        sum = -Value{0};  // -0 + x is x for every x, -0 and 0 among them: the sum starts from the first message's value
      }
      add_messages<Codec, kWidth, (kTogether > 1 ? kTogether : 1)>(messages, 0, at, numel, sums);
      division.apply(sums);
      encode_block<Codec, kWidth>(sums, numel, wire, at);
    });
  });
}

// ---- Launchers

// Enqueues kernel(blocks of the plan, arguments...); nothing for a plan without blocks.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Blocks, Parameters...), const Plan& plan, const Segment* segments, void* stream,
            Arguments... arguments) {
  if (plan.num_blocks() == 0) {
    return;
  }
  int device = 0;
  int multiprocessors = 0;
  ACCEL_CUDA_CHECK(cudaGetDevice(&device));
  ACCEL_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = (plan.num_blocks() + kWarps - 1) / kWarps;
  const int64_t most = int64_t{multiprocessors} * kThreadBlocksPerMultiprocessor;
  const Blocks blocks{segments, static_cast<int64_t>(plan.segments().size()), plan.num_blocks()};
  kernel<<<static_cast<unsigned>(wanted < most ? wanted : most), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(blocks,
                                                                                                                   arguments...);
  ACCEL_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void encode(const Plan& plan, const Segment* segments, const void* tensor, uint8_t* wire, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Tensor = typename decltype(element)::type;
    launch(encode_kernel<typename decltype(codec)::type, Tensor>, plan, segments, stream, static_cast<const Tensor*>(tensor),
           wire);
  });
}

void decode(const Plan& plan, const Segment* segments, const uint8_t* wire, void* tensor, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Tensor = typename decltype(element)::type;
    launch(decode_kernel<typename decltype(codec)::type, Tensor>, plan, segments, stream, wire, static_cast<Tensor*>(tensor));
  });
}

void decode_accumulate(const Plan& plan, const Segment* segments, const uint8_t* wire, void* accumulator, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    using Codec = typename decltype(codec)::type;
    launch(decode_accumulate_kernel<Codec>, plan, segments, stream, wire, static_cast<typename Codec::Value*>(accumulator));
  });
}

void decode_sum_encode(const Plan& plan, const Segment* segments, const Messages& messages, float divisor, uint8_t* wire,
                       void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    using Codec = typename decltype(codec)::type;
    launch(decode_sum_encode_kernel<Codec>, plan, segments, stream, messages, Division<typename Codec::Value>(divisor), wire);
  });
}

}  // namespace accel::cuda
