// Means and differences of weights. Compiled once for each instruction set, as kernels.cpp is; internal linkage throughout.
#include "kernels.h"

namespace accel::cpu::ACCEL_ISA {
namespace {

constexpr int kChunk = 128;  // elements; their sums stay in the first cache while all rows are added to them

template <class T>
ACCEL_INLINE void load_row(const T* __restrict__ row, int numel, MeanValue<T>* __restrict__ values) {
  for (int i = 0; i < numel; ++i) {
    values[i] = load_for_mean(row[i]);
  }
}

template <class T>
ACCEL_INLINE void store_row(const MeanValue<T>* __restrict__ values, int numel, T* __restrict__ row) {
  for (int i = 0; i < numel; ++i) {
    row[i] = store_mean<T>(values[i]);
  }
}

template <class T>
void mean_of(const T* rows, int64_t count, T* out, int64_t numel) {
  for (int64_t start = 0; start < numel; start += kChunk) {
    const int length = numel - start < kChunk ? static_cast<int>(numel - start) : kChunk;
    MeanValue<T> sums[kChunk];
    load_row(rows + start, length, sums);
    for (int64_t k = 1; k < count; ++k) {
      MeanValue<T> values[kChunk];
      load_row(rows + k * numel + start, length, values);
      for (int i = 0; i < length; ++i) {
        sums[i] += values[i];
      }
    }
    for (int i = 0; i < length; ++i) {
      sums[i] /= static_cast<MeanValue<T>>(count);
    }
    store_row(sums, length, out + start);
  }
}

template <class T>
void ring_difference_of(T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ left, const T* __restrict__ right,
                        int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    x[i] = accel::ring_difference(x[i], w[i], left[i], right[i]);
  }
}

void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    mean_of(static_cast<const T*>(rows), count, static_cast<T*>(out), numel);
  });
}

void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel) {
  visit_replica_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    ring_difference_of(static_cast<T*>(x), static_cast<const T*>(w), static_cast<const T*>(left), static_cast<const T*>(right),
                       numel);
  });
}

}  // namespace

extern const WeightKernels weight_kernels{mean, ring_difference};

}  // namespace accel::cpu::ACCEL_ISA
