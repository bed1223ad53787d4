// The kernels of one instruction set; instruction_set.cpp chooses among them.
#pragma once

#include "lightning_accel/codecs.h"

namespace accel::cpu {

struct Kernels {
  void (*encode)(const Plan&, const void* tensor, uint8_t* wire, const Residuals&);
  void (*decode)(const Plan&, const uint8_t* wire, void* tensor);
  void (*decode_accumulate)(const Plan&, const uint8_t* wire, void* accumulator);
  void (*decode_sum_encode)(const Plan&, const Messages&, float divisor, uint8_t* wire, const Residuals&);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace accel::cpu
