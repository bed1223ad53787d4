// sign: one bit an element, one scale a block, and one bit a group of 32 elements that says whether any of them is not zero.
//
//   scale = mean |x| over the groups that are not all zeros,  x' = sign(x) * scale in those groups, 0 in the others
//
// The mean's sum is one fixed tree, so that every machine gives the same bits: 32 partial sums, the l-th of elements l, l + 32,
// l + 64 ... in this order, which are then folded: l and l + 16, l and l + 8, ... Terms are |x| * 2^-10, so that no sum
// overflows. The sign is the sign bit. A block whose scale is < 2^-100 is a block of zeros. A block with NaN or Inf has the
// canonical NaN as scale, all groups marked and bits 0; it decodes to the canonical NaN throughout.
#pragma once

#include "lightning_accel/numeric.h"

namespace accel {

struct Sign {
  using Value = float;
  using Code = uint8_t;  // eight elements, the first one in the lowest bit

  static constexpr int kScaleNumel = kBlockNumel;
  static constexpr int kCodeBits = 1;
  static constexpr int kGroupNumel = 32;

  // 16-bit parts, because headers lie 6 bytes apart.
  struct Header {
    uint16_t scale_low;
    uint16_t scale_high;
    uint16_t live_groups;  // bit g: group g is not all zeros
    ACCEL_MEMBER uint32_t scale_bits() const { return scale_low | static_cast<uint32_t>(scale_high) << 16; }
  };
  static constexpr int kHeaderBytes = sizeof(Header);
  static_assert(kHeaderBytes == 6 && kBlockNumel / kGroupNumel == 16, "a bit for each group");

  static constexpr float kTermScale = 0x1p-10f;

  // Made of the sum of terms, the groups that are not all zeros, and the block's size. `is_blank`: all its bits are 0.
  struct Grid {
    Header header;
    bool is_blank;

    ACCEL_MEMBER Grid(float sum, uint32_t live_groups, int numel) {
      const bool is_poisoned = bit_cast<uint32_t>(sum) >= kInfinityBits;  // the sum of magnitudes has no sign
      const float scale = sum / static_cast<float>(live_numel(live_groups, numel)) * (1.0f / kTermScale);
      is_blank = is_poisoned || live_groups == 0 || scale < kSmallestScaled;
      const uint32_t bits = is_poisoned ? kCanonicalNaNBits : (is_blank ? 0u : bit_cast<uint32_t>(scale));
      header.scale_low = static_cast<uint16_t>(bits);
      header.scale_high = static_cast<uint16_t>(bits >> 16);
      header.live_groups = static_cast<uint16_t>(is_poisoned ? 0xFFFFu : (is_blank ? 0u : live_groups));
    }
  };

  // Elements in the groups that are not all zeros; at least 1, to divide by.
  ACCEL_MEMBER static int live_numel(uint32_t live_groups, int numel) {
    int count = 0;
    for (int group = 0; group * kGroupNumel < numel; ++group) {
      const int left = numel - group * kGroupNumel;
      count += (live_groups >> group & 1u) != 0 ? (left < kGroupNumel ? left : kGroupNumel) : 0;
    }
    return count > 0 ? count : 1;
  }

  // An element of a group; `is_negative` and `is_live` are 0 or 1.
  ACCEL_MEMBER static float decode(uint32_t scale_bits, uint32_t is_negative, uint32_t is_live) {
    return bit_cast<float>((scale_bits ^ is_negative << 31) & (0u - is_live));
  }
};

}  // namespace accel
