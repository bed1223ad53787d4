// Codes of less than a byte: int4 in nibbles, the first element in the low one; sign in bits, the first element in the lowest.
#pragma once

#include "spans.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

// packed <- the low nibbles of codes; numel <= kChunk.
ACCEL_INLINE void pack_nibbles(const int8_t* __restrict__ codes, int numel, uint8_t* __restrict__ packed) {
  for (int i = 0; i < numel / 2; ++i) {
    uint16_t pair;
    memcpy(&pair, codes + 2 * i, sizeof pair);
    packed[i] = static_cast<uint8_t>((pair & 0x0Fu) | (pair >> 4 & 0xF0u));
  }
  if (numel % 2 != 0) {
    packed[numel / 2] = static_cast<uint8_t>(codes[numel - 1] & 0x0F);
  }
}

// codes <- nibbles, as signed numbers; `codes` has room for one more than an odd numel.
ACCEL_INLINE void unpack_nibbles(const uint8_t* __restrict__ packed, int numel, int8_t* __restrict__ codes) {
  for (int i = 0; i < (numel + 1) / 2; ++i) {
    const uint16_t pair = static_cast<uint16_t>((packed[i] & 0x0Fu) | (packed[i] & 0xF0u) << 4);
    memcpy(codes + 2 * i, &pair, sizeof pair);
  }
  for (int i = 0; i < numel; ++i) {
    codes[i] = static_cast<int8_t>((codes[i] ^ 8) - 8);
  }
}

// Sign bits of 32 values, the first one's lowest.
ACCEL_INLINE uint32_t sign_bits(const float* values) {
  uint32_t bits = 0;
#if defined(__AVX2__)
  for (int i = 0; i < Sign::kGroupNumel; i += 8) {
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_loadu_ps(values + i))) << i;
  }
#elif defined(__SSE2__)
  for (int i = 0; i < Sign::kGroupNumel; i += 4) {
    bits |= static_cast<uint32_t>(_mm_movemask_ps(_mm_loadu_ps(values + i))) << i;
  }
#else
  for (int i = 0; i < Sign::kGroupNumel; ++i) {
    bits |= bit_cast<uint32_t>(values[i]) >> 31 << i;
  }
#endif
  return bits;
}

// Adds the magnitudes of a group's values, scaled, to the 32 partial sums; returns whether any is not zero.
ACCEL_INLINE bool add_magnitudes(const float* __restrict__ values, int numel, float* __restrict__ sums) {
  uint32_t any = 0;
  for (int i = 0; i < numel; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu;
    any |= magnitude;
    sums[i] += bit_cast<float>(magnitude) * Sign::kTermScale;
  }
  return any != 0;
}

// Calls body(group, numel): numel is kGroupNumel, known to the compiler, for all groups but the last.
template <class Body>
ACCEL_INLINE void for_each_group(int numel, Body body) {
  const int whole = numel / Sign::kGroupNumel;
  for (int group = 0; group < whole; ++group) {
    body(group, Sign::kGroupNumel);
  }
  if (numel % Sign::kGroupNumel != 0) {
    body(whole, numel % Sign::kGroupNumel);
  }
}

inline void encode_signs(const float* values, int numel, Sign::Header* header, uint8_t* codes) {
  float sums[Sign::kGroupNumel] = {};
  uint32_t live_groups = 0;
  for_each_group(numel, [&](int group, int length) {
    live_groups |= static_cast<uint32_t>(add_magnitudes(values + group * Sign::kGroupNumel, length, sums)) << group;
  });
  for (int half = Sign::kGroupNumel / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  const Sign::Grid grid(sums[0], live_groups, numel);
  *header = grid.header;
  for_each_group(numel, [&](int group, int length) {
    const float* of_group = values + group * Sign::kGroupNumel;
    float padded[Sign::kGroupNumel] = {};
    if (length < Sign::kGroupNumel) {
      memcpy(padded, of_group, length * sizeof(float));
      of_group = padded;
    }
    const uint32_t bits = grid.is_blank ? 0u : sign_bits(of_group);
    memcpy(codes + group * (Sign::kGroupNumel / 8), &bits, (length + 7) / 8);  // little-endian, as all of the wire
  });
}

// values <- the block's elements from `start`, a group's first, on.
ACCEL_INLINE void decode_signs(const Sign::Header& header, const uint8_t* codes, int start, int numel,
                               float* __restrict__ values) {
  const uint32_t scale_bits = header.scale_bits();
  for_each_group(numel, [&](int group, int length) {
    const int of_block = start / Sign::kGroupNumel + group;
    uint32_t bits = 0;
    memcpy(&bits, codes + of_block * (Sign::kGroupNumel / 8), (length + 7) / 8);
    const uint32_t is_live = static_cast<uint32_t>(header.live_groups) >> of_block & 1u;
    for (int i = 0; i < length; ++i) {
      values[group * Sign::kGroupNumel + i] = Sign::decode(scale_bits, bits >> i & 1u, is_live);
    }
  });
}

}  // namespace
}  // namespace accel::cpu::ACCEL_ISA
