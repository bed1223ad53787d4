// QAdam's two passes on the GPU: the arithmetic of lightning_accel/qadam.h, so to the bit what the CPU does.
//
// Each warp takes blocks of 512 elements, 16 a lane (block.cuh), whatever tensor they are of; the tensors' addresses come with
// the launch, so nothing is copied to the GPU beforehand. Memory traffic is all that these passes cost: each operand is moved
// once, 16 bytes a lane where all operands are aligned for it.
#include <cstdint>

#include "block.cuh"
#include "launch.cuh"
#include "lightning_accel/codec_cast.h"
#include "lightning_accel/dispatch.h"
#include "lightning_accel/qadam.h"

namespace accel::cuda {
namespace {

constexpr int kTableTensors = 64;  // of one launch: a kernel's arguments may have 4 KiB

// Tensors with elements, and how many blocks those before each have.
template <class Tensor>
struct Table {
  Tensor tensors[kTableTensors];
  int64_t first_blocks[kTableTensors];
  int count = 0;
  int64_t num_blocks = 0;

  void add(const Tensor& tensor) {
    tensors[count] = tensor;
    first_blocks[count] = num_blocks;
    ++count;
    num_blocks += accel::num_blocks(tensor.numel);
  }
};
static_assert(sizeof(Table<StepTensor>) + sizeof(Step<double>) <= 4096, "a kernel's arguments");

// Calls launch(table) until all tensors have been in one.
template <class Tensor, class Launch>
void for_each_table(const std::vector<Tensor>& tensors, Launch launch) {
  Table<Tensor> table;
  for (const Tensor& tensor : tensors) {
    if (tensor.numel == 0) {
      continue;
    }
    if (table.count == kTableTensors) {
      launch(table);
      table = {};
    }
    table.add(tensor);
  }
  launch(table);
}

// Calls body(tensor, start, numel) for this warp's blocks: elements start, start + 1 ... of a tensor.
template <class Tensor, class Body>
__device__ __forceinline__ void for_each_block(const Table<Tensor>& table, Body body) {
  for_each_index(table.num_blocks, [&](int64_t i) {
    int first = 0;  // the last tensor that starts at block i or before is one of `count` from this one on
    for (int count = table.count; count > 1;) {
      const int half = count / 2;
      const bool is_before = table.first_blocks[first + half] <= i;
      first += is_before ? half : 0;
      count = is_before ? count - half : half;
    }
    const Tensor& tensor = table.tensors[first];
    const int64_t block = i - table.first_blocks[first];
    body(tensor, block * kBlockNumel, block_numel(tensor.numel, block));
  });
}

// gradient <- beta1 momentum + (1 - beta1) (gradient + weight_decay parameter). Reads 3 operands, 2 without decay, and writes 1.
template <class T, bool kHasDecay>
__global__ void __launch_bounds__(kThreads) fold_kernel(Table<FoldTensor> table, Fold<typename ValueOf<T>::type> fold) {
  using Value = typename ValueOf<T>::type;
  for_each_block(table, [&](const FoldTensor& tensor, int64_t start, int numel) {
    T* gradient = static_cast<T*>(tensor.gradient) + start;
    const T* momentum = static_cast<const T*>(tensor.momentum) + start;
    const T* parameter = kHasDecay ? static_cast<const T*>(tensor.parameter) + start : nullptr;
    constexpr int kWidest = kVectorBytes / sizeof(T);
    const bool are_aligned = is_aligned<kWidest>(gradient) && is_aligned<kWidest>(momentum) && is_aligned<kWidest>(parameter);
    with_width<kWidest>(numel, are_aligned, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      T g[kLaneNumel], m[kLaneNumel], x[kLaneNumel];
      load<kWidth>(gradient, numel, g);
      load<kWidth>(momentum, numel, m);
      if constexpr (kHasDecay) {
        load<kWidth>(parameter, numel, x);
      }
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        const Value of_parameter = kHasDecay ? load_value<Value>(x[i]) : Value{0};
        g[i] = store_value<T>(fold.template apply<kHasDecay>(load_value<Value>(g[i]), load_value<Value>(m[i]), of_parameter));
      }
      store<kWidth>(gradient, numel, g);
    });
  });
}

// momentum <- gradient, parameter <- parameter decay - step_size (gradient / (sqrt(variance) / correction + eps)). Reads 3
// operands and writes 2.
template <class T>
__global__ void __launch_bounds__(kThreads) step_kernel(Table<StepTensor> table, Step<typename ValueOf<T>::type> step) {
  using Value = typename ValueOf<T>::type;
  for_each_block(table, [&](const StepTensor& tensor, int64_t start, int numel) {
    const T* gradient = static_cast<const T*>(tensor.gradient) + start;
    T* momentum = static_cast<T*>(tensor.momentum) + start;
    const T* variance = static_cast<const T*>(tensor.variance) + start;
    T* parameter = static_cast<T*>(tensor.parameter) + start;
    constexpr int kWidest = kVectorBytes / sizeof(T);
    const bool are_aligned = is_aligned<kWidest>(gradient) && is_aligned<kWidest>(momentum) && is_aligned<kWidest>(variance) &&
                             is_aligned<kWidest>(parameter);
    with_width<kWidest>(numel, are_aligned, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      T m[kLaneNumel], v[kLaneNumel], x[kLaneNumel];
      load<kWidth>(gradient, numel, m);
      load<kWidth>(variance, numel, v);
      load<kWidth>(parameter, numel, x);
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        const Value of_gradient = load_value<Value>(m[i]), of_parameter = load_value<Value>(x[i]);
        const bool is_used = is_finite(of_gradient);
        x[i] = store_value<T>(is_used ? step.apply(of_gradient, load_value<Value>(v[i]), of_parameter) : of_parameter);
        if (!is_used && has_element<kWidth>(i, numel)) {
          m[i] = momentum[element<kWidth>(i)];  // rare: not read otherwise
        }
      }
      store<kWidth>(momentum, numel, m);
      store<kWidth>(parameter, numel, x);
    });
  });
}

}  // namespace

void fold(DType dtype, const std::vector<FoldTensor>& tensors, const FoldScalars& scalars, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const Fold<typename ValueOf<T>::type> fold(scalars);
    for_each_table(tensors, [&](const Table<FoldTensor>& table) {
      launch_blocks(scalars.weight_decay != 0.0 ? fold_kernel<T, true> : fold_kernel<T, false>, table.num_blocks, stream, table,
                    fold);
    });
  });
}

void step(DType dtype, const std::vector<StepTensor>& tensors, const StepScalars& scalars, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const Step<typename ValueOf<T>::type> step(scalars);
    for_each_table(tensors,
                   [&](const Table<StepTensor>& table) { launch_blocks(step_kernel<T>, table.num_blocks, stream, table, step); });
  });
}

}  // namespace accel::cuda
