// Means and differences of weights on the GPU: the arithmetic of lightning_accel/weights.h, so to the bit what the CPU does.
//
// Each warp takes blocks of 512 elements, 16 a lane (block.cuh). Memory traffic is all that these passes cost: each operand is
// moved once, 16 bytes a lane where all of them are aligned for it.
#include "lightning_accel/weights.h"

#include "block.cuh"
#include "launch.cuh"

namespace accel::cuda {
namespace {

// Calls body(start, numel) for this warp's blocks: elements start, start + 1 ... of a buffer.
template <class Body>
__device__ __forceinline__ void for_each_block(int64_t numel, Body body) {
  for_each_index(num_blocks(numel), [=](int64_t block) { body(block * kBlockNumel, block_numel(numel, block)); });
}

// out <- (row 0 + row 1 + ...) / count. A row is aligned as the first two are.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const T* __restrict__ rows, int64_t count, T* __restrict__ out, int64_t numel) {
  constexpr int kWidest = kVectorBytes / sizeof(T);
  const bool are_aligned = is_aligned<kWidest>(rows) && is_aligned<kWidest>(rows + numel) && is_aligned<kWidest>(out);
  for_each_block(numel, [=](int64_t start, int block_numel) {
    with_width<kWidest>(block_numel, are_aligned, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      T items[kLaneNumel];
      load<kWidth>(rows + start, block_numel, items);
      MeanValue<T> sums[kLaneNumel];
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        sums[i] = load_for_mean(items[i]);
      }
      for (int64_t k = 1; k < count; ++k) {
        load<kWidth>(rows + k * numel + start, block_numel, items);
#pragma unroll
        for (int i = 0; i < kLaneNumel; ++i) {
          sums[i] += load_for_mean(items[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        items[i] = store_mean<T>(sums[i] / static_cast<MeanValue<T>>(count));
      }
      store<kWidth>(out + start, block_numel, items);
    });
  });
}

// x <- (x - w) + ((left - w) + (right - w)) / 3. Reads 4 operands and writes 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    ring_difference_kernel(T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ left, const T* __restrict__ right,
                           int64_t numel) {
  constexpr int kWidest = kVectorBytes / sizeof(T);
  const bool are_aligned =
      is_aligned<kWidest>(x) && is_aligned<kWidest>(w) && is_aligned<kWidest>(left) && is_aligned<kWidest>(right);
  for_each_block(numel, [=](int64_t start, int block_numel) {
    with_width<kWidest>(block_numel, are_aligned, [=](auto width) {
      constexpr int kWidth = decltype(width)::value;
      T of_x[kLaneNumel], of_w[kLaneNumel], of_left[kLaneNumel], of_right[kLaneNumel];
      load<kWidth>(x + start, block_numel, of_x);
      load<kWidth>(w + start, block_numel, of_w);
      load<kWidth>(left + start, block_numel, of_left);
      load<kWidth>(right + start, block_numel, of_right);
#pragma unroll
      for (int i = 0; i < kLaneNumel; ++i) {
        of_x[i] = accel::ring_difference(of_x[i], of_w[i], of_left[i], of_right[i]);
      }
      store<kWidth>(x + start, block_numel, of_x);
    });
  });
}

}  // namespace

void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    launch_blocks(mean_kernel<T>, num_blocks(numel), stream, static_cast<const T*>(rows), count, static_cast<T*>(out), numel);
  });
}

void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel, void* stream) {
  visit_replica_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    launch_blocks(ring_difference_kernel<T>, num_blocks(numel), stream, static_cast<T*>(x), static_cast<const T*>(w),
                  static_cast<const T*>(left), static_cast<const T*>(right), numel);
  });
}

}  // namespace accel::cuda
