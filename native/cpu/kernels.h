// The kernels of one instruction set; instruction_set.cpp chooses among them.
#pragma once

#include "lightning_accel/codecs.h"
#include "lightning_accel/qadam.h"
#include "lightning_accel/weights.h"

namespace accel::cpu {

struct Kernels {
  void (*encode)(const Plan&, const void* tensor, uint8_t* wire, const Residuals&);
  void (*decode)(const Plan&, const uint8_t* wire, void* tensor);
  void (*decode_accumulate)(const Plan&, const uint8_t* wire, void* accumulator);
  void (*decode_sum_encode)(const Plan&, const Messages&, float divisor, uint8_t* wire, const Residuals&);
};

// Elements `begin` to `end` of a tensor.
struct QAdamKernels {
  void (*fold)(DType, const FoldTensor&, int64_t begin, int64_t end, const FoldScalars&);
  void (*step)(DType, const StepTensor&, int64_t begin, int64_t end, const StepScalars&);
};

struct WeightKernels {
  void (*mean)(DType, const void* rows, int64_t count, void* out, int64_t numel);
  void (*ring_difference)(DType, void* x, const void* w, const void* left, const void* right, int64_t numel);
};

namespace baseline {
extern const Kernels kernels;
extern const QAdamKernels qadam_kernels;
extern const WeightKernels weight_kernels;
}  // namespace baseline
namespace avx2 {
extern const Kernels kernels;
extern const QAdamKernels qadam_kernels;
extern const WeightKernels weight_kernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kernels;
extern const QAdamKernels qadam_kernels;
extern const WeightKernels weight_kernels;
}  // namespace avx512

// The kernels in use.
const Kernels& kernels();
const QAdamKernels& qadam_kernels();
const WeightKernels& weight_kernels();

}  // namespace accel::cpu
