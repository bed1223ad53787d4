// Registers the families; nothing else.
#include "register.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native kernels of lightning_accel. Private: use lightning_accel.codecs and lightning_accel.optim.";
  accel::register_plan(module);
  accel::register_codecs(module);
  accel::register_peers(module);
  accel::register_qadam(module);
  accel::register_weights(module);
  accel::register_build(module);
}
