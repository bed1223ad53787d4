// QAdam's two passes. Tensors come as tuples of addresses and a number of elements.
#include <pybind11/stl.h>

#include <tuple>

#include "lightning_accel/check.h"
#include "lightning_accel/qadam.h"
#include "register.h"

namespace py = pybind11;

namespace accel {
namespace {

using FoldTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;
using StepTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_numel(int64_t numel) { ACCEL_CHECK(numel >= 0, "a tensor must not have " << numel << " elements"); }

}  // namespace

void register_qadam(py::module_& module) {
  module.def(
      "qadam_fold",
      [](int dtype, const std::vector<FoldTuple>& tuples, double beta1, double weight_decay, int threads, bool is_cuda,
         uintptr_t stream) {
        std::vector<FoldTensor> tensors;
        for (const auto& [gradient, momentum, parameter, numel] : tuples) {
          check_numel(numel);
          tensors.push_back({at<void>(gradient), at<const void>(momentum), at<const void>(parameter), numel});
        }
        const FoldScalars scalars{beta1, weight_decay};
        py::gil_scoped_release release;
        if (!is_cuda) {
          cpu::fold(static_cast<DType>(dtype), tensors, scalars, threads);
          return;
        }
#if defined(ACCEL_WITH_CUDA)
        cuda::fold(static_cast<DType>(dtype), tensors, scalars, at<void>(stream));
#else
        (void)stream;
        ACCEL_CHECK(false, "this build of lightning_accel has no CUDA kernels; build it where nvcc is found (ACCEL_CUDA=ON)");
#endif
      },
      py::arg("dtype"), py::arg("tensors"), py::arg("beta1"), py::arg("weight_decay"), py::arg("threads"), py::arg("is_cuda"),
      py::arg("stream"));

  module.def(
      "qadam_step",
      [](int dtype, const std::vector<StepTuple>& tuples, double step_size, double correction, double eps, double decay,
         int threads, bool is_cuda, uintptr_t stream) {
        std::vector<StepTensor> tensors;
        for (const auto& [gradient, momentum, variance, parameter, numel] : tuples) {
          check_numel(numel);
          tensors.push_back({at<const void>(gradient), at<void>(momentum), at<const void>(variance), at<void>(parameter), numel});
        }
        const StepScalars scalars{step_size, correction, eps, decay};
        py::gil_scoped_release release;
        if (!is_cuda) {
          cpu::step(static_cast<DType>(dtype), tensors, scalars, threads);
          return;
        }
#if defined(ACCEL_WITH_CUDA)
        cuda::step(static_cast<DType>(dtype), tensors, scalars, at<void>(stream));
#else
        (void)stream;
        ACCEL_CHECK(false, "this build of lightning_accel has no CUDA kernels; build it where nvcc is found (ACCEL_CUDA=ON)");
#endif
      },
      py::arg("dtype"), py::arg("tensors"), py::arg("step_size"), py::arg("correction"), py::arg("eps"), py::arg("decay"),
      py::arg("threads"), py::arg("is_cuda"), py::arg("stream"));
}

}  // namespace accel
