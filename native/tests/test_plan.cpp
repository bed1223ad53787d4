// Plan: where segments come to lie, how long messages are, and what is refused.
#include <limits>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "reference.h"

using accel::CodecId;
using accel::DType;
using accel::Plan;

namespace {

using Offsets = std::vector<int64_t>;

Plan plan_of(const Offsets& tensor_offsets, const Offsets& numels, const Offsets& wire_offsets) {
  return Plan(CodecId::kInt8, DType::kFloat32, tensor_offsets, numels, wire_offsets);
}

void test_sizes() {
  for (int codec = 0; codec < reference::kNumCodecs; ++codec) {
    for (int dtype = 0; dtype < reference::kNumDTypes; ++dtype) {
      const reference::Codec plain{static_cast<CodecId>(codec), static_cast<DType>(dtype)};
      for (const int64_t numel : {0, 1, 7, 15, 16, 17, 511, 512, 513, 1000, 1024, 2049, 3001}) {
        const Plan plan(plain.id, plain.dtype, {5}, {numel}, {-1});
        const int64_t bytes = reference::segment_bytes(plain, numel);
        CHECK(plan.wire_bytes() == bytes, "codec " << codec << ", dtype " << dtype << ", numel " << numel << ": got "
                                                   << plan.wire_bytes() << ", not " << bytes);
        CHECK(plan.num_blocks() == (numel + 511) / 512, plan.num_blocks());
        CHECK(plan.tensor_numel() == 5 + numel && plan.residual_numel() == 5 + numel, plan.tensor_numel());
      }
    }
  }
}

void test_places() {
  const Plan empty = plan_of({}, {}, {});
  CHECK(empty.wire_bytes() == 0 && empty.num_blocks() == 0 && empty.tensor_numel() == 0, empty.wire_bytes());

  // Behind one another, then at a place of one's own, with empty segments between; tensor offsets in any order.
  const Plan plan = plan_of({4000, 100, 7, 0}, {513, 0, 1, 7}, {-1, -1, -1, 1024});
  const auto& segments = plan.segments();
  CHECK(segments.size() == 4, segments.size());
  CHECK(segments[0].wire_offset == 0 && segments[0].first_block == 0, segments[0].wire_offset);
  CHECK(segments[1].wire_offset == 16 + 528 && segments[1].first_block == 2, segments[1].wire_offset);
  CHECK(segments[2].wire_offset == 16 + 528 && segments[2].first_block == 2, segments[2].wire_offset);
  CHECK(segments[3].wire_offset == 1024 && segments[3].first_block == 3, segments[3].wire_offset);
  CHECK(plan.wire_bytes() == 1024 + 32, plan.wire_bytes());
  CHECK(plan.tensor_numel() == 4513, plan.tensor_numel());
  CHECK(plan.num_blocks() == 4, plan.num_blocks());

  // Residuals lie at places of their own.
  const Plan moved(CodecId::kSign, DType::kFloat32, {0, 600}, {600, 5}, {-1, -1}, {700, 3});
  CHECK(moved.segments()[0].residual_offset == 700 && moved.segments()[1].residual_offset == 3, "residual offsets");
  CHECK(moved.residual_numel() == 1300 && moved.tensor_numel() == 605, moved.residual_numel());

  // More than 2^31 elements.
  const int64_t many = (int64_t{1} << 33) + 1;
  const Plan large = plan_of({many}, {many}, {-1});
  CHECK(large.tensor_numel() == 2 * many, large.tensor_numel());
  CHECK(large.wire_bytes() == reference::segment_bytes({CodecId::kInt8, DType::kFloat32}, many), large.wire_bytes());
}

void test_refusals() {
  CHECK_THROWS(plan_of({0, 1}, {1}, {-1}), "as many offsets as sizes");
  CHECK_THROWS(plan_of({0}, {1}, {-1, -1}), "as many offsets as sizes");
  CHECK_THROWS(Plan(CodecId::kInt8, DType::kFloat32, {0}, {1}, {-1}, {0, 0}), "residual offsets");
  CHECK_THROWS(Plan(CodecId::kInt8, DType::kFloat32, {0}, {1}, {-1}, {-1}), "residual offset -1");
  CHECK_THROWS(plan_of({0}, {-1}, {-1}), "size -1");
  CHECK_THROWS(plan_of({-3}, {1}, {-1}), "offset -3");
  CHECK_THROWS(plan_of({0}, {1}, {8}), "multiple of 16");
  CHECK_THROWS(plan_of({0, 0}, {1, 1}, {-1, 16}), "ends at 32: got 16");
  CHECK_THROWS(plan_of({0, 0}, {1, 1}, {64, 0}), "ends at 96: got 0");
  // Sizes whose bytes do not fit 64 bits would wrap around to small ones.
  const int64_t huge = std::numeric_limits<int64_t>::max();
  CHECK_THROWS(plan_of({0}, {huge}, {-1}), "at most");
  CHECK_THROWS(plan_of({huge}, {1}, {-1}), "at most");
  CHECK_THROWS(plan_of({0}, {1}, {huge - 15}), "at most");
  for (const int codec : {-1, reference::kNumCodecs}) {
    CHECK_THROWS(Plan(static_cast<CodecId>(codec), DType::kFloat32, {0}, {1}, {-1}), "codec must be");
    CHECK_THROWS(Plan(static_cast<CodecId>(codec), DType::kFloat32, {}, {}, {}), "codec must be");
  }
  for (const int dtype : {-1, reference::kNumDTypes}) {
    CHECK_THROWS(Plan(CodecId::kInt8, static_cast<DType>(dtype), {0}, {1}, {-1}), "dtype must be");
    CHECK_THROWS(Plan(CodecId::kInt8, static_cast<DType>(dtype), {}, {}, {}), "dtype must be");
  }
}

void test_instruction_sets() {
  const std::vector<std::string> names = accel::cpu::instruction_sets();
  CHECK(!names.empty() && names.front() == "baseline", names.size());
  CHECK(accel::cpu::instruction_set() == names.back(), accel::cpu::instruction_set());
  for (const std::string& name : names) {
    accel::cpu::use_instruction_set(name);
    CHECK(accel::cpu::instruction_set() == name, name);
  }
  CHECK_THROWS(accel::cpu::use_instruction_set("mmx"), "'mmx'");
  CHECK(accel::cpu::instruction_set() == names.back(), "a refusal must change nothing");
}

}  // namespace

int main() {
  test_sizes();
  test_places();
  test_refusals();
  test_instruction_sets();
  return check::report("test_plan");
}
