// Bits, 16-bit floats and rounding, the same on host and device.
//
// Everything here is integer arithmetic or one IEEE operation, so that every compiler, instruction set and device gives the same
// bits (build with -ffp-contract=off and -fmad=false, never with -ffast-math).
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "lightning_accel/platform.h"

namespace accel {

template <class To, class From>
ACCEL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage of the 16-bit floats: their bits, with the arithmetic done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kBlockNumel = 512;  // elements: the unit of ownership (compression/block_layout.py); whole scale groups
constexpr float kSmallestScaled = 0x1p-100f;  // smaller values are coded as zeros: a reciprocal would overflow soon below

constexpr uint32_t kCanonicalNaNBits = 0x7FC00000u;  // the one NaN that is ever sent or decoded
constexpr uint32_t kInfinityBits = 0x7F800000u;

ACCEL_INLINE float canonical_nan() { return bit_cast<float>(kCanonicalNaNBits); }

// Rounds half to even. Adding 1.5 * 2^23 leaves one unit in the last place, so the sum itself is rounded to an integer by the
// default rounding mode; exact for |x| <= 2^22, and unlike rintf it needs no SSE4.1 to be vectorised.
constexpr float kRoundingMagic = 12582912.0f;
ACCEL_INLINE float round_half_even(float x) { return (x + kRoundingMagic) - kRoundingMagic; }

// The same, as an integer: the low bits of the sum are its two's complement.
ACCEL_INLINE int32_t round_half_even_to_int(float x) { return bit_cast<int32_t>(x + kRoundingMagic) - 0x4B400000; }

ACCEL_INLINE bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7FFFFFFFu) < kInfinityBits; }
ACCEL_INLINE bool is_finite(double x) { return (bit_cast<uint64_t>(x) & 0x7FFFFFFFFFFFFFFFu) < uint64_t{0x7FF0000000000000u}; }

// One rounding, as IEEE 754 asks for, on host and device.
ACCEL_INLINE float square_root(float x) { return sqrtf(x); }
ACCEL_INLINE double square_root(double x) { return sqrt(x); }

// to<T>(x): x in another type. To float it is exact (but for double); from float it rounds half to even, and every NaN becomes
// the canonical one.
template <class T>
struct Convert;

template <>
struct Convert<float> {
  ACCEL_MEMBER static float to_float(float x) { return x; }
  ACCEL_MEMBER static float from_float(float x) { return x == x ? x : canonical_nan(); }
};

template <>
struct Convert<double> {
  ACCEL_MEMBER static float to_float(double x) { return static_cast<float>(x); }
  ACCEL_MEMBER static double from_float(float x) {
    return x == x ? static_cast<double>(x) : bit_cast<double>(uint64_t{0x7FF8000000000000u});
  }
};

template <>
struct Convert<BFloat16> {
  ACCEL_MEMBER static float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
  ACCEL_MEMBER static BFloat16 from_float(float x) {
    const uint32_t bits = bit_cast<uint32_t>(Convert<float>::from_float(x));  // the canonical NaN stays one
    return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
  }
};

template <>
struct Convert<Half> {
  // Shifting exponent and fraction into place gives x * 2^-112 (a subnormal half becomes a subnormal float, exactly).
  ACCEL_MEMBER static float to_float(Half x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
    const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | kInfinityBits;  // exponent 31: Inf keeps fraction 0, NaN its fraction
    const uint32_t absolute = magnitude >= (0x7C00u << 13) ? special : scaled;
    return bit_cast<float>(absolute | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
  }
  ACCEL_MEMBER static Half from_float(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t absolute = bits & 0x7FFFFFFFu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    // Below 2^-14 the half is subnormal: adding 0.5 puts its last place at the float's last place, and rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(absolute) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t normal = (absolute + 0xFFFu + ((absolute >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t finite = absolute < (113u << 23) ? subnormal : normal;
    const uint32_t limited = absolute >= 0x477FF000u ? 0x7C00u : finite;  // 65520 and more round to Inf
    return Half{static_cast<uint16_t>(absolute > kInfinityBits ? 0x7E00u : (limited | sign))};
  }
};

}  // namespace accel
