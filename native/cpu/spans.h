// Short runs of elements between a tensor's type, the arithmetic's and the wire's, and stores that bypass the caches.
//
// Plain loops for the compiler to vectorise, with two exceptions. Halves are converted by a loop of their own or by F16C: in a
// longer loop body the compiler turns their conversion into branches. And int8 from float32, the usual case, narrows its codes by
// hand on AVX2. Either way the bits are those of the codec's header (native/tests).
#pragma once

#include <type_traits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lightning_accel/dispatch.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

constexpr int kCacheLineBytes = 64;
constexpr int kChunk = 128;  // elements, the longest run handled at once

static_assert(kBlockNumel % kChunk == 0, "a block is whole chunks");

// values <- halves; exact.
__attribute__((noinline)) void load_halves(const Half* __restrict__ halves, int numel, float* __restrict__ values) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= numel; i += 8) {
    _mm256_storeu_ps(values + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  }
#endif
  for (; i < numel; ++i) {
    values[i] = Convert<Half>::to_float(halves[i]);
  }
}

// halves <- values, rounded half to even; every NaN becomes the canonical one.
__attribute__((noinline)) void store_halves(const float* __restrict__ values, int numel, Half* __restrict__ halves) {
  int i = 0;
#if defined(__F16C__)
  const __m256 nan = _mm256_set1_ps(canonical_nan());
  for (; i + 8 <= numel; i += 8) {
    const __m256 x = _mm256_loadu_ps(values + i);
    const __m256 canonical = _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), _mm256_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < numel; ++i) {
    halves[i] = Convert<Half>::from_float(values[i]);
  }
}

// A tensor's elements as values: where they are if they have that type, else in `buffer`.
template <class Value, class Tensor>
ACCEL_INLINE const Value* load_span(const Tensor* __restrict__ tensor, int numel, Value* __restrict__ buffer) {
  if constexpr (std::is_same_v<Tensor, Value>) {
    return tensor;
  } else if constexpr (std::is_same_v<Tensor, Half>) {
    load_halves(tensor, numel, buffer);
  } else {
    for (int i = 0; i < numel; ++i) {
      buffer[i] = load_value<Value>(tensor[i]);
    }
  }
  return buffer;
}

// values <- value(0), value(1) ...
template <class Value, class ValueAt>
ACCEL_INLINE void copy_span(ValueAt value, int numel, Value* __restrict__ values) {
  for (int i = 0; i < numel; ++i) {
    values[i] = value(i);
  }
}

// values <- values + value(0), value(1) ...
template <class Value, class ValueAt>
ACCEL_INLINE void add_span(ValueAt value, int numel, Value* __restrict__ values) {
  for (int i = 0; i < numel; ++i) {
    values[i] += value(i);
  }
}

// tensor <- value(0), value(1) ...; numel <= kChunk.
template <class Tensor, class ValueAt>
ACCEL_INLINE void store_span(ValueAt value, int numel, Tensor* __restrict__ tensor) {
  if constexpr (std::is_same_v<Tensor, Half>) {
    float values[kChunk];
    copy_span(value, numel, values);
    store_halves(values, numel, tensor);
  } else {
    for (int i = 0; i < numel; ++i) {
      tensor[i] = store_value<Tensor>(value(i));
    }
  }
}

// Copies past the caches, so that a written line is neither read before nor pushes another out. Both pointers and `bytes` are
// multiples of 16, as everything on the wire is.
#if defined(__SSE2__)
constexpr bool kCanStream = true;
[[maybe_unused]] __attribute__((noinline)) void stream(const void* __restrict__ source, int64_t bytes,
                                                       void* __restrict__ target) {
  for (int64_t i = 0; i < bytes / 16; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(target) + i, _mm_load_si128(static_cast<const __m128i*>(source) + i));
  }
}
// Call this before streamed bytes are handed to whoever sends them.
ACCEL_INLINE void finish_streams() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
ACCEL_INLINE void stream(const void*, int64_t, void*) {}
ACCEL_INLINE void finish_streams() {}
#endif

// codes <- tensor's elements on the grid; numel <= kChunk.
template <class Codec, class Tensor>
ACCEL_INLINE void encode_span(const typename Codec::Grid& grid, const Tensor* __restrict__ tensor, int numel,
                              typename Codec::Code* __restrict__ codes) {
  using Value = typename Codec::Value;
  if constexpr (std::is_same_v<typename Codec::Code, Half>) {
    Value buffer[kChunk];
    store_halves(load_span<Value>(tensor, numel, buffer), numel, codes);
  } else if constexpr (std::is_same_v<Tensor, Half>) {
    Value buffer[kChunk];
    encode_span<Codec>(grid, load_span<Value>(tensor, numel, buffer), numel, codes);
  } else {
    for (int i = 0; i < numel; ++i) {
      codes[i] = grid.encode(load_value<Value>(tensor[i]));
    }
  }
}

#if defined(__AVX2__)
// Int8::Grid::encode of 32 values: the codes are the low bytes of x * inverse + kRoundingMagic. The compiler needs half as many
// instructions again to narrow them.
ACCEL_INLINE __m256i encode_32(const Int8::Grid& grid, const float* values) {
  const __m256 inverse = _mm256_set1_ps(grid.inverse);
  const __m256 magic = _mm256_set1_ps(kRoundingMagic);
  const __m256i low_byte = _mm256_set1_epi32(0xFF);
  __m256i codes[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 sum = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(values + 8 * i), inverse), magic);
    codes[i] = _mm256_and_si256(_mm256_castps_si256(sum), low_byte);
  }
  // Packing works on each half of a register, which leaves groups of four in the order 0 2 4 6 1 3 5 7.
  const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3]));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

// The same for kChunk elements, and past the caches if `is_streamed`.
template <class Codec, class Tensor>
ACCEL_INLINE void encode_chunk(const typename Codec::Grid& grid, const Tensor* __restrict__ tensor,
                               typename Codec::Code* __restrict__ codes, bool is_streamed) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Codec, Int8> && std::is_same_v<Tensor, float>) {
    for (int i = 0; i < kChunk; i += 32) {
      const __m256i encoded = encode_32(grid, tensor + i);
      if (is_streamed) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(codes + i), _mm256_castsi256_si128(encoded));
        _mm_stream_si128(reinterpret_cast<__m128i*>(codes + i + 16), _mm256_extracti128_si256(encoded, 1));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), encoded);
      }
    }
    return;
  }
#endif
  if (is_streamed) {
    alignas(kCacheLineBytes) typename Codec::Code lines[kChunk];
    encode_span<Codec>(grid, tensor, kChunk, lines);
    stream(lines, sizeof lines, codes);
  } else {
    encode_span<Codec>(grid, tensor, kChunk, codes);
  }
}

// Calls body(value), where value(i) is what codes[i] stands for; numel <= kChunk.
template <class Codec, class Body>
ACCEL_INLINE void decode_span(const typename Codec::Header& header, const typename Codec::Code* codes, int numel, Body body) {
  using Value = typename Codec::Value;
  if constexpr (std::is_same_v<typename Codec::Code, Half>) {
    Value buffer[kChunk];
    const Value* values = load_span<Value>(codes, numel, buffer);
    body([=](int i) { return values[i]; });
  } else {
    body([=](int i) { return Codec::decode(header, codes[i]); });
  }
}

}  // namespace
}  // namespace accel::cpu::ACCEL_ISA
