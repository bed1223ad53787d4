// As register_codecs.cpp: addresses and sizes are checked, the GIL is released.
#include "lightning_accel/check.h"
#include "lightning_accel/weights.h"
#include "register.h"

namespace py = pybind11;

namespace accel {
namespace {

void* memory_at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void check_memory(uintptr_t address, int64_t numel) {
  ACCEL_CHECK(numel >= 0, "the number of elements must not be negative, got " << numel);
  ACCEL_CHECK(address != 0 || numel == 0, "a buffer has no memory");
}

template <class OnCpu, class OnCuda>
void launch(bool is_cuda, OnCpu on_cpu, OnCuda on_cuda) {
  py::gil_scoped_release release;
  is_cuda ? on_cuda() : on_cpu();
}

#if defined(ACCEL_WITH_CUDA)
#define ACCEL_ON_CUDA(call) [&] { call; }
#else
#define ACCEL_ON_CUDA(call) \
  [] { ACCEL_CHECK(false, "this build of lightning_accel has no CUDA kernels; build it where nvcc is found (ACCEL_CUDA=ON)"); }
#endif

}  // namespace

void register_weights(py::module_& module) {
  module.def(
      "mean",
      [](int dtype, uintptr_t rows, int64_t count, uintptr_t out, int64_t numel, bool is_cuda, uintptr_t stream) {
        ACCEL_CHECK(count >= 1, "at least one row is needed, got " << count);
        check_memory(rows, numel);
        check_memory(out, numel);
        const DType type = static_cast<DType>(dtype);
        launch(
            is_cuda, [&] { cpu::mean(type, memory_at(rows), count, memory_at(out), numel); },
            ACCEL_ON_CUDA(cuda::mean(type, memory_at(rows), count, memory_at(out), numel, memory_at(stream))));
        (void)stream;
      },
      py::arg("dtype"), py::arg("rows"), py::arg("count"), py::arg("out"), py::arg("numel"), py::arg("is_cuda"),
      py::arg("stream"));

  module.def(
      "ring_difference",
      [](int dtype, uintptr_t x, uintptr_t w, uintptr_t left, uintptr_t right, int64_t numel, bool is_cuda, uintptr_t stream) {
        for (const uintptr_t address : {x, w, left, right}) {
          check_memory(address, numel);
        }
        const DType type = static_cast<DType>(dtype);
        launch(
            is_cuda, [&] { cpu::ring_difference(type, memory_at(x), memory_at(w), memory_at(left), memory_at(right), numel); },
            ACCEL_ON_CUDA(cuda::ring_difference(type, memory_at(x), memory_at(w), memory_at(left), memory_at(right), numel,
                                                memory_at(stream))));
        (void)stream;
      },
      py::arg("dtype"), py::arg("x"), py::arg("w"), py::arg("left"), py::arg("right"), py::arg("numel"), py::arg("is_cuda"),
      py::arg("stream"));
}

}  // namespace accel
