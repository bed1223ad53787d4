// int8 and int4: symmetric, one scale for each group of kScaleNumel elements.
//
//   scale = absmax / L,  code = round_half_even(x * (L / absmax)),  x' = code * scale        L = 127 or 7
//
// No clamp is needed: |x| * (L / absmax) <= L (1 + 2^-24)^2 < L + 1/2. |x' - x| <= scale/2 (1 + 2^-16).
// A scale group with absmax < 2^-100 is coded as zeros (L / absmax would overflow soon below).
// A scale group with NaN or Inf has the canonical NaN as scale and codes 0, and decodes to the canonical NaN throughout.
#pragma once

#include "lightning_accel/numeric.h"

namespace accel {

template <int kLargestCode, int kNumel, int kBits>
struct Symmetric {
  using Value = float;  // what the arithmetic is done in
  using Code = int8_t;  // on the wire the low kCodeBits of it

  static constexpr int kScaleNumel = kNumel;
  static constexpr int kCodeBits = kBits;

  // On the wire once per scale group.
  struct Header {
    float scale;
  };
  static constexpr int kHeaderBytes = sizeof(Header);

  // Maximum of the absolute bit patterns: as integers they are ordered finite < Inf < NaN, and integer maxima vectorise.
  struct Statistic {
    int32_t absmax_bits = 0;
    ACCEL_MEMBER void include(float x) {
      const int32_t bits = bit_cast<int32_t>(x) & 0x7FFFFFFF;
      absmax_bits = bits > absmax_bits ? bits : absmax_bits;
    }
    ACCEL_MEMBER void merge(const Statistic& other) {
      absmax_bits = other.absmax_bits > absmax_bits ? other.absmax_bits : absmax_bits;
    }
  };

  // How a scale group is encoded; `is_blank`: all its codes are 0.
  struct Grid {
    Header header;
    bool is_blank;
    float inverse;

    ACCEL_MEMBER explicit Grid(const Statistic& statistic) {
      constexpr float kLargest = kLargestCode;
      const float absmax = bit_cast<float>(statistic.absmax_bits);
      const bool is_poisoned = statistic.absmax_bits >= static_cast<int32_t>(kInfinityBits);
      is_blank = is_poisoned || absmax < kSmallestScaled;
      header.scale = is_poisoned ? canonical_nan() : (is_blank ? 0.0f : absmax / kLargest);
      inverse = is_blank ? 0.0f : kLargest / absmax;
    }
    ACCEL_MEMBER Code encode(float x) const { return static_cast<Code>(round_half_even_to_int(x * inverse)); }
  };

  ACCEL_MEMBER static float decode(const Header& header, Code code) { return decode(header, static_cast<float>(code)); }
  ACCEL_MEMBER static float decode(const Header& header, float code) { return code * header.scale; }
};

using Int8 = Symmetric<127, kBlockNumel, 8>;
using Int4 = Symmetric<7, 128, 4>;

}  // namespace accel
