// Encode, decode and sum on the GPU: what cpu/kernels.cpp writes, by the same codec headers, so to the bit the same. A warp takes
// one block after another (operations.cuh).
#include <cstdint>

#include "launch.cuh"
#include "operations.cuh"

namespace accel::cuda {
namespace {

// ---- Kernels
//
// Grid: as launch.cuh makes it; any gives the same bytes.

template <class Codec, class Tensor, bool kHasFeedback>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(Blocks blocks, const Tensor* __restrict__ tensor, uint8_t* __restrict__ wire, Residuals residuals) {
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    encode_tensor<Codec, kHasFeedback>(segment, block, numel, tensor, wire, residuals);
  });
}

template <class Codec, class Tensor>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(Blocks blocks, const uint8_t* __restrict__ wire, Tensor* __restrict__ tensor) {
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    decode_tensor<Codec>(segment, block, numel, wire, tensor);
  });
}

// accumulator <- accumulator + value of wire; as decode_kernel, with the accumulator's elements read beside the codes. A GPU and
// a CPU make different NaNs of Inf - Inf: store_value makes them the canonical one.
template <class Codec>
__global__ void __launch_bounds__(kThreads)
    decode_accumulate_kernel(Blocks blocks, const uint8_t* __restrict__ wire, typename Codec::Value* __restrict__ accumulator) {
  using Value = typename Codec::Value;
  constexpr int kWidest = kDecodeWidth<Codec, Value>;
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    Value* target = accumulator + segment.tensor_offset + block * kBlockNumel;
    with_width<kWidest>(numel, is_aligned<kWidest>(target), [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      Coded<Codec, kWidth> coded;
      coded.load(wire, wire_offsets<Codec>(segment, block), numel);
      Value sums[kLaneNumel];
      load<kWidth>(target, numel, sums);
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        sums[i] = store_value<Value>(sums[i] + coded.value(i));
      }
      store<kWidth>(target, numel, sums);
    });
  });
}

template <class Codec, bool kHasFeedback>
__global__ void __launch_bounds__(kThreads)
    decode_sum_encode_kernel(Blocks blocks, Messages messages, Division<typename Codec::Value> division, uint8_t* wire,
                             Residuals residuals) {
  for_each_block(blocks, [=](const Segment& segment, int64_t block, int numel) {
    sum_messages<Codec, kHasFeedback>(segment, block, numel, messages, division, wire, residuals);
  });
}

// ---- Launchers

// Enqueues kernel(blocks of the plan, arguments...).
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Blocks, Parameters...), const Plan& plan, const Segment* segments, void* stream,
            Arguments... arguments) {
  const Blocks blocks{segments, static_cast<int>(plan.segments().size()), plan.num_blocks()};
  launch_blocks(kernel, plan.num_blocks(), stream, blocks, arguments...);
}

}  // namespace

void encode(const Plan& plan, const Segment* segments, const void* tensor, uint8_t* wire, const Residuals& residuals,
            void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Codec = typename decltype(codec)::type;
    using Tensor = typename decltype(element)::type;
    with_feedback<typename Codec::Value>(residuals, [&](auto feedback) {
      launch(encode_kernel<Codec, Tensor, decltype(feedback)::value>, plan, segments, stream, static_cast<const Tensor*>(tensor),
             wire, residuals);
    });
  });
}

void decode(const Plan& plan, const Segment* segments, const uint8_t* wire, void* tensor, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto element) {
    using Tensor = typename decltype(element)::type;
    launch(decode_kernel<typename decltype(codec)::type, Tensor>, plan, segments, stream, wire, static_cast<Tensor*>(tensor));
  });
}

void decode_accumulate(const Plan& plan, const Segment* segments, const uint8_t* wire, void* accumulator, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    using Codec = typename decltype(codec)::type;
    launch(decode_accumulate_kernel<Codec>, plan, segments, stream, wire, static_cast<typename Codec::Value*>(accumulator));
  });
}

void decode_sum_encode(const Plan& plan, const Segment* segments, const Messages& messages, float divisor, uint8_t* wire,
                       const Residuals& residuals, void* stream) {
  visit_codec(plan.codec(), plan.dtype(), [&](auto codec, auto) {
    using Codec = typename decltype(codec)::type;
    with_feedback<typename Codec::Value>(residuals, [&](auto feedback) {
      launch(decode_sum_encode_kernel<Codec, decltype(feedback)::value>, plan, segments, stream, messages,
             Division<typename Codec::Value>(divisor), wire, residuals);
    });
  });
}

}  // namespace accel::cuda
