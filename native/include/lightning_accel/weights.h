// Arithmetic on weights that replicas exchange, element by element. The CPU's and the GPU's give the same bits; every NaN becomes
// the canonical one, for machines make different ones.
//
// Pointers need the alignment of their element only. Buffers must not overlap unless a function allows it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lightning_accel/dispatch.h"

namespace accel {

// What a mean is computed in: float64, and float32 for 16-bit floats. Then the sum of equal weights is exact, up to thousands of
// ranks, and so their mean is the weight itself (of float64, up to its last place).
template <class T>
using MeanValue = std::conditional_t<sizeof(T) == 2, float, double>;

// One element of any type as a value of a mean, and back, rounded once.
template <class T>
ACCEL_INLINE MeanValue<T> load_for_mean(T x) {
  if constexpr (sizeof(T) == 2) {
    return Convert<T>::to_float(x);
  } else {
    return x;
  }
}
template <class T>
ACCEL_INLINE T store_mean(MeanValue<T> x) {
  if constexpr (sizeof(T) == 8) {
    return store_value<T>(x);
  } else {
    return Convert<T>::from_float(static_cast<float>(x));
  }
}

// (x - w) + ((left - w) + (right - w)) / 3. Differences first: zero, exactly, where all four are equal.
template <class T>
ACCEL_INLINE T ring_difference(T x, T w, T left, T right) {
  return store_value<T>((x - w) + ((left - w) + (right - w)) / T{3});
}

namespace cpu {

// out[i] <- (rows[0][i] + rows[1][i] + ...) / count, summed in this order; `rows` is count times numel elements.
void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel);
// x[i] <- ring_difference of x[i], w[i], left[i] and right[i]; float32 or float64.
void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel);

}  // namespace cpu

#if defined(ACCEL_WITH_CUDA)
namespace cuda {

// As on the CPU, enqueued on `stream` (a cudaStream_t).
void mean(DType dtype, const void* rows, int64_t count, void* out, int64_t numel, void* stream);
void ring_difference(DType dtype, void* x, const void* w, const void* left, const void* right, int64_t numel, void* stream);

}  // namespace cuda
#endif

// Calls visitor(Type<T>{}) for the two types in which replicas are kept.
template <class Visitor>
void visit_replica_dtype(DType dtype, Visitor&& visitor) {
  ACCEL_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64,
              "replicas are float32 or float64, got dtype " << static_cast<int>(dtype));
  dtype == DType::kFloat32 ? visitor(Type<float>{}) : visitor(Type<double>{});
}

}  // namespace accel
