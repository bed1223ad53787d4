// int8: symmetric, one scale a block.
//
//   scale = absmax / 127,  code = round_half_even(x * (127 / absmax)),  x' = code * scale
//
// No clamp is needed: |x| * (127 / absmax) <= 127 (1 + 2^-24)^2 < 127.5. |x' - x| <= scale/2 (1 + 2^-16).
// A block with absmax < 2^-100 is a block of zeros (127 / absmax would overflow soon below).
// A block with NaN or Inf has the canonical NaN as scale and codes 0, and decodes to the canonical NaN throughout.
#pragma once

#include "lightning_accel/numeric.h"

namespace accel {

constexpr int kBlockNumel = 512;  // elements that share a scale; also the unit of ownership (src/lightning_accel/layout.py)
constexpr float kSmallestAbsmax = 0x1p-100f;

struct Int8 {
  using Value = float;  // what the arithmetic is done in
  using Code = int8_t;

  // On the wire, once a block.
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

  // How a block is encoded; `is_blank`: all its codes are 0.
  struct Grid {
    Header header;
    bool is_blank;
    float inverse;

    ACCEL_MEMBER explicit Grid(const Statistic& statistic) {
      const float absmax = bit_cast<float>(statistic.absmax_bits);
      const bool is_poisoned = statistic.absmax_bits >= static_cast<int32_t>(kInfinityBits);
      is_blank = is_poisoned || absmax < kSmallestAbsmax;
      header.scale = is_poisoned ? canonical_nan() : (is_blank ? 0.0f : absmax / 127.0f);
      inverse = is_blank ? 0.0f : 127.0f / absmax;
    }
    ACCEL_MEMBER Code encode(float x) const { return static_cast<Code>(round_half_even_to_int(x * inverse)); }
  };

  ACCEL_MEMBER static bool is_poisoned(const Header& header) { return header.scale != header.scale; }
  ACCEL_MEMBER static float decode(const Header& header, Code code) { return static_cast<float>(code) * header.scale; }
};

}  // namespace accel
