// Registers the families; nothing else.
#include "register.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native kernels of lightning_accel. Private: use lightning_accel.codecs.";
  accel::register_plan(module);
  accel::register_codecs(module);
  accel::register_weights(module);
  accel::register_build(module);
}
