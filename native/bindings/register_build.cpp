// What this build holds, and what of it this machine runs.
#include <pybind11/stl.h>

#include "lightning_accel/codecs.h"
#include "register.h"

namespace py = pybind11;

namespace accel {

void register_build(py::module_& module) {
  module.attr("BLOCK_NUMEL") = kBlockNumel;
  module.attr("WIRE_ALIGNMENT") = kWireAlignment;
#if defined(ACCEL_WITH_CUDA)
  module.attr("CUDA_ARCHITECTURES") = ACCEL_CUDA_ARCHITECTURES;
#else
  module.attr("CUDA_ARCHITECTURES") = "";
#endif
  module.def("instruction_sets", &cpu::instruction_sets);
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"));
}

}  // namespace accel
