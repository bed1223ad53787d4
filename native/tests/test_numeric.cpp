// 16-bit floats through the kernels of every instruction set: all 65536 patterns to float32, and float32 to them for every value
// on which rounding turns, and random ones, against arithmetic in double.
#include <random>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "memory.h"
#include "reference.h"

using accel::CodecId;
using accel::DType;
using accel::Plan;
using reference::Format;

namespace {

constexpr int64_t kPatterns = 65536;

struct Wire16 {
  const char* name;
  CodecId codec;
  DType dtype;
  Format format;
};
const Wire16 kWires[] = {{"fp16", CodecId::kFp16, DType::kFloat16, reference::kHalf},
                         {"bf16", CodecId::kBf16, DType::kBFloat16, reference::kBFloat16}};

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Every pattern as it decodes to float32, as it passes through a tensor of its own type, and as it adds to nothing.
void test_widening(const Wire16& wire, const std::string& isa) {
  Memory patterns(2 * kPatterns), floats(4 * kPatterns, 4), same(2 * kPatterns, 2), sums(4 * kPatterns, 4, 0),
      again(2 * kPatterns);
  for (int64_t i = 0; i < kPatterns; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    std::memcpy(patterns.data() + 2 * i, &bits, 2);
  }
  const Plan to_float(wire.codec, DType::kFloat32, {0}, {kPatterns}, {-1});
  const Plan to_same(wire.codec, wire.dtype, {0}, {kPatterns}, {-1});
  accel::cpu::decode(to_float, patterns.data(), floats.data());
  accel::cpu::decode(to_same, patterns.data(), same.data());
  accel::cpu::decode_accumulate(to_float, patterns.data(), sums.data());
  accel::cpu::encode(to_same, patterns.data(), again.data());
  for (int64_t i = 0; i < kPatterns; ++i) {
    const double value = reference::from_bits(wire.format, static_cast<uint64_t>(i));
    float decoded, sum;
    uint16_t passed, encoded;
    std::memcpy(&decoded, floats.data() + 4 * i, 4);
    std::memcpy(&sum, sums.data() + 4 * i, 4);
    std::memcpy(&passed, same.data() + 2 * i, 2);
    std::memcpy(&encoded, again.data() + 2 * i, 2);
    const uint64_t canonical = std::isnan(value) ? (wire.codec == CodecId::kFp16 ? 0x7E00u : 0x7FC0u) : static_cast<uint64_t>(i);
    CHECK(bits_of(decoded) == reference::to_bits(reference::kFloat, value),
          isa << " " << wire.name << " pattern " << i << " decodes to " << bits_of(decoded));
    CHECK(std::isnan(value) ? std::isnan(sum) : sum == value, isa << " " << wire.name << " pattern " << i << " adds " << sum);
    CHECK(passed == canonical, isa << " " << wire.name << " pattern " << i << " decodes to " << passed << " in its own type");
    CHECK(encoded == canonical, isa << " " << wire.name << " pattern " << i << " encodes as " << encoded);
  }
}

// Each value of the 16-bit type, the middle between it and the next, and the floats right beside both, with either sign;
// then random patterns.
std::vector<float> turning_points(const Wire16& wire) {
  std::vector<float> values;
  for (uint64_t i = 0; i < 0x8000u; ++i) {
    const double here = reference::from_bits(wire.format, i);
    const double next = reference::from_bits(wire.format, i + 1);
    if (!std::isfinite(here)) {
      continue;
    }
    // Beyond the last one lies what would have been the next: half way there, rounding turns to Inf.
    const double before = i == 0 ? 0 : reference::from_bits(wire.format, i - 1);
    const double middle = std::isfinite(next) ? here + (next - here) / 2 : here + (here - before) / 2;
    for (const double point : {here, middle}) {
      const float x = static_cast<float>(point);
      for (const float beside : {x, std::nextafterf(x, -1.0f), std::nextafterf(x, INFINITY)}) {
        values.push_back(beside);
        values.push_back(-beside);
      }
    }
  }
  for (const uint32_t bits :
       {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0x7F800001u, 0xFFFFFFFFu, 0xFFC12345u, 0x7F7FFFFFu, 0x00000001u}) {
    values.push_back(float_of(bits));
  }
  std::mt19937_64 random(7);
  for (int i = 0; i < 300000; ++i) {
    values.push_back(float_of(static_cast<uint32_t>(random())));
  }
  return values;
}

void test_narrowing(const Wire16& wire, const std::vector<float>& values, const std::string& isa) {
  const int64_t numel = static_cast<int64_t>(values.size());
  const Plan plan(wire.codec, DType::kFloat32, {0}, {numel}, {-1});
  const Plan exact(CodecId::kNone, DType::kFloat32, {0}, {numel}, {-1});
  Memory codes(plan.wire_bytes()), sum_codes(plan.wire_bytes()), floats(exact.wire_bytes());
  accel::cpu::encode(plan, values.data(), codes.data());
  accel::cpu::encode(exact, values.data(), floats.data());
  accel::cpu::decode_sum_encode(plan, {codes.data(), 1, plan.wire_bytes()}, 1.0f, sum_codes.data());
  for (int64_t i = 0; i < numel; ++i) {
    uint16_t code, sum_code;
    uint32_t same;
    std::memcpy(&code, codes.data() + 2 * i, 2);
    std::memcpy(&sum_code, sum_codes.data() + 2 * i, 2);
    std::memcpy(&same, floats.data() + 4 * i, 4);
    const uint64_t expected = reference::to_bits(wire.format, values[i]);
    CHECK(code == expected, isa << " " << wire.name << " of " << values[i] << " is " << code << ", not " << expected);
    CHECK(sum_code == code, isa << " " << wire.name << " of " << values[i] << " changes in a sum of one to " << sum_code);
    CHECK(same == (std::isnan(values[i]) ? 0x7FC00000u : bits_of(values[i])), isa << " none of " << values[i] << " is " << same);
  }
}

}  // namespace

int main() {
  for (const Wire16& wire : kWires) {
    const std::vector<float> values = turning_points(wire);
    for (const std::string& isa : accel::cpu::instruction_sets()) {
      accel::cpu::use_instruction_set(isa);
      test_widening(wire, isa);
      test_narrowing(wire, values, isa);
    }
  }
  return check::report("test_numeric");
}
