// QAdam's two passes on every instruction set against plain double arithmetic rounded where the header says, byte by byte, in
// parts and as a whole, on one thread and on several.
#include <algorithm>
#include <random>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "lightning_accel/qadam.h"
#include "memory.h"
#include "reference.h"

using accel::DType;
using reference::Format;

namespace {

Memory random_tensor(Format format, int64_t numel, unsigned seed, bool is_positive, int64_t distance) {
  Memory memory(numel * format.bytes, distance * format.bytes);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < numel; ++i) {
    const double x = normal(random) * 0.1;
    reference::store(format, memory.data() + i * format.bytes, is_positive ? x * x : x);
  }
  return memory;
}

double at(Format format, const Memory& memory, int64_t i) { return reference::load(format, memory.data() + i * format.bytes); }

// Each operation in `Value`, then rounded to the tensor's format.
template <class Value>
void test_dtype(DType dtype, int64_t numel, int threads) {
  const Format format = reference::format_of(dtype);
  for (const double weight_decay : {0.0, 0.1}) {
    Memory gradient = random_tensor(format, numel, 1, false, 1);
    for (int64_t i = 3; i < numel; i += 1000) {
      reference::store(format, gradient.data() + i * format.bytes,
                       i % 2 ? std::numeric_limits<double>::quiet_NaN() : -std::numeric_limits<double>::infinity());
    }
    const Memory momentum = random_tensor(format, numel, 2, false, 0);
    const Memory variance = random_tensor(format, numel, 3, true, 3), parameter = random_tensor(format, numel, 4, false, 1);
    Memory folded(numel * format.bytes), stepped(numel * format.bytes), kept(gradient);
    const accel::FoldScalars fold{0.9, weight_decay};
    const accel::StepScalars step{1e-3 / 0.7, std::sqrt(1 - 0.95), 1e-8, 1 - 1e-3 * weight_decay};
    for (int64_t i = 0; i < numel; ++i) {
      const Value g = static_cast<Value>(at(format, gradient, i)), m = static_cast<Value>(at(format, momentum, i));
      const Value v = static_cast<Value>(at(format, variance, i)), x = static_cast<Value>(at(format, parameter, i));
      const Value wd = static_cast<Value>(weight_decay) * x;
      const Value decayed = weight_decay != 0 ? static_cast<Value>(g + wd) : g;
      const Value old = static_cast<Value>(0.9) * m, added = static_cast<Value>(1.0 - 0.9) * decayed;
      reference::store(format, folded.data() + i * format.bytes, static_cast<Value>(old + added));
      const Value root = std::sqrt(v) / static_cast<Value>(step.correction);
      const Value ratio = g / static_cast<Value>(root + static_cast<Value>(1e-8));
      const Value change = static_cast<Value>(step.step_size) * ratio, shrunk = x * static_cast<Value>(step.decay);
      const bool is_finite = std::isfinite(g);
      reference::store(format, stepped.data() + i * format.bytes, is_finite ? static_cast<Value>(shrunk - change) : x);
      if (!is_finite) {
        std::memcpy(kept.data() + i * format.bytes, momentum.data() + i * format.bytes, format.bytes);
      }
    }
    for (const std::string& isa : accel::cpu::instruction_sets()) {
      accel::cpu::use_instruction_set(isa);
      const std::string what = isa + ", dtype " + std::to_string(static_cast<int>(dtype)) + ", " + std::to_string(numel) +
                               " elements, decay " + std::to_string(weight_decay);
      // One tensor in two parts, with nothing between them.
      const int64_t half = numel / 3;
      Memory g(gradient), x(parameter), m(momentum);
      const auto part = [&](const Memory& memory, int64_t i) { return const_cast<uint8_t*>(memory.data()) + i * format.bytes; };
      accel::cpu::fold(dtype,
                       {{part(g, 0), part(m, 0), part(x, 0), half},
                        {part(g, half), part(m, half), part(x, half), 0},
                        {part(g, half), part(m, half), part(x, half), numel - half}},
                       fold, threads);
      CHECK(g.difference(folded) < 0, what << ": fold differs at byte " << g.difference(folded));
      CHECK(m.difference(momentum) < 0 && x.difference(parameter) < 0, what << ": fold wrote what it only reads");
      accel::cpu::step(dtype,
                       {{gradient.data(), part(m, 0), variance.data(), part(x, 0), half},
                        {part(gradient, half), part(m, half), part(variance, half), part(x, half), numel - half}},
                       step, threads);
      CHECK(x.difference(stepped) < 0, what << ": step differs at byte " << x.difference(stepped));
      CHECK(m.difference(kept) < 0, what << ": the momentum is not the gradient, or not kept where that is not finite");
    }
  }
}

}  // namespace

int main() {
  for (const int64_t numel : {0, 1, 7, 127, 128, 129, 5003}) {
    test_dtype<float>(DType::kFloat32, numel, 1);
    test_dtype<float>(DType::kFloat16, numel, 1);
    test_dtype<float>(DType::kBFloat16, numel, 1);
    test_dtype<double>(DType::kFloat64, numel, 1);
  }
  test_dtype<float>(DType::kFloat32, (1 << 20) + 77, 3);
  return check::report("test_qadam");
}
