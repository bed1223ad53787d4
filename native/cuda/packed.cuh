// Codes of less than a byte: int4 in nibbles, the first element in the low one; sign in bits, the first element in the lowest.
#pragma once

#include "block.cuh"

namespace accel::cuda {
namespace {

// Up to width 4 each quarter of a lane's elements lies in one of the block's four scales, which all lanes share; with width 8 and
// 16 a lane has elements of two scales and of one, which 16 and 8 lanes share.
template <int kWidth>
struct Coded<Int4, kWidth> {
  static constexpr int kScales = kWidth <= 4 ? 4 : kLaneNumel / kWidth;  // a lane
  static constexpr int kScaleCodes = kLaneNumel / kScales;               // of one scale, in a lane
  static constexpr int kScaleLanes = Int4::kScaleNumel / kScaleCodes;    // that share a scale
  static constexpr int kTogether = 4;

  Int4::Header headers[kScales];
  uint8_t pairs[kLaneNumel / 2];  // elements 2 i and 2 i + 1 of the lane, neighbours from width 2 on

  __device__ __forceinline__ void load(const uint8_t* wire, const WireOffsets& at, int numel) {
#pragma unroll
    for (int scale = 0; scale < kScales; ++scale) {
      headers[scale] = has_scale(scale, numel) ? *header_at(wire, at, scale) : Int4::Header{};
    }
    const uint8_t* codes = wire + at.codes;
    if constexpr (kWidth != kGuarded) {
      cuda::load<kWidth / 2>(codes, numel, pairs);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        const int place = element<kGuarded>(i);
        put_code(i, place < numel ? codes[place / 2] >> place % 2 * 4 : 0);
      }
    }
  }

  // Each lane computes the grids of its scales; the first lane of each scale writes its header.
  __device__ __forceinline__ void encode(const float (&values)[kLaneNumel], int numel) {
#pragma unroll
    for (int scale = 0; scale < kScales; ++scale) {
      Int4::Statistic statistic;
#pragma unroll
      for (int i = scale * kScaleCodes; i < (scale + 1) * kScaleCodes; ++i) {
        if (has_element<kWidth>(i, numel)) {
          statistic.include(values[i]);
        }
      }
      const Int4::Grid grid(merge_over_lanes<kScaleLanes>(statistic));
      headers[scale] = grid.header;
#pragma unroll
      for (int i = scale * kScaleCodes; i < (scale + 1) * kScaleCodes; ++i) {
        put_code(i, grid.is_blank ? 0 : grid.encode(values[i]));
      }
    }
  }

  __device__ __forceinline__ void store(uint8_t* wire, const WireOffsets& at, int numel) const {
    if (lane() % kScaleLanes == 0) {
#pragma unroll
      for (int scale = 0; scale < kScales; ++scale) {
        if (has_scale(scale, numel)) {
          *const_cast<Int4::Header*>(header_at(wire, at, scale)) = headers[scale];
        }
      }
    }
    uint8_t* codes = wire + at.codes;
    if constexpr (kWidth != kGuarded) {
      cuda::store<kWidth / 2>(codes, numel, pairs);
    } else {
      // Neighbours are in neighbouring lanes: the even lane writes both. Elements behind the block's end were coded as 0.
      uint64_t mine;
      memcpy(&mine, pairs, sizeof mine);
      const uint64_t others = shuffle_xor(mine, 1);
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        const int place = element<kGuarded>(i);
        if (place < numel && place % 2 == 0) {
          codes[place / 2] = static_cast<uint8_t>((mine >> 4 * i & 0xF) | (others >> 4 * i & 0xF) << 4);
        }
      }
    }
  }

  __device__ __forceinline__ float value(int i) const {
    uint32_t word;
    memcpy(&word, &pairs[i / 8 * 4], sizeof word);
    const uint32_t biased = (word ^ 0x88888888u) >> i % 2 * 4 & 0x0F0F0F0Fu;
    return Int4::decode(headers[i / kScaleCodes], byte_as_float(biased, i % 8 / 2, 8.0f));
  }

 private:
  // The first code of a pair must be put first.
  __device__ __forceinline__ void put_code(int i, int code) {
    const uint32_t nibble = static_cast<uint32_t>(code) & 0xFu;
    pairs[i / 2] = static_cast<uint8_t>(i % 2 == 0 ? nibble : pairs[i / 2] | nibble << 4);
  }
  // The first element of a scale tells which of the block's scales it is; a short block lacks the last ones.
  __device__ __forceinline__ static bool has_scale(int scale, int numel) {
    return kWidth != kGuarded || scale * Int4::kScaleNumel < numel;
  }
  __device__ __forceinline__ static const Int4::Header* header_at(const uint8_t* wire, const WireOffsets& at, int scale) {
    const int of_block = element<kWidth>(scale * kScaleCodes) / Int4::kScaleNumel;
    return reinterpret_cast<const Int4::Header*>(wire + at.header) + of_block;
  }
};

// 32 lanes hold 32 x 32 bits: lane i gets the i-th bit of every lane, lane l's as bit l. Each step swaps two quarters of squares.
__device__ __forceinline__ uint32_t transpose(uint32_t bits) {
  uint32_t low = 0x0000FFFFu;  // the lower half of each stretch of 2 * distance bits
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    const uint32_t others = shuffle_xor(bits, distance);
    const bool is_upper = (lane() & distance) != 0;
    bits = is_upper ? (bits & ~low) | (others >> distance & low) : (bits & low) | (others & low) << distance;
    low ^= low << distance / 2;
  }
  return bits;
}

// A run of a lane's elements lies in one group of 32, whose bits are a 32-bit word. To be encoded a block must have width 1: then
// element i of all lanes is group i, and a lane's sum of magnitudes is one of the 32 that the codec defines.
template <int kWidth>
struct Coded<Sign, kWidth> {
  static constexpr int kRun = kWidth == kGuarded ? 1 : kWidth;
  static constexpr int kTogether = 1;  // its time is arithmetic

  uint32_t scale_bits;
  uint32_t live_groups;
  uint32_t runs[kLaneNumel / kRun];  // the lane's bits from the lowest on; others above
  uint32_t word;                     // what lane i writes as the word of group i

  __device__ __forceinline__ void load(const uint8_t* wire, const WireOffsets& at, int numel) {
    const Sign::Header header = *reinterpret_cast<const Sign::Header*>(wire + at.header);
    scale_bits = header.scale_bits();
    live_groups = header.live_groups;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(wire + at.codes);
#pragma unroll
    for (int i = 0; i < kLaneNumel; i += kRun) {
      const int place = element<kWidth>(i);
      // The last word of a block may end in padding, whose bits are not used.
      const uint32_t of_group = has_element<kWidth>(i, numel) ? words[place / Sign::kGroupNumel] : 0u;
      runs[i / kRun] = of_group >> place % Sign::kGroupNumel;
    }
  }

  __device__ __forceinline__ void encode(const float (&values)[kLaneNumel], int numel) {
    static_assert(kRun == 1, "a group must lie across the lanes");
    float sum = 0.0f;
    uint32_t bits = 0;  // the lower half: is negative, the upper half: is not zero
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      const uint32_t x = has_element<kWidth>(i, numel) ? bit_cast<uint32_t>(values[i]) : 0u;
      const uint32_t magnitude = x & 0x7FFFFFFFu;
      sum += bit_cast<float>(magnitude) * Sign::kTermScale;
      runs[i] = x >> 31;
      bits |= runs[i] << i | (magnitude != 0 ? 0x10000u << i : 0u);
    }
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      sum += shuffle_xor(sum, distance);
    }
    bits = transpose(bits);  // lane i: the signs of group i; lane 16 + i: what is not zero there
    const Sign::Grid grid(sum, __ballot_sync(kAllLanes, bits != 0) >> kLaneNumel, numel);
    scale_bits = grid.header.scale_bits();
    live_groups = grid.header.live_groups;
    word = grid.is_blank ? 0u : bits;
#pragma unroll
    for (int i = 0; i < kLaneNumel; ++i) {
      runs[i] = grid.is_blank ? 0u : runs[i];
    }
  }

  __device__ __forceinline__ void store(uint8_t* wire, const WireOffsets& at, int numel) const {
    if (lane() == 0) {
      *reinterpret_cast<Sign::Header*>(wire + at.header) = {
          static_cast<uint16_t>(scale_bits), static_cast<uint16_t>(scale_bits >> 16), static_cast<uint16_t>(live_groups)};
    }
    uint8_t* codes = wire + at.codes + lane() * sizeof(word);
    if constexpr (kWidth != kGuarded) {
      if (lane() < kLaneNumel) {
        *reinterpret_cast<uint32_t*>(codes) = word;
      }
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(word)); ++i) {
        if (lane() * Sign::kGroupNumel + i * 8 < numel) {
          codes[i] = static_cast<uint8_t>(word >> 8 * i);
        }
      }
    }
  }

  __device__ __forceinline__ float value(int i) const {
    const uint32_t is_live = live_groups >> element<kWidth>(i) / Sign::kGroupNumel & 1u;
    return Sign::decode(scale_bits, runs[i / kRun] >> i % kRun & 1u, is_live);
  }
};

}  // namespace
}  // namespace accel::cuda
