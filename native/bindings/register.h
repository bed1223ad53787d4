#pragma once

#include <pybind11/pybind11.h>

namespace accel {

void register_plan(pybind11::module_& module);
void register_codecs(pybind11::module_& module);
void register_peers(pybind11::module_& module);
void register_qadam(pybind11::module_& module);
void register_weights(pybind11::module_& module);
void register_build(pybind11::module_& module);

}  // namespace accel
