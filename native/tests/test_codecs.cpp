// The four operations on every instruction set against reference.h, byte by byte: all codecs and dtypes, sizes around the
// block's, several segments at odd offsets, special values. Whatever no segment owns (padding, gaps, the tensor's other elements)
// is filled before and must be as it was.
#include <algorithm>
#include <functional>
#include <random>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "memory.h"
#include "reference.h"

using accel::CodecId;
using accel::DType;
using accel::Plan;
using reference::Codec;
using reference::Format;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
const char* const kCodecNames[] = {"none", "fp16", "bf16", "int8", "minmax_uint8", "int4", "sign"};
const char* const kDTypeNames[] = {"float32", "float16", "bfloat16", "float64"};

using Random = std::mt19937_64;

double uniform(Random& random) { return static_cast<double>(static_cast<int64_t>(random())) * 0x1p-63; }  // [-1, 1)
double normal(Random& random) {
  double sum = 0;
  for (int i = 0; i < 12; ++i) {
    sum += uniform(random);
  }
  return sum / 2;
}

// How a tensor is filled: element i.
struct Kind {
  const char* name;
  bool is_bounded;  // finite in float32, and not so large that a rounded scale makes it Inf (native/README.md)
  std::function<double(Random&, int64_t)> element;
};

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"normal", true, [](Random& random, int64_t) { return normal(random) * 0.01; }},
      {"large mean", true, [](Random& random, int64_t) { return 1000 + uniform(random); }},
      {"wide range", true,
       [](Random& random, int64_t) { return std::ldexp(uniform(random), static_cast<int>(random() % 200) - 140); }},
      {"zeros", true, [](Random&, int64_t) { return 0.0; }},
      {"negative zeros", true, [](Random&, int64_t) { return -0.0; }},
      {"zeros of both signs, a few numbers", true,
       [](Random& random, int64_t i) { return i % 300 == 7 ? normal(random) : (i % 2 ? 0.0 : -0.0); }},
      {"float32 subnormals", true, [](Random& random, int64_t) { return uniform(random) * 0x1p-127; }},
      {"float16 subnormals", true, [](Random& random, int64_t) { return uniform(random) * 0x1p-14; }},
      {"constant", true, [](Random&, int64_t) { return -0.3; }},
      {"two neighbours", true, [](Random& random, int64_t) { return random() % 2 ? 1.0 : 1.0 + 0x1p-23; }},
      {"tiny range", true, [](Random& random, int64_t) { return -3 - static_cast<double>(random() % 16) * 0x1p-21; }},
      {"all positive", true, [](Random& random, int64_t) { return 5.5 + 5 * uniform(random); }},
      {"all negative", true, [](Random& random, int64_t) { return -5.5 + 5 * uniform(random); }},
      {"int8 ties", true,
       [](Random& random, int64_t i) { return i % 100 == 0 ? 127.0 : static_cast<double>(random() % 253) - 126.5; }},
      {"minmax ties", true,
       [](Random& random, int64_t i) { return i % 2 ? (i % 4 ? 255.0 : 0.0) : static_cast<double>(random() % 255) + 0.5; }},
      {"at the smallest absmax", true,
       [](Random& random, int64_t i) { return i % 400 == 1 ? 0x1p-100 : uniform(random) * 0x1p-101; }},
      {"below the smallest absmax", true, [](Random&, int64_t i) { return i % 400 == 1 ? 0x1.FFFFFEp-101 : 0x1p-102; }},
      {"above the smallest absmax", true, [](Random& random, int64_t) { return (random() % 2 ? 1 : -1) * 0x1.000002p-100; }},
      {"largest floats", false, [](Random& random, int64_t) { return (random() % 2 ? 1 : -1) * 0x1.FFFFFEp127; }},
      {"largest float16", true, [](Random& random, int64_t) { return 65504 * (random() % 3 ? uniform(random) : 1.0); }},
      {"one NaN in some blocks", false, [](Random& random, int64_t i) { return i % 1300 == 5 ? kNaN : normal(random); }},
      {"Inf in some blocks", false, [](Random& random, int64_t i) { return i % 1300 == 5 ? kInfinity : normal(random); }},
      {"-Inf in some blocks", false, [](Random& random, int64_t i) { return i % 1300 == 5 ? -kInfinity : normal(random); }},
      {"beyond float32 in some blocks", false, [](Random& random, int64_t i) { return i % 1300 == 5 ? -1e300 : normal(random); }},
      {"float64 near float32 ties", true, [](Random& random, int64_t) { return 1 + 0x1p-24 + (random() % 3 - 1.0) * 0x1p-52; }},
  };
  return all;
}

// Where segments lie in the tensor and, between guard bytes, in the message.
struct Layout {
  std::vector<int64_t> tensor_offsets, numels, wire_offsets;
  int64_t tensor_numel = 0, wire_bytes = 0;

  void add(const Codec& codec, int64_t numel, int64_t tensor_gap, int64_t wire_gap) {
    tensor_offsets.push_back(tensor_numel + tensor_gap);
    numels.push_back(numel);
    wire_offsets.push_back(wire_bytes + wire_gap);
    tensor_numel = tensor_offsets.back() + numel;
    wire_bytes = wire_offsets.back() + reference::segment_bytes(codec, numel);
  }
};

Layout single(const Codec& codec, int64_t numel) {
  Layout layout;
  layout.add(codec, numel, 3, 0);
  return layout;
}

Layout several(const Codec& codec) {
  Layout layout;
  for (const int64_t numel : {7, 0, 513, 1, 1000, 511, 3001, 512}) {
    layout.add(codec, numel, 1 + numel % 4, numel % 3 * 16);
  }
  return layout;
}

// One to nine full blocks: the encoder takes them from several places in turn.
Layout whole_blocks(const Codec& codec) {
  Layout layout;
  for (int64_t blocks = 1; blocks < 10; ++blocks) {
    layout.add(codec, blocks * 512 + (blocks % 2) * 17, blocks % 3, 0);
  }
  return layout;
}

std::string context(const Codec& codec, const std::string& what, int64_t numel) {
  return accel::cpu::instruction_set() + " " + kCodecNames[static_cast<int>(codec.id)] + " " +
         kDTypeNames[static_cast<int>(codec.dtype)] + " " + what + ", " + std::to_string(numel) + " elements";
}

void fill(const Codec& codec, const Kind& kind, Random& random, Memory& tensor) {
  const Format format = reference::format_of(codec.dtype);
  for (int64_t i = 0; i * format.bytes < tensor.bytes(); ++i) {
    reference::store(format, tensor.data() + i * format.bytes, kind.element(random, i));
  }
}

using Blocks = std::vector<double>;

Blocks tensor_block(const Codec& codec, const Memory& tensor, int64_t offset, int64_t numel) {
  const Format format = reference::format_of(codec.dtype);
  Blocks values(numel);
  for (int64_t i = 0; i < numel; ++i) {
    values[i] = reference::rounded(codec.value(), reference::load(format, tensor.data() + (offset + i) * format.bytes));
  }
  return values;
}

template <class Body>
void for_each_block(const Codec& codec, const Layout& layout, Body body) {
  reference::for_each_block(codec, layout.tensor_offsets, layout.numels, layout.wire_offsets, body);
}

Memory encoded(const Codec& codec, const Layout& layout, const Memory& tensor) {
  Memory wire(layout.wire_bytes);
  for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t header, int64_t codes) {
    reference::encode_block(codec, tensor_block(codec, tensor, offset, numel), wire.data() + header, wire.data() + codes);
  });
  return wire;
}

Memory decoded(const Codec& codec, const Layout& layout, const Memory& wire, Memory tensor) {
  const Format format = reference::format_of(codec.dtype);
  for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t header, int64_t codes) {
    const Blocks values = reference::decode_block(codec, wire.data() + header, wire.data() + codes, numel);
    for (int64_t i = 0; i < numel; ++i) {
      reference::store(format, tensor.data() + (offset + i) * format.bytes, values[i]);
    }
  });
  return tensor;
}

// In the precision that sums have; NaN as whatever NaN comes out.
double sum_of(const Codec& codec, double a, double b) {
  return codec.value().bytes == 8 ? a + b : static_cast<double>(static_cast<float>(a) + static_cast<float>(b));
}
double quotient(const Codec& codec, double a, float divisor) {
  return codec.value().bytes == 8 ? a / divisor : static_cast<double>(static_cast<float>(a) / divisor);
}

void check_accumulated(const Codec& codec, const Layout& layout, const Memory& wire, const Memory& before, const Memory& after,
                       const std::string& what) {
  const Format format = codec.value();
  Memory expected(before);
  for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t header, int64_t codes) {
    const Blocks values = reference::decode_block(codec, wire.data() + header, wire.data() + codes, numel);
    for (int64_t i = 0; i < numel; ++i) {
      uint8_t* memory = expected.data() + (offset + i) * format.bytes;
      reference::store(format, memory, sum_of(codec, reference::load(format, memory), values[i]));
    }
  });
  for (int64_t i = 0; i * format.bytes < after.bytes(); ++i) {
    const uint8_t* a = after.data() + i * format.bytes;
    const uint8_t* b = expected.data() + i * format.bytes;
    const bool is_same = std::memcmp(a, b, format.bytes) == 0 ||
                         (std::isnan(reference::load(format, a)) && std::isnan(reference::load(format, b)));
    CHECK(is_same, what << ": decode_accumulate differs at element " << i);
  }
}

Memory summed(const Codec& codec, const Layout& layout, const std::vector<Memory>& wires, float divisor) {
  Memory result(layout.wire_bytes);
  for_each_block(codec, layout, [&](int64_t, int64_t numel, int64_t header, int64_t codes) {
    Blocks sum = reference::decode_block(codec, wires[0].data() + header, wires[0].data() + codes, numel);
    for (size_t k = 1; k < wires.size(); ++k) {
      const Blocks values = reference::decode_block(codec, wires[k].data() + header, wires[k].data() + codes, numel);
      for (int64_t i = 0; i < numel; ++i) {
        sum[i] = sum_of(codec, sum[i], values[i]);
      }
    }
    for (double& value : sum) {
      value = quotient(codec, value, divisor);
    }
    reference::encode_block(codec, sum, result.data() + header, result.data() + codes);
  });
  return result;
}

// All operations on one tensor, then on messages of it and of tensors like it.
void test_operations(const Codec& codec, const Layout& layout, const Kind& kind) {
  const Plan plan(codec.id, codec.dtype, layout.tensor_offsets, layout.numels, layout.wire_offsets);
  const Format format = reference::format_of(codec.dtype);
  Random random(11);
  constexpr int64_t kTail = 5;  // elements behind the last segment
  const int64_t numel = layout.tensor_numel + kTail;
  Memory tensor(numel * format.bytes, format.bytes);
  std::vector<Memory> wires;
  for (int rank = 0; rank < 3; ++rank) {
    fill(codec, kind, random, tensor);
    wires.push_back(encoded(codec, layout, tensor));
  }
  // `tensor` now belongs to wires[2].
  const Memory expected_tensor = decoded(codec, layout, wires[2], Memory(numel * format.bytes, format.bytes));
  Memory before(numel * codec.value().bytes, codec.value().bytes);
  for (int64_t i = 0; i < numel; ++i) {
    reference::store(codec.value(), before.data() + i * codec.value().bytes, normal(random));
  }
  const int64_t stride = layout.wire_bytes + 32;
  Memory messages(3 * stride);
  for (int rank = 0; rank < 3; ++rank) {
    std::memcpy(messages.data() + rank * stride, wires[rank].data(), layout.wire_bytes);
  }
  struct Sum {
    int64_t count;
    float divisor;
    Memory expected;
  };
  std::vector<Sum> sums;
  for (const auto& [count, divisor] : {std::pair<int, float>{1, 1.0f}, {2, 2.0f}, {3, 3.0f}, {3, 1.0f}}) {
    const std::vector<Memory> some(wires.begin(), wires.begin() + count);
    sums.push_back({count, divisor, summed(codec, layout, some, divisor)});
  }

  std::vector<Memory> accumulators;
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    const std::string what = context(codec, kind.name, layout.tensor_numel);

    Memory wire(layout.wire_bytes);
    accel::cpu::encode(plan, tensor.data(), wire.data());
    CHECK(wire.difference(wires[2]) < 0, what << ": encode differs at byte " << wire.difference(wires[2]));

    Memory target(numel * format.bytes, format.bytes);
    accel::cpu::decode(plan, wires[2].data(), target.data());
    CHECK(target.difference(expected_tensor) < 0, what << ": decode differs at byte " << target.difference(expected_tensor));

    Memory accumulator(numel * codec.value().bytes, codec.value().bytes);
    std::memcpy(accumulator.data(), before.data(), before.bytes());
    accel::cpu::decode_accumulate(plan, wires[2].data(), accumulator.data());
    check_accumulated(codec, layout, wires[2], before, accumulator, what);
    accumulators.push_back(accumulator);
    CHECK(accumulator.difference(accumulators[0]) < 0, what << ": decode_accumulate differs from the baseline's");

    for (const Sum& sum : sums) {
      Memory result(layout.wire_bytes);
      accel::cpu::decode_sum_encode(plan, {messages.data(), sum.count, stride}, sum.divisor, result.data());
      CHECK(result.difference(sum.expected) < 0, what << ": decode_sum_encode of " << sum.count << " messages / " << sum.divisor
                                                      << " differs at byte " << result.difference(sum.expected));
    }
  }
}

// Error feedback in encode and in decode_sum_encode, with residuals that lie elsewhere than the tensor's elements, updated in
// place and in memory of their own.
void test_feedback(const Codec& codec, const Layout& layout, const Kind& kind) {
  constexpr int64_t kShift = 7;
  std::vector<int64_t> residual_offsets;
  for (const int64_t offset : layout.tensor_offsets) {
    residual_offsets.push_back(offset + kShift);
  }
  const Plan plan(codec.id, codec.dtype, layout.tensor_offsets, layout.numels, layout.wire_offsets, residual_offsets);
  const Format format = reference::format_of(codec.dtype);
  Random random(23);
  Memory tensor(layout.tensor_numel * format.bytes, format.bytes);
  fill(codec, kind, random, tensor);
  Memory old((layout.tensor_numel + kShift + 2) * 4, 4);
  fill({codec.id, DType::kFloat32}, kinds().front(), random, old);

  const Memory message = encoded(codec, layout, tensor);
  const int64_t stride = layout.wire_bytes + 16;
  Memory messages(3 * stride);
  for (int rank = 0; rank < 3; ++rank) {
    std::memcpy(messages.data() + rank * stride, message.data(), layout.wire_bytes);
  }

  // What both operations must give, from the values that are coded.
  struct Expected {
    Memory wire, updated;
  };
  const auto expect = [&](const std::function<Blocks(int64_t, int64_t, int64_t, int64_t)>& values_at) {
    Expected expected{Memory(layout.wire_bytes), Memory(old.bytes(), 4)};
    for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t header, int64_t codes) {
      const auto at = [&](const Memory& memory, int64_t i) { return memory.data() + (offset + kShift + i) * 4; };
      Blocks values = values_at(offset, numel, header, codes);
      for (int64_t i = 0; i < numel; ++i) {
        values[i] = static_cast<float>(values[i]) + static_cast<float>(reference::load(reference::kFloat, at(old, i)));
      }
      uint8_t* wire = expected.wire.data();
      reference::encode_block(codec, values, wire + header, wire + codes);
      const Blocks results = reference::decode_block(codec, wire + header, wire + codes, numel);
      for (int64_t i = 0; i < numel; ++i) {
        const float lost = static_cast<float>(values[i]) - static_cast<float>(results[i]);
        const double updated = std::isfinite(lost) ? lost : reference::load(reference::kFloat, at(old, i));
        reference::store(reference::kFloat, expected.updated.data() + (offset + kShift + i) * 4, updated);
      }
    });
    return expected;
  };
  const Expected of_tensor =
      expect([&](int64_t offset, int64_t numel, int64_t, int64_t) { return tensor_block(codec, tensor, offset, numel); });
  const Expected of_sum = expect([&](int64_t, int64_t numel, int64_t header, int64_t codes) {
    Blocks sum = reference::decode_block(codec, message.data() + header, message.data() + codes, numel);
    const Blocks once = sum;
    for (int64_t i = 0; i < numel; ++i) {
      sum[i] = quotient(codec, sum_of(codec, sum_of(codec, once[i], once[i]), once[i]), 3.0f);
    }
    return sum;
  });

  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    const std::string what = context(codec, std::string(kind.name) + ", error feedback", layout.tensor_numel);
    for (const bool in_place : {false, true}) {
      for (const bool is_sum : {false, true}) {
        Memory wire(layout.wire_bytes), before(old.bytes(), 4), apart(old.bytes(), 4);
        std::memcpy(before.data(), old.data(), old.bytes());
        Memory& updated = in_place ? before : apart;
        const accel::Residuals residuals{reinterpret_cast<const float*>(before.data()), reinterpret_cast<float*>(updated.data())};
        if (is_sum) {
          accel::cpu::decode_sum_encode(plan, {messages.data(), 3, stride}, 3.0f, wire.data(), residuals);
        } else {
          accel::cpu::encode(plan, tensor.data(), wire.data(), residuals);
        }
        const Expected& expected = is_sum ? of_sum : of_tensor;
        CHECK(wire.difference(expected.wire) < 0,
              what << (is_sum ? ", sum" : "") << ": the message differs at byte " << wire.difference(expected.wire));
        for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t, int64_t) {
          const int64_t start = (offset + kShift) * 4;
          CHECK(std::memcmp(updated.data() + start, expected.updated.data() + start, numel * 4) == 0,
                what << (is_sum ? ", sum" : "") << (in_place ? ", in place" : "") << ": the residuals from " << offset << " on");
        });
        const Memory& untouched = in_place ? old : expected.updated;
        CHECK(std::memcmp(updated.data(), untouched.data(), kShift * 4) == 0, what << ": residuals before the first segment");
        CHECK(std::memcmp(updated.data() + updated.bytes() - 8, untouched.data() + old.bytes() - 8, 8) == 0,
              what << ": residuals behind the last segment");
      }
    }
  }
}

// A message long enough to be written past the caches, its parts at places that are a multiple of 16 bytes and not of 64.
void test_long_message(const Codec& codec, int64_t blocks) {
  Layout layout;
  layout.add(codec, blocks * 512 + 77, 1, 16);
  layout.add(codec, 5 * 512, 2, 16);
  const Plan plan(codec.id, codec.dtype, layout.tensor_offsets, layout.numels, layout.wire_offsets);
  CHECK(plan.wire_bytes() > int64_t{16} << 20, "too short for this test: " << plan.wire_bytes());
  const Format format = reference::format_of(codec.dtype);
  Memory tensor(layout.tensor_numel * format.bytes, format.bytes);
  Random random(3);
  Memory pattern(997 * format.bytes);
  fill(codec, {"", true, [](Random& r, int64_t) { return uniform(r); }}, random, pattern);
  for (int64_t i = 0; i < layout.tensor_numel; ++i) {
    std::memcpy(tensor.data() + i * format.bytes, pattern.data() + i % 997 * format.bytes, format.bytes);
  }
  const Memory expected = encoded(codec, layout, tensor);
  const Memory expected_tensor = decoded(codec, layout, expected, Memory(tensor.bytes(), format.bytes));
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    const std::string what = context(codec, "long message", layout.tensor_numel);
    Memory wire(layout.wire_bytes);
    accel::cpu::encode(plan, tensor.data(), wire.data());
    CHECK(wire.difference(expected) < 0, what << ": encode differs at byte " << wire.difference(expected));
    Memory target(tensor.bytes(), format.bytes);
    accel::cpu::decode(plan, wire.data(), target.data());
    CHECK(target.difference(expected_tensor) < 0, what << ": decode differs at byte " << target.difference(expected_tensor));
  }
}

// |x' - x| <= scale/2 (1 + 2^-16) for int8 and int4. minmax_uint8 rounds x * s and its own s, which counts where |x| is large
// beside the step: at most 2^-21 absmax more. What is zero stays zero.
void test_error_bounds() {
  for (const CodecId id : {CodecId::kInt8, CodecId::kMinMaxUInt8, CodecId::kInt4}) {
    const Codec codec{id, DType::kFloat32};
    for (const Kind& kind : kinds()) {
      if (!kind.is_bounded) {
        continue;
      }
      const Layout layout = single(codec, 3001);
      const Plan plan(codec.id, codec.dtype, layout.tensor_offsets, layout.numels, layout.wire_offsets);
      Memory tensor(layout.tensor_numel * 4, 4), target(layout.tensor_numel * 4, 4), wire(layout.wire_bytes);
      Random random(19);
      fill(codec, kind, random, tensor);
      accel::cpu::encode(plan, tensor.data(), wire.data());
      accel::cpu::decode(plan, wire.data(), target.data());
      for_each_block(codec, layout, [&](int64_t offset, int64_t numel, int64_t header, int64_t) {
        const Blocks values = tensor_block(codec, tensor, offset, numel);
        const Blocks results = tensor_block(codec, target, offset, numel);
        double absmax = 0;
        for (const double value : values) {
          absmax = std::max(absmax, std::fabs(value));
        }
        const double scale = reference::load(reference::kFloat, wire.data() + header);
        CHECK((scale == 0) == (absmax < 0x1p-100), kind.name << ": scale " << scale << " for absmax " << absmax);
        const double rounding = id == CodecId::kMinMaxUInt8 ? absmax * 0x1p-21 : 0;
        const double bound = absmax < 0x1p-100 ? 0x1p-100 : scale / 2 * (1 + 0x1p-16) + rounding;
        for (int64_t i = 0; i < numel; ++i) {
          CHECK(std::fabs(results[i] - values[i]) <= bound,
                context(codec, kind.name, 3001) << ": " << values[i] << " became " << results[i] << ", bound " << bound);
          CHECK(values[i] != 0 || results[i] == 0, context(codec, kind.name, 3001) << ": a zero became " << results[i]);
        }
      });
    }
  }
}

// sign: what every element becomes is the mean magnitude of the groups that are not all zeros, with the element's sign.
void test_signs() {
  std::vector<float> tensor(512 + 40, 0.0f);
  for (int i = 0; i < 32; ++i) {
    tensor[32 + i] = i % 2 == 0 ? 3.0f : -1.0f;  // the first block's only live group: mean magnitude 2
  }
  tensor[512 + 35] = -4.0f;  // in a short group of 8: mean magnitude 0.5
  const Plan plan(CodecId::kSign, DType::kFloat32, {0}, {552}, {-1});
  CHECK(plan.wire_bytes() == 16 + 80, "sign needs " << plan.wire_bytes() << " bytes");
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    Memory wire(plan.wire_bytes());
    accel::cpu::encode(plan, tensor.data(), wire.data());
    std::vector<float> result(tensor.size(), 9.0f);
    accel::cpu::decode(plan, wire.data(), result.data());
    for (int i = 0; i < 552; ++i) {
      const float first = i / 32 == 1 ? (i % 2 == 0 ? 2.0f : -2.0f) : 0.0f;
      const float second = i < 544 ? 0.0f : (i == 547 ? -0.5f : 0.5f);
      const float expected = i < 512 ? first : second;
      CHECK(result[i] == expected, isa << ": sign made " << result[i] << " of element " << i << ", expected " << expected);
    }
  }
}

// One NaN poisons what shares its scale, alone: canonical NaN as scale, codes 0, canonical NaN throughout when decoded.
void test_poison() {
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    for (const uint32_t bad : {0x7F800001u, 0xFFC00001u, 0x7F800000u, 0xFF800000u}) {
      for (const CodecId id : {CodecId::kInt8, CodecId::kMinMaxUInt8, CodecId::kInt4, CodecId::kSign}) {
        const Codec codec{id, DType::kFloat32};
        std::vector<float> tensor(1536, 1.5f);
        std::memcpy(&tensor[1023], &bad, 4);
        const Plan plan(codec.id, codec.dtype, {0}, {1536}, {-1});
        Memory wire(plan.wire_bytes());
        accel::cpu::encode(plan, tensor.data(), wire.data());
        accel::cpu::decode(plan, wire.data(), tensor.data());
        const std::string what = context(codec, "poison", 1536);
        const int64_t poisoned = 1023 / codec.scale_numel();
        for (int64_t i = 0; i < codec.header_bytes(); ++i) {
          const int marks = id == CodecId::kSign ? 0xFF : 0;
          const int expected = i == 2 ? 0xC0 : i == 3 ? 0x7F : i >= 4 ? marks : 0;
          CHECK(wire.data()[poisoned * codec.header_bytes() + i] == expected, what << ": header byte " << i);
        }
        const uint8_t* codes = wire.data() + plan.wire_bytes() - reference::code_bytes(codec, 1536);
        for (int64_t i = 0; i < 1536; ++i) {
          uint32_t bits;
          std::memcpy(&bits, &tensor[i], 4);
          const bool is_poisoned = i / codec.scale_numel() == poisoned;
          CHECK(is_poisoned ? bits == 0x7FC00000u : std::fabs(tensor[i] - 1.5f) < 0.01f, what << ": element " << i);
          CHECK(!is_poisoned || codes[i * codec.code_bits() / 8] == 0, what << ": code " << i);
        }
      }
    }
  }
}

// Addition in another order gives another sum, and fp16 is divided before it could overflow.
void test_sums() {
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    for (int first = 0; first < 3; ++first) {
      const Plan plan(CodecId::kNone, DType::kFloat32, {0}, {1}, {-1});
      Memory messages(3 * 16), result(16);
      const float large[3] = {0x1p24f, 1.0f, 1.0f};
      for (int rank = 0; rank < 3; ++rank) {
        std::memcpy(messages.data() + rank * 16, &large[(rank + first) % 3], 4);
      }
      accel::cpu::decode_sum_encode(plan, {messages.data(), 3, 16}, 1.0f, result.data());
      float sum;
      std::memcpy(&sum, result.data(), 4);
      const float expected = first == 1 ? 0x1p24f + 2.0f : 0x1p24f;  // 1 + 1 first, or each lost in 2^24
      CHECK(sum == expected, isa << ": messages starting with the one at " << first << " add to " << sum);
    }
    const Plan plan(CodecId::kFp16, DType::kFloat16, {0}, {1}, {-1});
    Memory messages(2 * 16), result(16);
    for (int rank = 0; rank < 2; ++rank) {
      reference::store(reference::kHalf, messages.data() + rank * 16, 60000);
    }
    accel::cpu::decode_sum_encode(plan, {messages.data(), 2, 16}, 2.0f, result.data());
    CHECK(reference::load(reference::kHalf, result.data()) == 60000, isa << ": the mean of two float16 overflows");
  }
}

}  // namespace

int main() {
  for (int id = 0; id < reference::kNumCodecs; ++id) {
    for (int dtype = 0; dtype < reference::kNumDTypes; ++dtype) {
      const Codec codec{static_cast<CodecId>(id), static_cast<DType>(dtype)};
      for (const Kind& kind : kinds()) {
        test_operations(codec, several(codec), kind);
        if (codec.id != CodecId::kNone) {
          test_feedback(codec, several(codec), kind);
        }
      }
      test_operations(codec, whole_blocks(codec), kinds().front());
      for (const int64_t numel : {0, 1, 7, 511, 512, 513, 1000, 3001}) {
        test_operations(codec, single(codec, numel), kinds().front());
      }
    }
  }
  test_long_message({CodecId::kInt8, DType::kFloat32}, 33000);
  test_long_message({CodecId::kNone, DType::kFloat32}, 8300);
  test_long_message({CodecId::kFp16, DType::kFloat32}, 16500);
  test_error_bounds();
  test_signs();
  test_poison();
  test_sums();
  return check::report("test_codecs");
}
