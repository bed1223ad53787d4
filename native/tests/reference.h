// The codecs once more, as slow as they are plain, from their definitions in native/README.md: values are doubles, bits come from
// arithmetic on them, and nothing of the library's headers is used but its codes for dtypes and codecs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lightning_accel/plan.h"

namespace reference {

using accel::CodecId;
using accel::DType;

constexpr int64_t kBlock = 512;
constexpr int kNumCodecs = 5;
constexpr int kNumDTypes = 4;

// A binary floating-point format: one sign bit, `exponent_bits`, `fraction_bits`. The machine knows 4 and 8 bytes itself.
struct Format {
  int exponent_bits;
  int fraction_bits;
  int bytes;
};
constexpr Format kHalf{5, 10, 2};
constexpr Format kBFloat16{8, 7, 2};
constexpr Format kFloat{8, 23, 4};
constexpr Format kDouble{11, 52, 8};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return kHalf;
    case DType::kBFloat16: return kBFloat16;
    case DType::kFloat64: return kDouble;
    default: return kFloat;
  }
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline double from_bits(Format format, uint64_t bits) {
  if (format.bytes == 8) {
    return same_bits<double>(bits);
  }
  if (format.bytes == 4) {
    return same_bits<float>(static_cast<uint32_t>(bits));
  }
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> format.fraction_bits) & ((1 << format.exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((uint64_t{1} << format.fraction_bits) - 1));
  const bool is_negative = (bits >> (format.exponent_bits + format.fraction_bits)) & 1;
  double magnitude;
  if (exponent == (1 << format.exponent_bits) - 1) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - format.fraction_bits);
  } else {
    magnitude = std::ldexp(1.0 + std::ldexp(fraction, -format.fraction_bits), exponent - bias);
  }
  return is_negative ? -magnitude : magnitude;
}

// Rounded half to even (nearbyint, on a value scaled to where the last place is one); NaN becomes the quiet one without sign.
inline uint64_t to_bits(Format format, double x) {
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const uint64_t infinity = ((uint64_t{1} << format.exponent_bits) - 1) << format.fraction_bits;
  if (std::isnan(x)) {
    return infinity | (uint64_t{1} << (format.fraction_bits - 1));
  }
  if (format.bytes == 8) {
    return same_bits<uint64_t>(x);
  }
  if (format.bytes == 4) {
    return same_bits<uint32_t>(static_cast<float>(x));
  }
  const uint64_t sign = std::signbit(x) ? uint64_t{1} << (format.exponent_bits + format.fraction_bits) : 0;
  if (std::isinf(x)) {
    return sign | infinity;
  }
  if (x == 0) {
    return sign;
  }
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double places = std::nearbyint(std::ldexp(std::fabs(x), format.fraction_bits - exponent));
  // Exponent field and hidden bit overlap by one: a carry out of the fraction lands where it belongs.
  const uint64_t bits = (static_cast<uint64_t>(exponent + bias - 1) << format.fraction_bits) + static_cast<uint64_t>(places);
  return sign | std::min(bits, infinity);
}

// All values of a 16-bit format.
inline std::vector<double> values_of(Format format) {
  std::vector<double> values(65536);
  for (uint64_t bits = 0; bits < values.size(); ++bits) {
    values[bits] = from_bits(format, bits);
  }
  return values;
}

inline double rounded(Format format, double x) { return from_bits(format, to_bits(format, x)); }

inline double load(Format format, const uint8_t* memory) {
  static const std::vector<double> halves = values_of(kHalf), bfloat16s = values_of(kBFloat16);
  uint64_t bits = 0;
  std::memcpy(&bits, memory, format.bytes);  // little-endian, like the wire
  return format.bytes > 2 ? from_bits(format, bits) : (format.exponent_bits == 5 ? halves : bfloat16s)[bits];
}

inline void store(Format format, uint8_t* memory, double x) {
  const uint64_t bits = to_bits(format, x);
  std::memcpy(memory, &bits, format.bytes);
}

// A codec for one dtype. `wire` is a cast's format on the wire, `value` the one sums are made in.
struct Codec {
  CodecId id;
  DType dtype;
  bool is_cast() const { return id == CodecId::kNone || id == CodecId::kFp16 || id == CodecId::kBf16; }
  Format wire() const { return id == CodecId::kFp16 ? kHalf : id == CodecId::kBf16 ? kBFloat16 : format_of(dtype); }
  Format value() const { return id == CodecId::kNone && dtype == DType::kFloat64 ? kDouble : kFloat; }
  int64_t header_bytes() const { return id == CodecId::kInt8 ? 4 : id == CodecId::kMinMaxUInt8 ? 8 : 0; }
  int64_t code_bytes() const { return is_cast() ? wire().bytes : 1; }
};

inline int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }
inline int64_t blocks(int64_t numel) { return (numel + kBlock - 1) / kBlock; }
inline int64_t segment_bytes(const Codec& codec, int64_t numel) {
  return padded(blocks(numel) * codec.header_bytes()) + padded(numel * codec.code_bytes());
}

inline void encode_block(const Codec& codec, const std::vector<double>& values, uint8_t* header, uint8_t* codes) {
  if (codec.is_cast()) {
    for (size_t i = 0; i < values.size(); ++i) {
      store(codec.wire(), codes + i * codec.wire().bytes, values[i]);
    }
    return;
  }
  float low = static_cast<float>(values[0]), high = low, absmax = 0;
  bool is_poisoned = false;
  for (const double value : values) {
    const float x = static_cast<float>(value);
    is_poisoned = is_poisoned || !std::isfinite(x);
    low = std::fmin(low, x);
    high = std::fmax(high, x);
    absmax = std::fmax(absmax, std::fabs(x));
  }
  std::memset(header, 0, codec.header_bytes());
  std::memset(codes, 0, values.size());
  if (is_poisoned) {
    store(kFloat, header, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  if (absmax < std::ldexp(1.0, -100)) {
    return;
  }
  if (codec.id == CodecId::kInt8) {
    store(kFloat, header, absmax / 127.0f);
    const float inverse = 127.0f / absmax;
    for (size_t i = 0; i < values.size(); ++i) {
      const float level = std::nearbyint(static_cast<float>(values[i]) * inverse);
      codes[i] = static_cast<uint8_t>(static_cast<int>(std::fmin(std::fmax(level, -127.0f), 127.0f)));
    }
    return;
  }
  const float half_range = std::fmax(high / 2 - low / 2, absmax * std::ldexp(1.0f, -15));  // max - min may overflow
  const float levels_per_unit = 127.5f / half_range;
  const float upper = std::nearbyint(high * levels_per_unit);
  const float lower = upper - 255.0f;
  store(kFloat, header, half_range / 127.5f);
  store(kFloat, header + 4, lower);
  for (size_t i = 0; i < values.size(); ++i) {
    const float level = std::nearbyint(static_cast<float>(values[i]) * levels_per_unit);
    codes[i] = static_cast<uint8_t>(std::fmin(std::fmax(level, lower), upper) - lower);
  }
}

inline std::vector<double> decode_block(const Codec& codec, const uint8_t* header, const uint8_t* codes, int64_t numel) {
  std::vector<double> values(numel);
  for (int64_t i = 0; i < numel; ++i) {
    if (codec.is_cast()) {
      values[i] = load(codec.wire(), codes + i * codec.wire().bytes);
      continue;
    }
    const float scale = static_cast<float>(load(kFloat, header));
    const float lower = codec.id == CodecId::kInt8 ? 0.0f : static_cast<float>(load(kFloat, header + 4));
    const float code =
        codec.id == CodecId::kInt8 ? static_cast<float>(static_cast<int8_t>(codes[i])) : static_cast<float>(codes[i]);
    values[i] = std::isnan(scale) ? std::numeric_limits<double>::quiet_NaN() : (code + lower) * scale;
  }
  return values;
}

// Calls body(tensor_offset, numel, header, codes) for each block of a message whose segments start at `wire_offsets`.
template <class Body>
void for_each_block(const Codec& codec, const std::vector<int64_t>& tensor_offsets, const std::vector<int64_t>& numels,
                    const std::vector<int64_t>& wire_offsets, Body body) {
  for (size_t segment = 0; segment < numels.size(); ++segment) {
    const int64_t codes = wire_offsets[segment] + padded(blocks(numels[segment]) * codec.header_bytes());
    for (int64_t start = 0; start < numels[segment]; start += kBlock) {
      body(tensor_offsets[segment] + start, std::min(kBlock, numels[segment] - start),
           wire_offsets[segment] + start / kBlock * codec.header_bytes(), codes + start * codec.code_bytes());
    }
  }
}

}  // namespace reference
