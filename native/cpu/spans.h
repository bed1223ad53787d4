// Runs of elements between a tensor's type, the arithmetic's and the wire's, and copies that bypass the caches.
//
// Mostly plain loops for the compiler to vectorise. Halves are the exception: they are converted by a loop (or, with F16C, an
// instruction) of their own, because inlined into a longer loop body the compiler turns their conversion into branches.
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
constexpr int kChunk = 128;  // the longest run handled at once: it fits in the first cache several times

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

#if defined(__AVX2__)
// Grid::encode for 32 values at once: the codes are the low bytes of x * inverse + kRoundingMagic. The compiler narrows them in
// half as many instructions again.
ACCEL_INLINE __m256i encode_32(const Int8::Grid& grid, const float* values) {
  const __m256 inverse = _mm256_set1_ps(grid.inverse);
  const __m256 magic = _mm256_set1_ps(kRoundingMagic);
  const __m256i low_byte = _mm256_set1_epi32(0xFF);
  __m256i codes[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 sum = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(values + 8 * i), inverse), magic);
    codes[i] = _mm256_and_si256(_mm256_castps_si256(sum), low_byte);
  }
  // Packing works on the two halves of a register, which leaves groups of four in the order 0 2 4 6 1 3 5 7.
  const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3]));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
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
    int i = 0;
#if defined(__AVX2__)
    if constexpr (std::is_same_v<Codec, Int8> && std::is_same_v<Tensor, float>) {
      for (; i + 32 <= numel; i += 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), encode_32(grid, tensor + i));
      }
    }
#endif
    for (; i < numel; ++i) {
      codes[i] = grid.encode(load_value<Value>(tensor[i]));
    }
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

// Bytes past the caches: big results would push out more than they are worth, and a written line need not be read before.
// Both pointers and `bytes` are multiples of kStreamAlignment.
constexpr int kStreamAlignment = 16;
#if defined(__SSE2__)
constexpr bool kCanStream = true;
__attribute__((noinline)) void stream(const void* __restrict__ source, int64_t bytes, void* __restrict__ target) {
  for (int64_t i = 0; i < bytes / kStreamAlignment; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(target) + i, _mm_load_si128(static_cast<const __m128i*>(source) + i));
  }
}
// Streamed bytes become visible before whoever sends or reads them is told.
ACCEL_INLINE void finish_streams() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
ACCEL_INLINE void stream(const void*, int64_t, void*) {}
ACCEL_INLINE void finish_streams() {}
#endif

}  // namespace
}  // namespace accel::cpu::ACCEL_ISA
