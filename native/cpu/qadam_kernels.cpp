// QAdam's two passes over elements. Compiled once for each instruction set, as kernels.cpp is.
#include "kernels.h"

#include "spans.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

// Calls body(start, length) for each chunk of [begin, end); length is kChunk, known to the compiler, for all but the last.
template <class Body>
ACCEL_INLINE void for_each_chunk(int64_t begin, int64_t end, Body body) {
  for (; begin + kChunk <= end; begin += kChunk) {
    body(begin, kChunk);
  }
  if (begin < end) {
    body(begin, static_cast<int>(end - begin));
  }
}

template <bool kHasDecay, class Tensor>
void fold_as(const FoldTensor& tensor, int64_t begin, int64_t end, const FoldScalars& scalars) {
  using Value = typename ValueOf<Tensor>::type;
  const Fold<Value> fold(scalars);
  auto* gradient = static_cast<Tensor*>(tensor.gradient);
  const auto* momentum = static_cast<const Tensor*>(tensor.momentum);
  const auto* parameter = static_cast<const Tensor*>(tensor.parameter);
  for_each_chunk(begin, end, [&](int64_t start, int length) {
    Value buffers[3][kChunk];
    const Value* g = load_span(gradient + start, length, buffers[0]);
    const Value* m = load_span(momentum + start, length, buffers[1]);
    const Value* x = kHasDecay ? load_span(parameter + start, length, buffers[2]) : m;
    Value results[kChunk];  // the tensor is read and written: not by one loop, which could take the two for apart
    for (int i = 0; i < length; ++i) {
      results[i] = fold.template apply<kHasDecay>(g[i], m[i], x[i]);
    }
    store_span([&](int i) { return results[i]; }, length, gradient + start);
  });
}

template <class Tensor>
void step_as(const StepTensor& tensor, int64_t begin, int64_t end, const StepScalars& scalars) {
  using Value = typename ValueOf<Tensor>::type;
  const Step<Value> step(scalars);
  const auto* gradient = static_cast<const Tensor*>(tensor.gradient);
  auto* momentum = static_cast<Tensor*>(tensor.momentum);
  const auto* variance = static_cast<const Tensor*>(tensor.variance);
  auto* parameter = static_cast<Tensor*>(tensor.parameter);
  for_each_chunk(begin, end, [&](int64_t start, int length) {
    Value buffers[3][kChunk];
    const Value* m = load_span(gradient + start, length, buffers[0]);
    const Value* v = load_span(variance + start, length, buffers[1]);
    const Value* x = load_span(static_cast<const Tensor*>(parameter) + start, length, buffers[2]);
    Value results[kChunk];
    int finite = 0;
    for (int i = 0; i < length; ++i) {
      results[i] = step.apply(m[i], v[i], x[i]);
      finite += is_finite(m[i]);
    }
    if (finite == length) {
      memcpy(momentum + start, gradient + start, length * sizeof(Tensor));
    } else {
      for (int i = 0; i < length; ++i) {
        results[i] = is_finite(m[i]) ? results[i] : x[i];
        momentum[start + i] = is_finite(m[i]) ? gradient[start + i] : momentum[start + i];
      }
    }
    store_span([&](int i) { return results[i]; }, length, parameter + start);
  });
}

void fold(DType dtype, const FoldTensor& tensor, int64_t begin, int64_t end, const FoldScalars& scalars) {
  visit_dtype(dtype, [&](auto element) {
    using Tensor = typename decltype(element)::type;
    if (scalars.weight_decay != 0.0) {
      fold_as<true, Tensor>(tensor, begin, end, scalars);
    } else {
      fold_as<false, Tensor>(tensor, begin, end, scalars);
    }
  });
}

void step(DType dtype, const StepTensor& tensor, int64_t begin, int64_t end, const StepScalars& scalars) {
  visit_dtype(dtype, [&](auto element) { step_as<typename decltype(element)::type>(tensor, begin, end, scalars); });
}

}  // namespace

extern const QAdamKernels qadam_kernels{fold, step};

}  // namespace accel::cpu::ACCEL_ISA
