// Encode, decode and sum, block by block. Compiled once for each instruction set: ACCEL_ISA names the namespace, the build gives
// the flags, the compiler vectorises. Every function here has internal linkage (see platform.h).
//
// Memory traffic is what an operation costs: a block (2 KiB of float) is read from memory once and stays in the first cache for
// its second pass.
#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "lightning_accel/dispatch.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

constexpr int kCacheLineBytes = 64;

// Full blocks are encoded this many at a time, far apart in memory: the hardware's prefetcher follows each stream, and the
// divisions of one block hide behind the others.
constexpr int kStreams = 4;

// Messages from this size on bypass the caches when they are written: they would push out more than they are worth.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

template <class Codec>
struct BlockView {
  const typename Codec::Header* header;
  const typename Codec::Code* codes;
};

template <class Codec>
ACCEL_INLINE BlockView<Codec> block_view(const Segment& segment, int64_t block, const uint8_t* wire) {
  const uint8_t* start = wire + segment.wire_offset;
  return {reinterpret_cast<const typename Codec::Header*>(start + block * Codec::kHeaderBytes),
          reinterpret_cast<const typename Codec::Code*>(start + headers_bytes<Codec>(segment.numel)) + block * kBlockNumel};
}

// numel is kBlockNumel, known to the compiler, for all blocks but a segment's last.
template <class Body>
ACCEL_INLINE void for_each_block(const Plan& plan, Body body) {
  for (const Segment& segment : plan.segments()) {
    const int64_t full = segment.numel / kBlockNumel;
    for (int64_t block = 0; block < full; ++block) {
      body(segment, block, kBlockNumel);
    }
    if (const int ragged = static_cast<int>(segment.numel - full * kBlockNumel); ragged > 0) {
      body(segment, full, ragged);
    }
  }
}

template <class Codec, class Tensor>
ACCEL_INLINE typename Codec::Statistic statistic_of(const Tensor* __restrict__ values, int numel) {
  typename Codec::Statistic statistic;
#pragma GCC unroll 8
  for (int i = 0; i < numel; ++i) {
    statistic.include(load_value<typename Codec::Value>(values[i]));
  }
  return statistic;
}

// One cache line of codes, past the caches.
ACCEL_INLINE void stream_line(const void* __restrict__ line, void* __restrict__ target) {
#if defined(__SSE2__)
  for (int i = 0; i < kCacheLineBytes / 16; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(target) + i, _mm_load_si128(static_cast<const __m128i*>(line) + i));
  }
#else
  memcpy(target, line, kCacheLineBytes);
#endif
}

// While this block is coded from the first cache, the same stream's next block is asked for.
template <class Codec, bool kStreaming, class Tensor>
ACCEL_INLINE void write_block(const typename Codec::Grid& grid, const Tensor* __restrict__ values, int numel,
                              BlockView<Codec> out) {
  using Code = typename Codec::Code;
  using Value = typename Codec::Value;
  if constexpr (Codec::kHeaderBytes > 0) {
    *const_cast<typename Codec::Header*>(out.header) = grid.header;
  }
  Code* __restrict__ codes = const_cast<Code*>(out.codes);
  if (grid.is_blank) {
    for (int i = 0; i < numel; ++i) {
      codes[i] = {};
    }
    return;
  }
  constexpr int kLine = kCacheLineBytes / static_cast<int>(sizeof(Code));
  const int whole = numel / kLine * kLine;
  for (int start = 0; start < whole; start += kLine) {
    for (int ahead = 0; ahead < kLine * static_cast<int>(sizeof(Tensor)); ahead += kCacheLineBytes) {
      __builtin_prefetch(reinterpret_cast<const char*>(values + kBlockNumel + start) + ahead);
    }
    alignas(kCacheLineBytes) Code line[kLine];
    Code* __restrict__ target = kStreaming ? line : codes + start;
    for (int i = 0; i < kLine; ++i) {
      target[i] = grid.encode(load_value<Value>(values[start + i]));
    }
    if constexpr (kStreaming) {
      stream_line(line, codes + start);
    }
  }
  for (int i = whole; i < numel; ++i) {
    codes[i] = grid.encode(load_value<Value>(values[i]));
  }
}

// Calls store(i, value) for each element.
template <class Codec, class Store>
ACCEL_INLINE void decode_block(BlockView<Codec> block, int numel, Store store) {
  typename Codec::Header header{};
  if constexpr (Codec::kHeaderBytes > 0) {
    header = *block.header;
    if (Codec::is_poisoned(header)) {
      for (int i = 0; i < numel; ++i) {
        store(i, canonical_nan());
      }
      return;
    }
  }
  const auto* __restrict__ codes = block.codes;
  for (int i = 0; i < numel; ++i) {
    store(i, Codec::decode(header, codes[i]));
  }
}

template <class Codec, bool kStreaming, class Tensor>
ACCEL_INLINE void encode_as(const Plan& plan, const Tensor* tensor, uint8_t* wire) {
  for (const Segment& segment : plan.segments()) {
    const Tensor* __restrict__ source = tensor + segment.tensor_offset;
    const int64_t full = segment.numel / kBlockNumel;
    const int64_t length = full / kStreams;
    for (int64_t block = 0; block < length; ++block) {
      typename Codec::Statistic statistics[kStreams];
      for (int stream = 0; stream < kStreams; ++stream) {
        statistics[stream] = statistic_of<Codec>(source + (stream * length + block) * kBlockNumel, kBlockNumel);
      }
      for (int stream = 0; stream < kStreams; ++stream) {
        const int64_t at = stream * length + block;
        write_block<Codec, kStreaming>(typename Codec::Grid(statistics[stream]), source + at * kBlockNumel, kBlockNumel,
                                       block_view<Codec>(segment, at, wire));
      }
    }
    for (int64_t at = kStreams * length; at < num_blocks(segment.numel); ++at) {
      const int64_t rest = segment.numel - at * kBlockNumel;
      const int numel = static_cast<int>(rest < kBlockNumel ? rest : kBlockNumel);
      const Tensor* values = source + at * kBlockNumel;
      write_block<Codec, false>(typename Codec::Grid(statistic_of<Codec>(values, numel)), values, numel,
                                block_view<Codec>(segment, at, wire));
    }
  }
#if defined(__SSE2__)
  if constexpr (kStreaming) {
    _mm_sfence();  // streamed lines become visible before whoever sends the message is told
  }
#endif
}

template <class Codec, class Tensor>
void decode_as(const Plan& plan, const uint8_t* wire, Tensor* tensor) {
  for_each_block(plan, [&](const Segment& segment, int64_t block, int numel) {
    Tensor* __restrict__ target = tensor + segment.tensor_offset + block * kBlockNumel;
    decode_block<Codec>(block_view<Codec>(segment, block, wire), numel,
                        [=](int i, auto value) { target[i] = store_value<Tensor>(value); });
  });
}

template <class Codec>
void decode_accumulate_as(const Plan& plan, const uint8_t* wire, typename Codec::Value* accumulator) {
  for_each_block(plan, [&](const Segment& segment, int64_t block, int numel) {
    auto* __restrict__ target = accumulator + segment.tensor_offset + block * kBlockNumel;
    decode_block<Codec>(block_view<Codec>(segment, block, wire), numel, [=](int i, auto value) { target[i] += value; });
  });
}

template <class Codec>
void decode_sum_encode_as(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire) {
  using Value = typename Codec::Value;
  for_each_block(plan, [&](const Segment& segment, int64_t block, int numel) {
    Value sum[kBlockNumel];
    Value* __restrict__ values = sum;
    decode_block<Codec>(block_view<Codec>(segment, block, messages.wire), numel, [=](int i, auto value) { values[i] = value; });
    for (int64_t k = 1; k < messages.count; ++k) {
      decode_block<Codec>(block_view<Codec>(segment, block, messages.wire + k * messages.stride_bytes), numel,
                          [=](int i, auto value) { values[i] += value; });
    }
    for (int i = 0; i < numel; ++i) {
      values[i] /= static_cast<Value>(divisor);
    }
    write_block<Codec, false>(typename Codec::Grid(statistic_of<Codec>(sum, numel)), sum, numel,
                              block_view<Codec>(segment, block, wire));
  });
}

void encode(const Plan& plan, const void* tensor, uint8_t* wire) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Codec = typename decltype(codec)::type;
    const auto* source = static_cast<const typename decltype(element)::type*>(tensor);
    if (plan.wire_bytes() < kStreamingBytes) {
      encode_as<Codec, false>(plan, source, wire);
    } else {
      encode_as<Codec, true>(plan, source, wire);
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

void decode_sum_encode(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    decode_sum_encode_as<typename decltype(codec)::type>(plan, messages, divisor, wire);
  });
}

}  // namespace

extern const Kernels kernels{encode, decode, decode_accumulate, decode_sum_encode};

}  // namespace accel::cpu::ACCEL_ISA
