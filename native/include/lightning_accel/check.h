// Checked preconditions and CUDA calls: they throw, with the values; they never print and never exit.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

// Throws std::invalid_argument (a ValueError in Python) with the message streamed after the condition.
#define ACCEL_CHECK(condition, message)                      \
  do {                                                       \
    if (!(condition)) {                                      \
      std::ostringstream accel_check_stream;                 \
      accel_check_stream << message;                         \
      throw std::invalid_argument(accel_check_stream.str()); \
    }                                                        \
  } while (false)

#if defined(ACCEL_WITH_CUDA)
#include <cuda_runtime_api.h>

// Throws std::runtime_error with CUDA's own name and text of the error.
#define ACCEL_CUDA_CHECK(call)                                                                                                  \
  do {                                                                                                                          \
    const cudaError_t accel_cuda_error = (call);                                                                                \
    if (accel_cuda_error != cudaSuccess) {                                                                                      \
      std::ostringstream accel_check_stream;                                                                                    \
      accel_check_stream << #call << " failed at " << __FILE__ << ":" << __LINE__ << ": " << cudaGetErrorName(accel_cuda_error) \
                         << ": " << cudaGetErrorString(accel_cuda_error);                                                       \
      throw std::runtime_error(accel_check_stream.str());                                                                       \
    }                                                                                                                           \
  } while (false)
#endif
