// The four operations on messages. The CPU's and the GPU's write the same bytes.
//
// Tensors hold plan.dtype(); `accumulator` holds float, or double where codec `none` meets float64. Pointers to tensors need the
// alignment of their element only, pointers to messages 16 bytes. Buffers must not overlap unless a function allows it. All
// functions are reentrant.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lightning_accel/plan.h"

namespace accel {

// A sum of messages that lie `stride_bytes` apart and share one plan's layout.
struct Messages {
  const uint8_t* wire;
  int64_t count;
  int64_t stride_bytes;
};

// Error feedback: what a code loses is kept and added to the next value that is coded there.
//
//   v = x + old,  wire = code of v,  updated = v - value of wire
//
// Where v - value of wire is not finite, above all in a poisoned scale group, updated = old. Both hold float, may be the same
// memory, and are indexed by the segments' residual offsets. Without error feedback both are null.
struct Residuals {
  const float* old = nullptr;
  float* updated = nullptr;
};

namespace cpu {

// wire <- code of tensor. Padding is left as it is.
void encode(const Plan& plan, const void* tensor, uint8_t* wire, const Residuals& residuals = {});
// tensor <- value of wire.
void decode(const Plan& plan, const uint8_t* wire, void* tensor);
// accumulator <- accumulator + value of wire; accumulator is indexed like the tensor.
void decode_accumulate(const Plan& plan, const uint8_t* wire, void* accumulator);
// wire <- code of (value of messages[0] + value of messages[1] + ...) / divisor, summed in this order. `wire` may be one of the
// messages: a block is written after it has been read from all of them.
void decode_sum_encode(const Plan& plan, const Messages& messages, float divisor, uint8_t* wire, const Residuals& residuals = {});

// "baseline", "avx2", "avx512": those this build has and this machine can run, worst first.
std::vector<std::string> instruction_sets();
// The one in use: the best, unless use_instruction_set chose another (tests compare them; not thread-safe).
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace cpu

#if defined(ACCEL_WITH_CUDA)
namespace cuda {

// As on the CPU, with device pointers; `segments` is plan.segments() on the device. Enqueued on `stream` (a cudaStream_t) of the
// current device; nothing is allocated and nothing synchronised.
// @throws std::runtime_error when a launch is refused.
void encode(const Plan& plan, const Segment* segments, const void* tensor, uint8_t* wire, const Residuals& residuals,
            void* stream);
void decode(const Plan& plan, const Segment* segments, const uint8_t* wire, void* tensor, void* stream);
void decode_accumulate(const Plan& plan, const Segment* segments, const uint8_t* wire, void* accumulator, void* stream);
void decode_sum_encode(const Plan& plan, const Segment* segments, const Messages& messages, float divisor, uint8_t* wire,
                       const Residuals& residuals, void* stream);

}  // namespace cuda
#endif

}  // namespace accel
