// QAdam after warm-up: two passes over a parameter, one before its momentum travels and one after.
//
//   fold:  g <- beta1 m + (1 - beta1) (g + weight_decay x)                          in backward: g becomes this rank's momentum
//   step:  m <- g,  x <- decay x - step_size * (m / (sqrt(v) / correction + eps))   in the step: g is the mean of all ranks'
//
// v is the variance as it was when it was frozen. Where g is not finite, step leaves m and x as they are. Values are float,
// double for float64; each operation rounds once, so CPU and GPU write the same bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "lightning_accel/dispatch.h"

namespace accel {

struct FoldScalars {
  double beta1;
  double weight_decay;  // 0 where it is decoupled, or none
};

struct StepScalars {
  double step_size;   // learning rate / (1 - beta1^t)
  double correction;  // sqrt(1 - beta2^T), T the step at which v was frozen
  double eps;
  double decay;  // 1 - learning rate * decoupled weight decay
};

// Operands of one parameter, each `numel` elements of the same dtype. They do not overlap.
struct FoldTensor {
  void* gradient;
  const void* momentum;
  const void* parameter;
  int64_t numel;
};

struct StepTensor {
  const void* gradient;
  void* momentum;
  const void* variance;
  void* parameter;
  int64_t numel;
};

template <class Value>
struct Fold {
  Value beta1, rest, weight_decay;

  ACCEL_MEMBER explicit Fold(const FoldScalars& scalars)
      : beta1(static_cast<Value>(scalars.beta1)),
        rest(static_cast<Value>(1.0 - scalars.beta1)),
        weight_decay(static_cast<Value>(scalars.weight_decay)) {}

  // Without weight decay x is not looked at: it may be Inf.
  template <bool kHasDecay>
  ACCEL_MEMBER Value apply(Value gradient, Value momentum, Value parameter) const {
    const Value decayed = kHasDecay ? gradient + weight_decay * parameter : gradient;
    return beta1 * momentum + rest * decayed;
  }
};

template <class Value>
struct Step {
  Value step_size, correction, eps, decay;

  ACCEL_MEMBER explicit Step(const StepScalars& scalars)
      : step_size(static_cast<Value>(scalars.step_size)),
        correction(static_cast<Value>(scalars.correction)),
        eps(static_cast<Value>(scalars.eps)),
        decay(static_cast<Value>(scalars.decay)) {}

  ACCEL_MEMBER Value apply(Value momentum, Value variance, Value parameter) const {
    const Value denominator = square_root(variance) / correction + eps;
    return parameter * decay - step_size * (momentum / denominator);
  }
};

namespace cpu {

// On up to `threads` threads, where there is work for them.
void fold(DType dtype, const std::vector<FoldTensor>& tensors, const FoldScalars& scalars, int threads);
void step(DType dtype, const std::vector<StepTensor>& tensors, const StepScalars& scalars, int threads);

}  // namespace cpu

#if defined(ACCEL_WITH_CUDA)
namespace cuda {

// Enqueued on `stream`, many tensors a launch.
void fold(DType dtype, const std::vector<FoldTensor>& tensors, const FoldScalars& scalars, void* stream);
void step(DType dtype, const std::vector<StepTensor>& tensors, const StepScalars& scalars, void* stream);

}  // namespace cuda
#endif

}  // namespace accel
