// Encode, decode and sum, block by block and, within a block, chunk by chunk (spans.h). Compiled once for each instruction set:
// ACCEL_ISA names the namespace, the build gives the flags. Every function here has internal linkage (see platform.h).
//
// Memory traffic is what an operation costs: a block (2 KiB of float) is read from memory once and stays in the first cache for
// its second pass.
#include "kernels.h"

#include "lightning_accel/dispatch.h"
#include "packed.h"
#include "spans.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

// Messages from this size on are written past the caches: they would push out more than they are worth.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

template <class Codec>
constexpr bool kIsPacked = Codec::kCodeBits < 8;

// In this file a block is a scale group, the elements that share a scale. Bytes of a packed block hold several elements each.
template <class Codec>
struct BlockView {
  const typename Codec::Header* header;
  const std::conditional_t<kIsPacked<Codec>, uint8_t, typename Codec::Code>* codes;
};

template <class Codec>
ACCEL_INLINE BlockView<Codec> block_view(const Segment& segment, int64_t block, const uint8_t* wire) {
  constexpr int64_t kCodesBytes = Codec::kScaleNumel * Codec::kCodeBits / 8;
  const uint8_t* start = wire + segment.wire_offset;
  const uint8_t* codes = start + headers_bytes<Codec>(segment.numel) + block * kCodesBytes;
  BlockView<Codec> view{reinterpret_cast<const typename Codec::Header*>(start + block * Codec::kHeaderBytes), nullptr};
  view.codes = reinterpret_cast<decltype(view.codes)>(codes);
  return view;
}

// Calls body(segment, block, numel); numel is kScaleNumel, known to the compiler, for all blocks but a segment's last.
template <class Codec, class Body>
ACCEL_INLINE void for_each_block(const Plan& plan, Body body) {
  for (const Segment& segment : plan.segments()) {
    const int64_t full = segment.numel / Codec::kScaleNumel;
    for (int64_t block = 0; block < full; ++block) {
      body(segment, block, Codec::kScaleNumel);
    }
    if (const int ragged = static_cast<int>(segment.numel - full * Codec::kScaleNumel); ragged > 0) {
      body(segment, full, ragged);
    }
  }
}

// Calls body(start, length) for each chunk of at most kChunk elements; length is kChunk, known to the compiler, for all chunks
// but the last.
template <class Body>
ACCEL_INLINE void for_each_chunk(int numel, Body body) {
  const int whole = numel / kChunk * kChunk;
  for (int start = 0; start < whole; start += kChunk) {
    body(start, kChunk);
  }
  if (numel > whole) {
    body(whole, numel - whole);
  }
}

template <class Codec>
ACCEL_INLINE typename Codec::Statistic statistic_of(const typename Codec::Value* __restrict__ values, int numel) {
  typename Codec::Statistic statistic;
#pragma GCC unroll 8
  for (int i = 0; i < numel; ++i) {
    statistic.include(values[i]);
  }
  return statistic;
}

// Writes a block's header and codes, and calls beside(start, length) for each chunk: what is to be done in the meantime.
template <class Codec, class Tensor, class Beside>
ACCEL_INLINE void write_block(const typename Codec::Grid& grid, const Tensor* __restrict__ values, int numel,
                              BlockView<Codec> out, bool is_streamed, Beside beside) {
  using Code = typename Codec::Code;
  if constexpr (Codec::kHeaderBytes > 0) {
    *const_cast<typename Codec::Header*>(out.header) = grid.header;
  }
  Code* codes = const_cast<Code*>(out.codes);
  for_each_chunk(numel, [&](int start, int length) {
    beside(start, length);
    if (grid.is_blank) {
      memset(codes + start, 0, length * sizeof(Code));
    } else if (length == kChunk) {
      encode_chunk<Codec>(grid, values + start, codes + start, is_streamed);
    } else {
      encode_span<Codec>(grid, values + start, length, codes + start);
    }
  });
}

// The order in which a segment's full blocks are encoded: in turn from kStreams runs far apart, because the hardware's prefetcher
// follows several streams at once and fetches more from them than from one. Runs of an odd number of blocks do not meet in the
// same sets of the first cache. What is left over comes last.
class StreamOrder {
 public:
  explicit StreamOrder(int64_t blocks) : blocks_(blocks), run_(blocks / kStreams) { run_ -= run_ > 0 && run_ % 2 == 0; }
  int64_t operator[](int64_t k) const { return k < run_ * kStreams ? k % kStreams * run_ + k / kStreams : k; }
  int64_t next(int64_t k) const { return (*this)[k + 1 < blocks_ ? k + 1 : k]; }

 private:
  static constexpr int kStreams = 3;
  int64_t blocks_;
  int64_t run_;
};

// While a block is coded from the first cache, the statistic of the one after it is taken as it comes from memory, chunk by
// chunk: so each is read from memory once, and memory and arithmetic are both busy all the time. First all of one and then all of
// the other would leave each idle in turn.
template <class Codec, class Tensor>
__attribute__((noinline)) void encode_full_blocks(const Segment& segment, const Tensor* source, uint8_t* wire, bool is_streamed) {
  using Value = typename Codec::Value;
  constexpr bool kHasStatistic = Codec::kHeaderBytes > 0;
  // Tensors of another type are converted once, for the statistic, and coded from here.
  constexpr bool kIsStaged = kHasStatistic && !std::is_same_v<Tensor, Value>;
  Value stages[2][kIsStaged ? kBlockNumel : 1];
  // How far ahead of its statistic a block is asked for: enough to keep the memory busy, little enough to find it still cached.
  constexpr int kPrefetchBytes = 1024;

  const int64_t blocks = segment.numel / kBlockNumel;
  const StreamOrder order(blocks);
  typename Codec::Statistic statistic;
  const auto include = [&](const Tensor* values, int length, Value* stage) {
    if constexpr (kHasStatistic) {
      statistic.merge(statistic_of<Codec>(load_span(values, length, stage), length));
    }
  };
  for_each_chunk(kBlockNumel, [&](int start, int length) { include(source + start, length, stages[0] + start * kIsStaged); });
  for (int64_t k = 0; k < blocks; ++k) {
    const typename Codec::Grid grid(statistic);
    const Tensor* next = source + order.next(k) * kBlockNumel;
    Value* next_stage = stages[(k + 1) % 2];
    statistic = {};
    const auto beside = [&](int start, int length) {
      for (int line = 0; line < length * static_cast<int>(sizeof(Tensor)); line += kCacheLineBytes) {
        __builtin_prefetch(reinterpret_cast<const char*>(next + start) + kPrefetchBytes + line);
      }
      include(next + start, length, next_stage + start * kIsStaged);
    };
    const BlockView<Codec> out = block_view<Codec>(segment, order[k], wire);
    if constexpr (kIsStaged) {
      write_block<Codec>(grid, static_cast<const Value*>(stages[k % 2]), kBlockNumel, out, is_streamed, beside);
    } else {
      write_block<Codec>(grid, source + order[k] * kBlockNumel, kBlockNumel, out, is_streamed, beside);
    }
  }
}

// Encodes a block whose values have been loaded.
template <class Codec>
__attribute__((noinline)) void encode_values(const typename Codec::Value* values, int numel, BlockView<Codec> out) {
  if constexpr (std::is_same_v<Codec, Sign>) {
    encode_signs(values, numel, const_cast<Sign::Header*>(out.header), const_cast<uint8_t*>(out.codes));
  } else if constexpr (kIsPacked<Codec>) {
    const typename Codec::Grid grid(statistic_of<Codec>(values, numel));
    *const_cast<typename Codec::Header*>(out.header) = grid.header;
    typename Codec::Code codes[Codec::kScaleNumel] = {};
    if (!grid.is_blank) {
      encode_span<Codec>(grid, values, numel, codes);
    }
    pack_nibbles(codes, numel, const_cast<uint8_t*>(out.codes));
  } else {
    write_block<Codec>(typename Codec::Grid(statistic_of<Codec>(values, numel)), values, numel, out, false, [](int, int) {});
  }
}

// The elements of a block, as values.
template <class Codec, class Tensor>
ACCEL_INLINE const typename Codec::Value* load_block(const Tensor* tensor, const Segment& segment, int64_t block, int numel,
                                                     typename Codec::Value* buffer) {
  return load_span(tensor + segment.tensor_offset + block * Codec::kScaleNumel, numel, buffer);
}

template <class Codec, class Tensor>
void encode_by_block(const Plan& plan, const Tensor* tensor, uint8_t* wire) {
  for_each_block<Codec>(plan, [&](const Segment& segment, int64_t block, int numel) {
    typename Codec::Value buffer[Codec::kScaleNumel];
    encode_values<Codec>(load_block<Codec>(tensor, segment, block, numel, buffer), numel,
                         block_view<Codec>(segment, block, wire));
  });
}

template <class Codec, class Tensor>
void encode_as(const Plan& plan, const Tensor* tensor, uint8_t* wire) {
  using Value = typename Codec::Value;
  const bool is_streamed = kCanStream && plan.wire_bytes() >= kStreamingBytes;
  for (const Segment& segment : plan.segments()) {
    const Tensor* source = tensor + segment.tensor_offset;
    const int64_t full = segment.numel / kBlockNumel;
    if (full > 0) {
      encode_full_blocks<Codec>(segment, source, wire, is_streamed);
    }
    if (const int ragged = static_cast<int>(segment.numel - full * kBlockNumel); ragged > 0) {
      Value buffer[kBlockNumel];
      encode_values<Codec>(load_span(source + full * kBlockNumel, ragged, buffer), ragged,
                           block_view<Codec>(segment, full, wire));
    }
  }
  if (is_streamed) {
    finish_streams();
  }
}

// Calls body(start, length, value) for each chunk, where value(i) is its element i. A poisoned block needs no branch: its scale
// is NaN, and so is every product with it.
template <class Codec, class Body>
ACCEL_INLINE void decode_block(BlockView<Codec> block, int numel, Body body) {
  typename Codec::Header header{};
  if constexpr (Codec::kHeaderBytes > 0) {
    header = *block.header;
  }
  for_each_chunk(numel, [&](int start, int length) {
    if constexpr (std::is_same_v<Codec, Sign>) {
      float values[kChunk];
      decode_signs(header, block.codes, start, length, values);
      body(start, length, [&](int i) { return values[i]; });
    } else if constexpr (kIsPacked<Codec>) {
      static_assert(Codec::kScaleNumel == kChunk, "a block is one chunk");
      typename Codec::Code codes[kChunk];
      unpack_nibbles(block.codes, length, codes);
      body(start, length, [&](int i) { return Codec::decode(header, codes[i]); });
    } else {
      decode_span<Codec>(header, block.codes + start, length, [&](auto value) { body(start, length, value); });
    }
  });
}

// What the block's code has lost of `values`; where that is not finite, the old residual.
template <class Codec>
ACCEL_INLINE void update_residuals(BlockView<Codec> block, const float* values, int numel, const Residuals& residuals) {
  decode_block<Codec>(block, numel, [&](int start, int length, auto value) {
    for (int i = start; i < start + length; ++i) {
      const float lost = values[i] - value(i - start);
      residuals.updated[i] = is_finite(lost) ? lost : residuals.old[i];
    }
  });
}

ACCEL_INLINE Residuals residuals_at(const Residuals& residuals, int64_t place) {
  return {residuals.old + place, residuals.updated + place};
}

template <class Codec, class Tensor>
void encode_with_feedback_as(const Plan& plan, const Tensor* tensor, uint8_t* wire, const Residuals& residuals) {
  for_each_block<Codec>(plan, [&](const Segment& segment, int64_t block, int numel) {
    const Residuals of_block = residuals_at(residuals, segment.residual_offset + block * Codec::kScaleNumel);
    float buffer[Codec::kScaleNumel];
    float sums[Codec::kScaleNumel] = {};
    const float* values = load_block<Codec>(tensor, segment, block, numel, buffer);
    for (int i = 0; i < numel; ++i) {
      sums[i] = values[i] + of_block.old[i];
    }
    const BlockView<Codec> out = block_view<Codec>(segment, block, wire);
    encode_values<Codec>(sums, numel, out);
    update_residuals<Codec>(out, sums, numel, of_block);
  });
}

template <class Codec, class Tensor>
void decode_as(const Plan& plan, const uint8_t* wire, Tensor* tensor) {
  for_each_block<Codec>(plan, [&](const Segment& segment, int64_t block, int numel) {
    Tensor* target = tensor + segment.tensor_offset + block * Codec::kScaleNumel;
    decode_block<Codec>(block_view<Codec>(segment, block, wire), numel,
                        [&](int start, int length, auto value) { store_span(value, length, target + start); });
  });
}

template <class Codec>
void decode_accumulate_as(const Plan& plan, const uint8_t* wire, typename Codec::Value* accumulator) {
  using Value = typename Codec::Value;
  for_each_block<Codec>(plan, [&](const Segment& segment, int64_t block, int numel) {
    Value* target = accumulator + segment.tensor_offset + block * Codec::kScaleNumel;
    decode_block<Codec>(block_view<Codec>(segment, block, wire), numel, [&](int start, int length, auto value) {
      // Inf - Inf makes other NaN bits on other machines: store_value makes the canonical one.
      Value* __restrict__ sums = target + start;
      for (int i = 0; i < length; ++i) {
        sums[i] = store_value<Value>(sums[i] + value(i));
      }
    });
  });
}

template <class Codec>
void decode_sum_encode_as(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire, const Residuals& residuals) {
  using Value = typename Codec::Value;
  for_each_block<Codec>(plan, [&](const Segment& segment, int64_t block, int numel) {
    Value sum[Codec::kScaleNumel];
    const auto copy = [&](int start, int length, auto value) { copy_span(value, length, sum + start); };
    const auto add = [&](int start, int length, auto value) { add_span(value, length, sum + start); };
    decode_block<Codec>(block_view<Codec>(segment, block, messages.wire), numel, copy);
    for (int64_t k = 1; k < messages.count; ++k) {
      decode_block<Codec>(block_view<Codec>(segment, block, messages.wire + k * messages.stride_bytes), numel, add);
    }
    for (int i = 0; i < numel; ++i) {
      sum[i] /= static_cast<Value>(divisor);
    }
    const BlockView<Codec> out = block_view<Codec>(segment, block, wire);
    if constexpr (std::is_same_v<Value, float>) {
      if (residuals.old != nullptr) {
        const Residuals of_block = residuals_at(residuals, segment.residual_offset + block * Codec::kScaleNumel);
        for (int i = 0; i < numel; ++i) {
          sum[i] += of_block.old[i];
        }
        encode_values<Codec>(sum, numel, out);
        update_residuals<Codec>(out, sum, numel, of_block);
        return;
      }
    }
    encode_values<Codec>(sum, numel, out);
  });
}

void encode(const Plan& plan, const void* tensor, uint8_t* wire, const Residuals& residuals) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Codec = typename decltype(codec)::type;
    const auto* elements = static_cast<const typename decltype(element)::type*>(tensor);
    if constexpr (std::is_same_v<typename Codec::Value, float>) {
      if (residuals.old != nullptr) {
        encode_with_feedback_as<Codec>(plan, elements, wire, residuals);
        return;
      }
    }
    if constexpr (kIsPacked<Codec>) {
      encode_by_block<Codec>(plan, elements, wire);
    } else {
      encode_as<Codec>(plan, elements, wire);
    }
  });
}

void decode(const Plan& plan, const uint8_t* wire, void* tensor) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Tensor = typename decltype(element)::type;
    decode_as<typename decltype(codec)::type>(plan, wire, static_cast<Tensor*>(tensor));
  });
}

void decode_accumulate(const Plan& plan, const uint8_t* wire, void* accumulator) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    using Codec = typename decltype(codec)::type;
    decode_accumulate_as<Codec>(plan, wire, static_cast<typename Codec::Value*>(accumulator));
  });
}

void decode_sum_encode(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire, const Residuals& residuals) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    decode_sum_encode_as<typename decltype(codec)::type>(plan, messages, divisor, wire, residuals);
  });
}

}  // namespace

extern const Kernels kernels{encode, decode, decode_accumulate, decode_sum_encode};

}  // namespace accel::cpu::ACCEL_ISA
