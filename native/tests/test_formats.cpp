// The messages that native/README.md shows are those that the kernels write.
#include <cctype>
#include <fstream>
#include <sstream>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "memory.h"
#include "reference.h"

using accel::CodecId;
using accel::DType;
using accel::Plan;

namespace {

// Bytes as the README writes them: two hex digits each, `..` for padding, 16 to a line.
std::string hex_of(const Memory& wire, uint8_t untouched) {
  std::string text;
  char byte[4];
  for (int64_t i = 0; i < wire.bytes(); ++i) {
    std::snprintf(byte, sizeof byte, "%02X", wire.data()[i]);
    text += wire.data()[i] == untouched ? ".." : byte;
    text += i % 16 == 15 ? '\n' : ' ';
  }
  return text;
}

}  // namespace

int main() {
  std::ifstream file(ACCEL_README);
  std::stringstream readme;
  readme << file.rdbuf();
  CHECK(!readme.str().empty(), "cannot read " << ACCEL_README);

  const std::vector<float> tensor{1.0f, -0.5f, 0.25f};
  for (const auto& [codec, name] : {std::pair<CodecId, const char*>{CodecId::kNone, "none"},
                                    {CodecId::kFp16, "fp16"},
                                    {CodecId::kBf16, "bf16"},
                                    {CodecId::kInt8, "int8"},
                                    {CodecId::kMinMaxUInt8, "minmax_uint8"},
                                    {CodecId::kInt4, "int4"},
                                    {CodecId::kSign, "sign"}}) {
    const Plan plan(codec, DType::kFloat32, {0}, {3}, {-1});
    for (const std::string& isa : accel::cpu::instruction_sets()) {
      accel::cpu::use_instruction_set(isa);
      Memory wire(plan.wire_bytes());
      accel::cpu::encode(plan, tensor.data(), wire.data());
      const std::string example = std::string("```\n") + name + "\n" + hex_of(wire, 0xA5) + "```\n";
      CHECK(readme.str().find(example) != std::string::npos, isa << ": native/README.md should show\n" << example);
    }
  }
  return check::report("test_formats");
}
