// The operations of codecs.h on one block, by a warp that keeps it in registers from the first read to the last write
// (block.cuh): no shared memory, no atomics. Memory traffic is what an operation costs, so lanes move up to 16 bytes at once and
// a warp has 1 to 4 KiB under way before it uses the first of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "lightning_accel/codecs.h"
#include "lightning_accel/dispatch.h"
#include "packed.cuh"

namespace accel::cuda {
namespace {

// ---- Widths, which make vectors of the widest operand

template <class Codec, class Item>
constexpr int kDecodeWidth = kVectorBytes / std::max(sizeof(Item), sizeof(typename Codec::Code));

// Residuals are float. Signs are gathered across lanes (packed.cuh).
template <class Codec, class Item, bool kHasFeedback>
constexpr int kEncodeWidth = std::is_same_v<Codec, Sign> ? 1
                             : kHasFeedback              ? std::min(kDecodeWidth<Codec, Item>, kDecodeWidth<Codec, float>)
                                                         : kDecodeWidth<Codec, Item>;

// ---- Parts

// The residuals of a block; none without error feedback.
template <bool kHasFeedback>
__device__ __forceinline__ Residuals residuals_of(const Residuals& residuals, const Segment& segment, int64_t block) {
  if constexpr (kHasFeedback) {
    const int64_t place = segment.residual_offset + block * kBlockNumel;
    return {residuals.old + place, residuals.updated + place};
  } else {
    return {};
  }
}

template <int kWidth>
__device__ __forceinline__ bool is_aligned(const Residuals& residuals) {
  return is_aligned<kWidth>(residuals.old) && is_aligned<kWidth>(residuals.updated);
}

// wire <- code of values, with error feedback if there is: what the code has lost is known from the registers. The residuals'
// memory may be one, so each lane reads its own before it writes them.
template <class Codec, bool kHasFeedback, int kWidth>
__device__ __forceinline__ void encode_block(typename Codec::Value (&values)[kLaneNumel], int numel, uint8_t* wire,
                                             const WireOffsets& at, const Residuals& residuals) {
  float old[kLaneNumel];
  if constexpr (kHasFeedback) {
    load<kWidth>(residuals.old, numel, old);
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      values[i] += old[i];
    }
  }
  Coded<Codec, kWidth> coded;
  coded.encode(values, numel);
  coded.store(wire, at, numel);
  if constexpr (kHasFeedback) {
    float updated[kLaneNumel];
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      const float lost = values[i] - coded.value(i);
      const bool is_finite = (bit_cast<uint32_t>(lost) & 0x7FFFFFFFu) < kInfinityBits;
      updated[i] = is_finite ? lost : old[i];
    }
    store<kWidth>(residuals.updated, numel, updated);
  }
}

__device__ __forceinline__ const uint8_t* message_at(const Messages& messages, int64_t k) {
  return messages.wire + k * messages.stride_bytes;
}

// sums <- sums + value of messages[first] + value of messages[first + 1] + ... to the last, in this order. Asks for kTogether
// messages before it adds the first of them, and for fewer at the end. `Sources` has a count, and message_at says where they are.
template <class Codec, int kWidth, int kTogether, class Sources>
__device__ __forceinline__ void add_messages(const Sources& messages, int64_t first, const WireOffsets& at, int numel,
                                             typename Codec::Value (&sums)[kLaneNumel]) {
  for (; first + kTogether <= messages.count; first += kTogether) {
    Coded<Codec, kWidth> coded[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      coded[k].load(message_at(messages, first + k), at, numel);
    }
    __syncwarp();  // or the compiler puts each load behind the sums before it, and one message is under way at a time
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        sums[i] += coded[k].value(i);
      }
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

// ---- Operations on a block of a segment. Alignment: `tensor` and residuals of their element, messages 16 bytes.

// wire <- code of tensor. A warp reads its block (and its residuals), merges the lanes' statistics by shuffles, and writes header
// and codes (and residuals).
template <class Codec, bool kHasFeedback, class Tensor>
__device__ __forceinline__ void encode_tensor(const Segment& segment, int64_t block, int numel, const Tensor* tensor,
                                              uint8_t* wire, const Residuals& residuals) {
  using Value = typename Codec::Value;
  constexpr int kWidest = kEncodeWidth<Codec, Tensor, kHasFeedback>;
  const Residuals of_block = residuals_of<kHasFeedback>(residuals, segment, block);
  const Tensor* source = tensor + segment.tensor_offset + block * kBlockNumel;
  with_width<kWidest>(numel, is_aligned<kWidest>(source) && is_aligned<kWidest>(of_block), [=](auto width) {
    constexpr int kWidth = decltype(width)::value;
    Tensor items[kLaneNumel];
    load<kWidth>(source, numel, items);
    Value values[kLaneNumel];
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      values[i] = load_value<Value>(items[i]);
    }
    encode_block<Codec, kHasFeedback, kWidth>(values, numel, wire, wire_offsets<Codec>(segment, block), of_block);
  });
}

// tensor <- value of wire. A warp reads headers (all lanes the same ones) and codes of its block and writes its elements.
template <class Codec, class Tensor>
__device__ __forceinline__ void decode_tensor(const Segment& segment, int64_t block, int numel, const uint8_t* wire,
                                              Tensor* tensor) {
  constexpr int kWidest = kDecodeWidth<Codec, Tensor>;
  Tensor* target = tensor + segment.tensor_offset + block * kBlockNumel;
  with_width<kWidest>(numel, is_aligned<kWidest>(target), [=](auto width) {
    constexpr int kWidth = decltype(width)::value;
    Coded<Codec, kWidth> coded;
    coded.load(wire, wire_offsets<Codec>(segment, block), numel);
    Tensor items[kLaneNumel];
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      items[i] = store_value<Tensor>(coded.value(i));
    }
    store<kWidth>(target, numel, items);
  });
}

// wire <- code of (value of messages[0] + value of messages[1] + ...) / divisor, summed in this order. A warp owns the same block
// of all messages: it asks for several messages' codes at once, adds them in order, divides and encodes, all in registers. Codes
// are aligned on both sides, so only a segment's ragged last block, or one with odd residuals, is guarded. `wire` may be one of
// the messages: what a lane writes, codes or header, has been read by then by all lanes that read it, because it goes through
// shuffles or votes with them, or by no other.
template <class Codec, bool kHasFeedback, class Sources>
__device__ __forceinline__ void sum_messages(const Segment& segment, int64_t block, int numel, const Sources& messages,
                                             const Division<typename Codec::Value>& division, uint8_t* wire,
                                             const Residuals& residuals) {
  using Value = typename Codec::Value;
  constexpr int kWidest = kEncodeWidth<Codec, typename Codec::Code, kHasFeedback>;
  const WireOffsets at = wire_offsets<Codec>(segment, block);
  const Residuals of_block = residuals_of<kHasFeedback>(residuals, segment, block);
  with_width<kWidest>(numel, is_aligned<kWidest>(of_block), [=](auto width) {
    constexpr int kWidth = decltype(width)::value;
    Value sums[kLaneNumel];
#pragma unroll
    for (Value& sum : sums) {
      sum = -Value{0};  // -0 + x is x for every x, -0 and 0 among them: the sum starts from the first message's value
    }
    add_messages<Codec, kWidth, (kWidth == kGuarded ? 1 : Coded<Codec, kWidth>::kTogether)>(messages, 0, at, numel, sums);
    division.apply(sums);
    encode_block<Codec, kHasFeedback, kWidth>(sums, numel, wire, at, of_block);
  });
}

// ---- Launchers' choices

// Calls launch(std::bool_constant<has feedback>{}). Values in double have no residuals.
template <class Value, class Launch>
void with_feedback(const Residuals& residuals, Launch launch) {
  if constexpr (std::is_same_v<Value, float>) {
    if (residuals.old != nullptr) {
      launch(std::true_type{});
      return;
    }
  }
  launch(std::false_type{});
}

}  // namespace
}  // namespace accel::cuda
