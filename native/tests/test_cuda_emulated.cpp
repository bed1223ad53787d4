// The CUDA kernels, compiled for the host (emulated_cuda/), write what the CPU's do, byte for byte: all codecs, dtypes and
// operations, sizes around the block's, all alignments, any bit patterns. Sanitizers see a misaligned vector or a step beyond a
// buffer; padding and what no segment owns is filled before and must be as it was.
#include <cmath>
#include <random>
#include <string>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "lightning_accel/qadam.h"
#include "lightning_accel/weights.h"
#include "memory.h"

// Last, because they are made of the headers before.
#include "../cuda/codecs.cu"
#include "../cuda/qadam.cu"
#include "../cuda/weights.cu"

namespace {

using accel::CodecId;
using accel::DType;
using accel::Plan;

constexpr int kNumCodecs = 7;
constexpr int kNumDTypes = 4;
constexpr int kNumKinds = 6;
constexpr int kElementBytes[kNumDTypes] = {4, 2, 2, 8};
constexpr int kDistances[] = {0, 2, 4, 8, 12};  // bytes from 64-byte alignment, where the element's size allows

using Random = std::mt19937_64;

double uniform(Random& random) { return static_cast<double>(static_cast<int64_t>(random())) * 0x1p-63; }  // [-1, 1)

double element(Random& random, int kind, int64_t i) {
  switch (kind) {
    case 0: return uniform(random);
    case 1: return std::ldexp(uniform(random), static_cast<int>(i / 100 * 37 % 200) - 140);  // scales differ, down to nothing
    case 2: return i % 3000 < 2000 ? (i % 2 ? 0.0 : -0.0) : (random() % 40 ? 0.0 : uniform(random));
    case 3: return i % 1300 == 5 ? (i % 3 ? (i % 2 ? INFINITY : -INFINITY) : NAN) : uniform(random);
    default: return std::ldexp(uniform(random), 128);  // too large for sums, and for most residuals
  }
}

// Kind 5 is any bits.
void fill(Memory& memory, DType dtype, int kind, Random& random) {
  const int bytes = kElementBytes[static_cast<int>(dtype)];
  accel::visit_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < memory.bytes() / bytes; ++i) {
      const uint64_t bits = random();
      const double value = element(random, kind, i);
      T item;
      if (kind == 5) {
        std::memcpy(&item, &bits, sizeof item);
      } else if constexpr (std::is_same_v<T, double>) {
        item = value;
      } else {
        item = accel::Convert<T>::from_float(static_cast<float>(value));
      }
      std::memcpy(memory.data() + i * bytes, &item, sizeof item);
    }
  });
}

struct Case {
  Plan plan;
  int64_t distance;  // of the tensor and of the residuals, in bytes
  int kind;
  bool all_operations;
};

std::string name_of(const Case& c, const char* operation) {
  return std::string(operation) + ", codec " + std::to_string(static_cast<int>(c.plan.codec())) + ", dtype " +
         std::to_string(static_cast<int>(c.plan.dtype())) + ", " + std::to_string(c.plan.tensor_numel()) + " elements at " +
         std::to_string(c.distance) + ", kind " + std::to_string(c.kind);
}

void check_same(const Memory& cuda, const Memory& cpu, const Case& c, const char* operation) {
  CHECK(cuda.difference(cpu) < 0, name_of(c, operation) << ": byte " << cuda.difference(cpu) << " differs");
}

// Both encoders, without error feedback, and with residuals in place and apart.
template <class OnCpu, class OnCuda>
void check_encoder(const Case& c, const Memory& wire_before, const Memory& old, const char* operation, OnCpu on_cpu,
                   OnCuda on_cuda) {
  Memory cpu(wire_before), cuda(wire_before);
  on_cpu(cpu.data(), accel::Residuals{});
  on_cuda(cuda.data(), accel::Residuals{});
  check_same(cuda, cpu, c, operation);
  if (c.plan.codec() == CodecId::kNone) {
    return;
  }
  for (const bool in_place : {false, true}) {
    Memory cpu_wire(wire_before), cuda_wire(wire_before), cpu_old(old), cuda_old(old);
    Memory cpu_apart(old.bytes(), c.distance / 4 * 4 + 4), cuda_apart(cpu_apart);
    Memory& cpu_updated = in_place ? cpu_old : cpu_apart;
    Memory& cuda_updated = in_place ? cuda_old : cuda_apart;
    const auto floats = [](Memory& memory) { return reinterpret_cast<float*>(memory.data()); };
    on_cpu(cpu_wire.data(), accel::Residuals{floats(cpu_old), floats(cpu_updated)});
    on_cuda(cuda_wire.data(), accel::Residuals{floats(cuda_old), floats(cuda_updated)});
    check_same(cuda_wire, cpu_wire, c, operation);
    check_same(cuda_updated, cpu_updated, c, in_place ? "residuals in place" : "residuals apart");
  }
}

void test(const Case& c) {
  namespace cpu = accel::cpu;
  namespace cuda = accel::cuda;
  const Plan& plan = c.plan;
  const accel::Segment* segments = plan.segments().data();
  Random random(17);
  const int64_t bytes = plan.tensor_numel() * kElementBytes[static_cast<int>(plan.dtype())];
  Memory tensor(bytes, c.distance), old(plan.residual_numel() * 4, c.distance / 4 * 4);
  fill(tensor, plan.dtype(), c.kind, random);
  fill(old, DType::kFloat32, c.kind == 5 ? 3 : 0, random);

  const Memory room(plan.wire_bytes());
  check_encoder(
      c, room, old, "encode", [&](uint8_t* wire, const auto& residuals) { cpu::encode(plan, tensor.data(), wire, residuals); },
      [&](uint8_t* wire, const auto& residuals) { cuda::encode(plan, segments, tensor.data(), wire, residuals, nullptr); });
  if (!c.all_operations) {
    return;
  }

  Memory wire(room), cpu_tensor(bytes, c.distance), cuda_tensor(cpu_tensor);
  cpu::encode(plan, tensor.data(), wire.data());
  cpu::decode(plan, wire.data(), cpu_tensor.data());
  cuda::decode(plan, segments, wire.data(), cuda_tensor.data(), nullptr);
  check_same(cuda_tensor, cpu_tensor, c, "decode");

  const bool is_double = plan.codec() == CodecId::kNone && plan.dtype() == DType::kFloat64;
  Memory cpu_sums(plan.tensor_numel() * (is_double ? 8 : 4), is_double ? c.distance : c.distance / 4 * 4);
  fill(cpu_sums, is_double ? DType::kFloat64 : DType::kFloat32, 0, random);
  Memory cuda_sums(cpu_sums);
  cpu::decode_accumulate(plan, wire.data(), cpu_sums.data());
  cuda::decode_accumulate(plan, segments, wire.data(), cuda_sums.data(), nullptr);
  check_same(cuda_sums, cpu_sums, c, "decode_accumulate");

  constexpr int64_t kCount = 7;  // 4 + 2 + 1, however many the kernel asks for at once
  const int64_t stride = plan.wire_bytes() + 16;
  Memory messages(kCount * stride);
  for (int64_t k = 0; k < kCount; ++k) {
    fill(tensor, plan.dtype(), c.kind, random);
    cpu::encode(plan, tensor.data(), messages.data() + k * stride);
  }
  check_encoder(
      c, room, old, "decode_sum_encode",
      [&](uint8_t* target, const auto& residuals) {
        cpu::decode_sum_encode(plan, {messages.data(), kCount, stride}, kCount, target, residuals);
      },
      [&](uint8_t* target, const auto& residuals) {
        cuda::decode_sum_encode(plan, segments, {messages.data(), kCount, stride}, kCount, target, residuals, nullptr);
      });
  // In the place of the last message, as two ranks do. Division by a power of two takes another way.
  Memory cpu_messages(messages), cuda_messages(messages);
  cpu::decode_sum_encode(plan, {cpu_messages.data(), 2, stride}, 2.0f, cpu_messages.data() + stride);
  cuda::decode_sum_encode(plan, segments, {cuda_messages.data(), 2, stride}, 2.0f, cuda_messages.data() + stride, {}, nullptr);
  check_same(cuda_messages, cpu_messages, c, "decode_sum_encode in place");
}

// Segments of several sizes with gaps, in the tensor and among the residuals, whose alignments differ.
Plan several(CodecId codec, DType dtype) {
  std::vector<int64_t> tensor_offsets, numels{7, 0, 513, 1, 1000, 129, 2 * 512, 512, 0}, wire_offsets, residual_offsets;
  int64_t tensor_end = 0, residual_end = 0, wire_end = 0;
  for (const int64_t numel : numels) {
    tensor_offsets.push_back(tensor_end + numel % 3);
    tensor_end = tensor_offsets.back() + numel;
    residual_offsets.push_back(residual_end + numel % 5);
    residual_end = residual_offsets.back() + numel;
    wire_offsets.push_back(wire_end + numel % 2 * 16);
    wire_end = wire_offsets.back() + Plan(codec, dtype, {0}, {numel}, {0}).wire_bytes();
  }
  return Plan(codec, dtype, tensor_offsets, numels, wire_offsets, residual_offsets);
}

// QAdam's passes over more tensors than a launch takes, some of them empty, at all distances from alignment.
void test_qadam(DType dtype, double weight_decay) {
  const int bytes = kElementBytes[static_cast<int>(dtype)];
  Random random(29);
  std::vector<Memory> cpu;  // of each tensor: gradient, momentum, variance, parameter
  std::vector<int64_t> numels{4 * 512 + 5};
  for (int64_t i = 1; i < 150; ++i) {
    numels.push_back(i % 11 == 0 ? 0 : i % 7 == 0 ? 512 + i % 3 : i);
  }
  for (size_t i = 0; i < numels.size(); ++i) {
    for (int operand = 0; operand < 4; ++operand) {
      Memory memory(numels[i] * bytes, i % 4 == 0 ? 0 : static_cast<int64_t>(random() % 4) * bytes);
      fill(memory, dtype, operand == 2 ? 0 : static_cast<int>(i % kNumKinds), random);
      cpu.push_back(memory);
    }
  }
  std::vector<Memory> cuda(cpu);
  const auto run = [&](std::vector<Memory>& memories, auto fold, auto step) {
    std::vector<accel::FoldTensor> folds;
    std::vector<accel::StepTensor> steps;
    for (size_t i = 0; i < numels.size(); ++i) {
      Memory* of = &memories[4 * i];
      folds.push_back({of[0].data(), of[1].data(), of[3].data(), numels[i]});
      steps.push_back({of[0].data(), of[1].data(), of[2].data(), of[3].data(), numels[i]});
    }
    fold(dtype, folds, accel::FoldScalars{0.9, weight_decay});
    step(dtype, steps, accel::StepScalars{1e-3 / 0.7, std::sqrt(1 - 0.95), 1e-8, 1 - 1e-3 * weight_decay});
  };
  run(
      cpu, [](auto... arguments) { accel::cpu::fold(arguments..., 1); },
      [](auto... arguments) { accel::cpu::step(arguments..., 1); });
  run(
      cuda, [](auto... arguments) { accel::cuda::fold(arguments..., nullptr); },
      [](auto... arguments) { accel::cuda::step(arguments..., nullptr); });
  for (size_t i = 0; i < cpu.size(); ++i) {
    CHECK(cuda[i].difference(cpu[i]) < 0, "qadam, dtype " << static_cast<int>(dtype) << ", decay " << weight_decay << ", tensor "
                                                          << i / 4 << " of " << numels[i / 4] << " elements, operand " << i % 4
                                                          << ": byte " << cuda[i].difference(cpu[i]) << " differs");
  }
}

// Rows of a mean that are aligned, that are not because the first is not, and that are not because of their size.
void test_mean(DType dtype, int64_t count, int64_t numel, int64_t distance, int kind) {
  const int bytes = kElementBytes[static_cast<int>(dtype)];
  Random random(31);
  Memory rows(count * numel * bytes, distance), cpu(numel * bytes, kind % 2 * distance), cuda(cpu);
  fill(rows, dtype, kind, random);
  accel::cpu::mean(dtype, rows.data(), count, cpu.data(), numel);
  accel::cuda::mean(dtype, rows.data(), count, cuda.data(), numel, nullptr);
  CHECK(cuda.difference(cpu) < 0, "mean of " << count << ", dtype " << static_cast<int>(dtype) << ", " << numel << " elements at "
                                             << distance << ", kind " << kind << ": byte " << cuda.difference(cpu) << " differs");
}

// `odd` is the one operand of four that lies at `distance`.
void test_ring_difference(DType dtype, int64_t numel, int64_t distance, int odd, int kind) {
  const int bytes = kElementBytes[static_cast<int>(dtype)];
  Random random(37);
  std::vector<Memory> cpu;  // x, w, left, right
  for (int operand = 0; operand < 4; ++operand) {
    Memory memory(numel * bytes, operand == odd ? distance : 0);
    fill(memory, dtype, kind, random);
    cpu.push_back(memory);
  }
  std::vector<Memory> cuda(cpu);
  accel::cpu::ring_difference(dtype, cpu[0].data(), cpu[1].data(), cpu[2].data(), cpu[3].data(), numel);
  accel::cuda::ring_difference(dtype, cuda[0].data(), cuda[1].data(), cuda[2].data(), cuda[3].data(), numel, nullptr);
  for (int operand = 0; operand < 4; ++operand) {
    CHECK(cuda[operand].difference(cpu[operand]) < 0,
          "ring_difference, dtype " << static_cast<int>(dtype) << ", " << numel << " elements, operand " << odd << " at "
                                    << distance << ", kind " << kind << ": operand " << operand << " differs");
  }
}

}  // namespace

int main() {
  for (int id = 0; id < kNumCodecs; ++id) {
    const CodecId codec = static_cast<CodecId>(id);
    for (int type = 0; type < kNumDTypes; ++type) {
      const DType dtype = static_cast<DType>(type);
      for (int kind = 0; kind < kNumKinds; ++kind) {
        test({several(codec, dtype), 0, kind, true});
      }
      for (const int64_t distance : kDistances) {
        for (const int64_t shift : {0, 1}) {
          if (distance % kElementBytes[type] == 0) {
            test({Plan(codec, dtype, {0}, {512 + 77}, {0}, {shift}), distance, 0, true});
          }
        }
      }
      for (const int64_t numel : {31, 32, 33, 127, 128, 255, 384, 385, 511}) {
        test({Plan(codec, dtype, {0}, {numel}, {0}), 0, 3, false});
      }
    }
  }
  // More blocks than warps, and many segments: the same in all codecs.
  test({Plan(CodecId::kSign, DType::kBFloat16, {0}, {300 * 512 + 5}, {0}), 0, 0, false});
  const std::vector<int64_t> numels(1100, 2), wire_offsets(1100, -1);
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < 1100; ++i) {
    offsets.push_back(2 * i);
  }
  test({Plan(CodecId::kInt8, DType::kFloat32, offsets, numels, wire_offsets), 0, 0, false});
  for (int type = 0; type < kNumDTypes; ++type) {
    test_qadam(static_cast<DType>(type), 0.0);
    test_qadam(static_cast<DType>(type), 0.1);
  }
  // More blocks than warps; whole blocks of which only some rows are aligned; what is left over.
  for (const int64_t numel : {0, 1, 33, 511, 512, 513, 2 * 512 + 4, 300 * 512 + 77}) {
    for (int type = 0; type < kNumDTypes; ++type) {
      const DType dtype = static_cast<DType>(type);
      for (const int64_t distance : kDistances) {
        if (distance % kElementBytes[type] == 0) {
          for (const int64_t count : {1, 2, 3}) {
            for (int kind = 0; kind < (numel < 10'000 ? kNumKinds : 1); ++kind) {
              test_mean(dtype, count, numel, distance, kind);
            }
          }
          if (dtype == DType::kFloat32 || dtype == DType::kFloat64) {
            for (int kind = 0; kind < (numel < 10'000 ? kNumKinds : 1); ++kind) {
              test_ring_difference(dtype, numel, distance, kind % 4, kind);
            }
          }
        }
      }
    }
  }
  return check::report("test_cuda_emulated");
}
