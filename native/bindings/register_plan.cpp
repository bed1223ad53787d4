#include <pybind11/stl.h>

#include "lightning_accel/plan.h"
#include "register.h"

namespace py = pybind11;

namespace accel {

void register_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan")
      .def(py::init([](int codec, int dtype, const std::vector<int64_t>& tensor_offsets, const std::vector<int64_t>& numels,
                       const std::vector<int64_t>& wire_offsets, const std::vector<int64_t>& residual_offsets) {
             return Plan(static_cast<CodecId>(codec), static_cast<DType>(dtype), tensor_offsets, numels, wire_offsets,
                         residual_offsets);
           }),
           py::arg("codec"), py::arg("dtype"), py::arg("tensor_offsets"), py::arg("numels"), py::arg("wire_offsets"),
           py::arg("residual_offsets"))
      .def_property_readonly("wire_bytes", &Plan::wire_bytes)
      .def_property_readonly("tensor_numel", &Plan::tensor_numel)
      .def_property_readonly("residual_numel", &Plan::residual_numel)
      .def_property_readonly("num_blocks", &Plan::num_blocks)
      .def_property_readonly("wire_offsets",
                             [](const Plan& plan) {
                               std::vector<int64_t> offsets;
                               for (const Segment& segment : plan.segments()) {
                                 offsets.push_back(segment.wire_offset);
                               }
                               return offsets;
                             })
      .def("segment_table", [](const Plan& plan) {
        const auto& segments = plan.segments();
        return py::bytes(reinterpret_cast<const char*>(segments.data()), segments.size() * sizeof(Segment));
      });
}

}  // namespace accel
