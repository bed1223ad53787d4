// A warp's block: which one it is, how it moves between memory and registers, and what it is on the wire.
//
// One warp owns one block of 512 elements at a time and keeps it in registers, 16 elements a lane.
//
// Width: with width w a lane's 16 elements are 16 / w runs of w neighbours, run r of lane l starting at element (32 r + l) w of
// the block. So w elements are one access, and the accesses of a warp lie side by side. A block that is full and aligned to
// w elements takes the width that makes 16 bytes of the widest operand; any other is guarded: it lies as with width 1, and
// each element is accessed only if the block reaches so far. Offsets are 64-bit: tensors and messages may be larger than 2^31
// elements or bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lightning_accel/plan.h"

namespace accel::cuda {
namespace {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kLaneNumel = kBlockNumel / kWarpLanes;
constexpr int kThreads = 128;  // a thread block: four warps that know nothing of each other
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kVectorBytes = 16;        // what a lane moves at once
constexpr int kLaneBytesInFlight = 64;  // what a lane of the summing kernel asks for before it adds

__device__ __forceinline__ int lane() { return threadIdx.x % kWarpLanes; }

// ---- Which block

// The plan, as a kernel sees it.
struct Blocks {
  const Segment* segments;
  int num_segments;
  int64_t count;
};

// The last segment that starts at `block` or before. Segments without elements start where the next one does, or behind the last
// block, so the last is the one that holds the block. Each step the 32 lanes probe 32 places and keep the stretch between
// two of them: log32 of the segments steps, not log2. All lanes take part and get the same answer.
__device__ __forceinline__ Segment find_segment(const Blocks& blocks, int64_t block) {
  int first = 0;
  int count = blocks.num_segments;  // candidates: segments[first], ..., segments[first + count - 1]
  while (count > 1) {
    const int stride = (count + kWarpLanes - 1) / kWarpLanes;
    const int probe = lane() * stride;
    const bool is_before = probe < count && blocks.segments[first + probe].first_block <= block;
    const int skipped = (__popc(__ballot_sync(kAllLanes, is_before)) - 1) * stride;  // lane 0 is always before
    first += skipped;
    count = count - skipped < stride ? count - skipped : stride;
  }
  return blocks.segments[first];
}

// Calls body(i) for this warp's share of 0, 1 ... count - 1.
template <class Body>
__device__ __forceinline__ void for_each_index(int64_t count, Body body) {
  const int64_t num_warps = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes; i < count; i += num_warps) {
    body(i);
  }
}

// Elements of a tensor's or a segment's block.
__device__ __forceinline__ int block_numel(int64_t numel, int64_t block) {
  const int64_t left = numel - block * kBlockNumel;
  return left < kBlockNumel ? static_cast<int>(left) : kBlockNumel;
}

// Calls body(segment, block, numel) for the plan's i-th block; `block` counts from the segment's first.
template <class Body>
__device__ __forceinline__ void with_block(const Blocks& blocks, int64_t i, Body body) {
  const Segment segment = find_segment(blocks, i);
  const int64_t block = i - segment.first_block;
  body(segment, block, block_numel(segment.numel, block));
}

// Calls body(segment, block, numel) for this warp's share of the plan's blocks.
template <class Body>
__device__ __forceinline__ void for_each_block(const Blocks& blocks, Body body) {
  for_each_index(blocks.count, [&](int64_t i) { with_block(blocks, i, body); });
}

// Where a block lies in a message, in bytes.
struct WireOffsets {
  int64_t header;
  int64_t codes;
};

template <class Codec>
__device__ __forceinline__ WireOffsets wire_offsets(const Segment& segment, int64_t block) {
  constexpr int64_t kHeadersBytes = kBlockNumel / Codec::kScaleNumel * Codec::kHeaderBytes;
  constexpr int64_t kCodesBytes = kBlockNumel * Codec::kCodeBits / 8;
  return {segment.wire_offset + block * kHeadersBytes,
          segment.wire_offset + headers_bytes<Codec>(segment.numel) + block * kCodesBytes};
}

// ---- Moving a block between memory and registers

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;
constexpr int kGuarded = 0;  // a width

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

template <int kWidth, class T>
__device__ __forceinline__ bool is_aligned(const T* items) {
  return reinterpret_cast<uintptr_t>(items) % (kWidth * sizeof(T)) == 0;
}

// Calls body(Width<kWidth>) for a full block that is aligned so far, else body(Width<kGuarded>). One way a warp.
template <int kWidth, class Body>
__device__ __forceinline__ void with_width(int numel, bool is_aligned, Body body) {
  if (numel == kBlockNumel && is_aligned) {
    body(Width<kWidth>{});
  } else {
    body(Width<kGuarded>{});
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
  constexpr int kRun = kWidth == kGuarded ? 1 : kWidth;
  return (i / kRun * kWarpLanes + lane()) * kRun + i % kRun;
}
template <int kWidth>
__device__ __forceinline__ bool has_element(int i, int numel) {
  return kWidth != kGuarded || element<kWidth>(i) < numel;
}

// items <- those of this lane; zeros where the block does not reach.
template <int kWidth, class T, int kNumel>
__device__ __forceinline__ void load(const T* source, int numel, T (&items)[kNumel]) {
  if constexpr (kWidth != kGuarded) {
    using Word = typename Vector<kWidth * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < kNumel; i += kWidth) {
      const Word word = *reinterpret_cast<const Word*>(source + element<kWidth>(i));
      memcpy(&items[i], &word, sizeof(Word));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNumel; ++i) {
      items[i] = has_element<kGuarded>(i, numel) ? source[element<kGuarded>(i)] : T{};
    }
  }
}

template <int kWidth, class T, int kNumel>
__device__ __forceinline__ void store(T* target, int numel, const T (&items)[kNumel]) {
  if constexpr (kWidth != kGuarded) {
    using Word = typename Vector<kWidth * sizeof(T)>::type;
#pragma unroll
    for (int i = 0; i < kNumel; i += kWidth) {
      Word word;
      memcpy(&word, &items[i], sizeof(Word));
      store_word(reinterpret_cast<Word*>(target + element<kWidth>(i)), word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kNumel; ++i) {
      if (has_element<kGuarded>(i, numel)) {
        target[element<kGuarded>(i)] = items[i];
      }
    }
  }
}

// ---- What a block is on the wire

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

// Byte `place` of a word, less `bias`, as a float, exactly: it becomes the lowest bits of 2^23, which are its integer part. A
// GPU's conversions of integers are an eighth as fast as its additions, and would be all that a sum of messages waits for.
__device__ __forceinline__ float byte_as_float(uint32_t word, int place, float bias) {
  constexpr float kIntegers = 0x1p23f;
  return bit_cast<float>(__byte_perm(word, bit_cast<uint32_t>(kIntegers), 0x7650u | place)) - (kIntegers + bias);
}

// Merges the statistics of kLanes neighbours; all of them get the same.
template <int kLanes, class Statistic>
__device__ __forceinline__ Statistic merge_over_lanes(Statistic statistic) {
  if constexpr (!std::is_empty<Statistic>::value) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      statistic.merge(shuffle_xor(statistic, distance));
    }
  }
  return statistic;
}

// A lane's part of a coded block, in registers. What is on the wire of one lane may be in the registers of all.
template <class Codec, int kWidth>
struct Coded {
  using Value = typename Codec::Value;

  // How many messages the summing kernel asks for before it adds the first of them.
  static constexpr int kLaneBytes = kLaneNumel * static_cast<int>(sizeof(typename Codec::Code));
  static constexpr int kTogether = kLaneBytes < kLaneBytesInFlight ? kLaneBytesInFlight / kLaneBytes : 1;

  typename Codec::Header header;
  typename Codec::Code codes[kLaneNumel];

  __device__ __forceinline__ void load(const uint8_t* wire, const WireOffsets& at, int numel) {
    if constexpr (Codec::kHeaderBytes > 0) {
      header = *reinterpret_cast<const typename Codec::Header*>(wire + at.header);
    }
    cuda::load<kWidth>(reinterpret_cast<const typename Codec::Code*>(wire + at.codes), numel, codes);
  }

  // Each lane computes the same grid; lane 0 writes the header.
  __device__ __forceinline__ void encode(const Value (&values)[kLaneNumel], int numel) {
    typename Codec::Statistic statistic;
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      if (has_element<kWidth>(i, numel)) {
        statistic.include(values[i]);
      }
    }
    const typename Codec::Grid grid(merge_over_lanes<kWarpLanes>(statistic));
    header = grid.header;
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      codes[i] = typename Codec::Code{};
    }
    if (!grid.is_blank) {
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        codes[i] = grid.encode(values[i]);
      }
    }
  }

  __device__ __forceinline__ void store(uint8_t* wire, const WireOffsets& at, int numel) const {
    if constexpr (Codec::kHeaderBytes > 0) {
      if (lane() == 0) {
        *reinterpret_cast<typename Codec::Header*>(wire + at.header) = header;
      }
    }
    cuda::store<kWidth>(reinterpret_cast<typename Codec::Code*>(wire + at.codes), numel, codes);
  }

  // Value of this lane's i-th element. Poisoned blocks need no branch, because their scale is NaN and so is every product with
  // it. A branch would delay the loads of the codes until the header is there.
  __device__ __forceinline__ Value value(int i) const {
    using Code = typename Codec::Code;
    if constexpr (std::is_integral<Code>::value) {
      static_assert(sizeof(Code) == 1, "codes are bytes");
      uint32_t word;
      memcpy(&word, &codes[i / 4 * 4], sizeof word);
      constexpr bool kIsSigned = std::is_signed<Code>::value;
      return Codec::decode(header, byte_as_float(kIsSigned ? word ^ 0x80808080u : word, i % 4, kIsSigned ? 128.0f : 0.0f));
    } else {
      return Codec::decode(header, codes[i]);
    }
  }
};

}  // namespace
}  // namespace accel::cuda
