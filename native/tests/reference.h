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
constexpr int kNumCodecs = 7;
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
  bool is_symmetric() const { return id == CodecId::kInt8 || id == CodecId::kInt4; }
  int64_t scale_numel() const { return id == CodecId::kInt4 ? 128 : kBlock; }
  int64_t header_bytes() const { return is_symmetric() ? 4 : id == CodecId::kMinMaxUInt8 ? 8 : id == CodecId::kSign ? 6 : 0; }
  int64_t code_bits() const { return is_cast() ? 8 * wire().bytes : id == CodecId::kInt4 ? 4 : id == CodecId::kSign ? 1 : 8; }
};

inline int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }
inline int64_t scales(const Codec& codec, int64_t numel) { return (numel + codec.scale_numel() - 1) / codec.scale_numel(); }
inline int64_t code_bytes(const Codec& codec, int64_t numel) { return (numel * codec.code_bits() + 7) / 8; }
inline int64_t segment_bytes(const Codec& codec, int64_t numel) {
  return padded(scales(codec, numel) * codec.header_bytes()) + padded(code_bytes(codec, numel));
}

// Writes the low `bits` of `code` as those of element i, counted from the lowest bit of the first byte on.
inline void put_code(uint8_t* codes, int64_t i, int64_t bits, int code) {
  for (int64_t bit = 0; bit < bits; ++bit) {
    const int64_t place = i * bits + bit;
    codes[place / 8] = static_cast<uint8_t>((codes[place / 8] & ~(1 << place % 8)) | ((code >> bit & 1) << place % 8));
  }
}
inline int get_code(const uint8_t* codes, int64_t i, int64_t bits) {
  int code = 0;
  for (int64_t bit = 0; bit < bits; ++bit) {
    const int64_t place = i * bits + bit;
    code |= (codes[place / 8] >> place % 8 & 1) << bit;
  }
  return code;
}

inline void encode_signs(const std::vector<double>& values, uint8_t* header, uint8_t* codes) {
  float sums[32] = {};
  int live = 0;
  int live_numel = 0;
  for (size_t group = 0; group * 32 < values.size(); ++group) {
    const size_t end = std::min(values.size(), group * 32 + 32);
    bool is_live = false;
    for (size_t i = group * 32; i < end; ++i) {
      const float x = static_cast<float>(values[i]);
      is_live = is_live || !(x == 0);
      sums[i % 32] += std::fabs(x) * std::ldexp(1.0f, -10);
    }
    live |= is_live << group;
    live_numel += is_live ? static_cast<int>(end - group * 32) : 0;
  }
  for (int half = 16; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  const bool is_poisoned = !std::isfinite(sums[0]);
  const float scale = live == 0 ? 0.0f : sums[0] / static_cast<float>(live_numel) * 1024.0f;
  const bool is_zero = !is_poisoned && scale < std::ldexp(1.0f, -100);
  store(kFloat, header, is_poisoned ? std::numeric_limits<double>::quiet_NaN() : is_zero ? 0.0 : scale);
  const int marks = is_poisoned ? 0xFFFF : is_zero ? 0 : live;
  header[4] = static_cast<uint8_t>(marks);
  header[5] = static_cast<uint8_t>(marks >> 8);
  for (size_t i = 0; i < values.size(); ++i) {
    put_code(codes, static_cast<int64_t>(i), 1, !is_poisoned && !is_zero && std::signbit(values[i]));
  }
}

inline void encode_block(const Codec& codec, const std::vector<double>& values, uint8_t* header, uint8_t* codes) {
  if (codec.is_cast()) {
    for (size_t i = 0; i < values.size(); ++i) {
      store(codec.wire(), codes + i * codec.wire().bytes, values[i]);
    }
    return;
  }
  std::memset(codes, 0, code_bytes(codec, static_cast<int64_t>(values.size())));
  if (codec.id == CodecId::kSign) {
    encode_signs(values, header, codes);
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
  if (is_poisoned) {
    store(kFloat, header, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  if (absmax < std::ldexp(1.0, -100)) {
    return;
  }
  if (codec.is_symmetric()) {
    const float largest = codec.id == CodecId::kInt8 ? 127.0f : 7.0f;
    store(kFloat, header, absmax / largest);
    const float inverse = largest / absmax;
    for (size_t i = 0; i < values.size(); ++i) {
      const float level = std::nearbyint(static_cast<float>(values[i]) * inverse);
      put_code(codes, static_cast<int64_t>(i), codec.code_bits(),
               static_cast<int>(std::fmin(std::fmax(level, -largest), largest)));
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
    const int code = get_code(codes, i, codec.code_bits());
    if (std::isnan(scale)) {
      values[i] = std::numeric_limits<double>::quiet_NaN();
    } else if (codec.id == CodecId::kSign) {
      values[i] = (header[4 + i / 256] >> i / 32 % 8 & 1) == 0 ? 0.0 : code == 1 ? -scale : scale;
    } else if (codec.is_symmetric()) {
      const int half = 1 << (codec.code_bits() - 1);
      values[i] = static_cast<float>(code >= half ? code - 2 * half : code) * scale;
    } else {
      values[i] = (static_cast<float>(code) + static_cast<float>(load(kFloat, header + 4))) * scale;
    }
  }
  return values;
}

// Calls body(tensor_offset, numel, header, codes) for what each scale covers in a message whose segments start at `wire_offsets`.
template <class Body>
void for_each_block(const Codec& codec, const std::vector<int64_t>& tensor_offsets, const std::vector<int64_t>& numels,
                    const std::vector<int64_t>& wire_offsets, Body body) {
  for (size_t segment = 0; segment < numels.size(); ++segment) {
    const int64_t scale_numel = codec.scale_numel();
    const int64_t codes = wire_offsets[segment] + padded(scales(codec, numels[segment]) * codec.header_bytes());
    for (int64_t start = 0; start < numels[segment]; start += scale_numel) {
      body(tensor_offsets[segment] + start, std::min(scale_numel, numels[segment] - start),
           wire_offsets[segment] + start / scale_numel * codec.header_bytes(), codes + start * codec.code_bits() / 8);
    }
  }
}

}  // namespace reference
