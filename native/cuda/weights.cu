// Means and differences of weights on the GPU: a thread an element, neighbours side by side, as many rounds as it takes. Memory
// is what they cost: a warp's accesses are whole lines. Any grid gives the same bits.
#include "lightning_accel/weights.h"

#include "lightning_accel/check.h"

namespace accel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostThreadBlocks = int64_t{1} << 16;

template <class Body>
__device__ __forceinline__ void for_each_element(int64_t numel, Body body) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < numel; i += int64_t{gridDim.x} * kThreads) {
    body(i);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const T* __restrict__ rows, int64_t count, T* __restrict__ out, int64_t numel) {
  for_each_element(numel, [=](int64_t i) {
    MeanValue<T> sum = load_for_mean(rows[i]);
    for (int64_t k = 1; k < count; ++k) {
      sum += load_for_mean(rows[k * numel + i]);
    }
    out[i] = store_mean<T>(sum / static_cast<MeanValue<T>>(count));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    ring_difference_kernel(T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ left, const T* __restrict__ right,
                           int64_t numel) {
  for_each_element(numel, [=](int64_t i) { x[i] = accel::ring_difference(x[i], w[i], left[i], right[i]); });
}

// Enqueues kernel(arguments..., numel); nothing for no elements.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), void* stream, int64_t numel, Arguments... arguments) {
  if (numel == 0) {
    return;
  }
  const int64_t wanted = (numel + kThreads - 1) / kThreads;
  const unsigned thread_blocks = static_cast<unsigned>(wanted < kMostThreadBlocks ? wanted : kMostThreadBlocks);
  kernel<<<thread_blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments..., numel);
  ACCEL_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel, void* stream) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    launch(mean_kernel<T>, stream, numel, static_cast<const T*>(rows), count, static_cast<T*>(out));
  });
}

void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel, void* stream) {
  visit_replica_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    launch(ring_difference_kernel<T>, stream, numel, static_cast<T*>(x), static_cast<const T*>(w), static_cast<const T*>(left),
           static_cast<const T*>(right));
  });
}

}  // namespace accel::cuda
