// Chooses the kernels once, by what the machine can run.
#include "kernels.h"

#if defined(ACCEL_X86)
#include <cpuid.h>
#endif

#include "lightning_accel/check.h"

namespace accel::cpu {
namespace {

#if defined(ACCEL_X86)
// Not by __builtin_cpu_supports: older compilers do not know the name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const QAdamKernels* qadam_kernels;
  const WeightKernels* weight_kernels;
};

std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets{{"baseline", &baseline::kernels, &baseline::qadam_kernels, &baseline::weight_kernels}};
#if defined(ACCEL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && has_f16c()) {
    sets.push_back({"avx2", &avx2::kernels, &avx2::qadam_kernels, &avx2::weight_kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      sets.push_back({"avx512", &avx512::kernels, &avx512::qadam_kernels, &avx512::weight_kernels});
    }
  }
#endif
  return sets;
}

InstructionSet& current() {
  static InstructionSet chosen = available().back();
  return chosen;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : available()) {
    names.emplace_back(set.name);
  }
  return names;
}

std::string instruction_set() { return current().name; }

void use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : available()) {
    if (name == set.name) {
      current() = set;
      return;
    }
  }
  ACCEL_CHECK(false, "instruction set '" << name << "' is not one this machine runs; see instruction_sets()");
}

const Kernels& kernels() { return *current().kernels; }
const QAdamKernels& qadam_kernels() { return *current().qadam_kernels; }
const WeightKernels& weight_kernels() { return *current().weight_kernels; }

void encode(const Plan& plan, const void* tensor, uint8_t* wire, const Residuals& residuals) {
  kernels().encode(plan, tensor, wire, residuals);
}

void decode(const Plan& plan, const uint8_t* wire, void* tensor) { kernels().decode(plan, wire, tensor); }

void decode_accumulate(const Plan& plan, const uint8_t* wire, void* accumulator) {
  kernels().decode_accumulate(plan, wire, accumulator);
}

void decode_sum_encode(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire, const Residuals& residuals) {
  kernels().decode_sum_encode(plan, messages, divisor, wire, residuals);
}

void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel) {
  weight_kernels().mean(dtype, rows, count, out, numel);
}

void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel) {
  weight_kernels().ring_difference(dtype, x, w, left, right, numel);
}

}  // namespace accel::cpu
