// The kernels of weights.cpp for each instruction set; instruction_set.cpp chooses among them.
#pragma once

#include "lightning_accel/weights.h"

namespace accel::cpu {

namespace baseline {
extern const WeightKernels weight_kernels;
}
namespace avx2 {
extern const WeightKernels weight_kernels;
}
namespace avx512 {
extern const WeightKernels weight_kernels;
}

}  // namespace accel::cpu
