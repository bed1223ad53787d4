// minmax_uint8: Bagua's grid over [min, max] of a block, clamped on both sides.
//
//   s = 255 / range,  upper = rint(max * s),  lower = upper - 255
//   code = clamp(rint(x * s), lower, upper) - lower,  x' = (code + lower) * (range / 255)
//
// range = max(max - min, absmax * 2^-14): the step is never finer than about four float32 spacings at absmax. A constant
// block keeps its value, tiny ranges use all levels, and |x * s| <= 2^22, where rounding is exact. A zero stays exactly zero.
// A block with absmax < 2^-100 is a block of zeros; a block with NaN or Inf is poisoned as in int8.
#pragma once

#include "lightning_accel/numeric.h"

namespace accel {

struct MinMaxUInt8 {
  using Value = float;
  using Code = uint8_t;

  static constexpr int kScaleNumel = kBlockNumel;
  static constexpr int kCodeBits = 8;

  struct Header {
    float scale;  // range / 255
    float lower;  // an integer
  };
  static constexpr int kHeaderBytes = sizeof(Header);

  // Floats as integers of the same order (-NaN < -Inf < finite < Inf < NaN), so that minimum and maximum vectorise.
  ACCEL_MEMBER static int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

  struct Statistic {
    int32_t low = 0x7FFFFFFF;
    int32_t high = -0x7FFFFFFF - 1;
    ACCEL_MEMBER void include(float x) {
      const int32_t key = ordered(bit_cast<int32_t>(x));
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    ACCEL_MEMBER void merge(const Statistic& other) {
      low = other.low < low ? other.low : low;
      high = other.high > high ? other.high : high;
    }
  };

  struct Grid {
    Header header;
    bool is_blank;
    float levels_per_unit;  // s
    float upper;

    ACCEL_MEMBER explicit Grid(const Statistic& statistic) {
      const int32_t infinity = static_cast<int32_t>(kInfinityBits);
      const bool is_poisoned = statistic.high >= infinity || statistic.low <= ordered(-0x7FFFFFFF - 1 + infinity);
      const float low = bit_cast<float>(ordered(statistic.low));
      const float high = bit_cast<float>(ordered(statistic.high));
      const float absmax = -low > high ? -low : high;
      is_blank = is_poisoned || absmax < kSmallestScaled;
      if (is_blank) {
        header = {is_poisoned ? canonical_nan() : 0.0f, 0.0f};
        levels_per_unit = upper = 0.0f;
        return;
      }
      // Halves, because max - min may overflow; a power of two changes no bit otherwise.
      const float spread = high * 0.5f - low * 0.5f;
      const float finest = absmax * 0x1p-15f;
      const float half_range = spread > finest ? spread : finest;
      levels_per_unit = 127.5f / half_range;
      upper = round_half_even(high * levels_per_unit);
      header = {half_range / 127.5f, upper - 255.0f};
    }
    ACCEL_MEMBER Code encode(float x) const {
      const float level = round_half_even(x * levels_per_unit);
      const float above = level < header.lower ? header.lower : level;
      const float clamped = above > upper ? upper : above;
      return static_cast<Code>(static_cast<int32_t>(clamped - header.lower));
    }
  };

  ACCEL_MEMBER static float decode(const Header& header, Code code) { return decode(header, static_cast<float>(code)); }
  ACCEL_MEMBER static float decode(const Header& header, float code) { return (code + header.lower) * header.scale; }
};

}  // namespace accel
