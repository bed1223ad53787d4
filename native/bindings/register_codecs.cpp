// Checks what would corrupt memory, releases the GIL, calls the kernel. Tensors come as an address and a number of elements.
#include <pybind11/stl.h>

#include <memory>

#include "lightning_accel/check.h"
#include "lightning_accel/codecs.h"
#include "register.h"

namespace py = pybind11;

namespace accel {
namespace {

// Where the operands live: `segments` is 0 on the CPU and the address of the plan's table on the GPU.
struct Place {
  uintptr_t segments;
  uintptr_t stream;
};

void check_tensor(const Plan& plan, uintptr_t address, int64_t numel) {
  ACCEL_CHECK(numel >= plan.tensor_numel(),
              "the plan needs a tensor of at least " << plan.tensor_numel() << " elements, got " << numel);
  ACCEL_CHECK(address != 0 || plan.tensor_numel() == 0, "the tensor has no memory");
}

void check_wire(const Plan& plan, uintptr_t address, int64_t bytes, const char* name) {
  ACCEL_CHECK(bytes >= plan.wire_bytes(),
              "the plan needs a " << name << " of at least " << plan.wire_bytes() << " bytes, got " << bytes);
  ACCEL_CHECK((address != 0 || plan.wire_bytes() == 0) && address % kWireAlignment == 0,
              "the " << name << " must lie at a multiple of " << kWireAlignment << " bytes, got address " << address);
}

// Makes residuals of two addresses; both are 0 where there are none.
Residuals residuals_at(const Plan& plan, uintptr_t old, uintptr_t updated, int64_t numel) {
  ACCEL_CHECK((old == 0) == (updated == 0), "residuals need both memories, the old ones and the updated ones");
  ACCEL_CHECK(old == 0 || numel >= plan.residual_numel(),
              "the plan needs residuals of at least " << plan.residual_numel() << " elements, got " << numel);
  ACCEL_CHECK(old == 0 || plan.codec() != CodecId::kNone, "codec none loses nothing: it takes no residuals");
  return {reinterpret_cast<const float*>(old), reinterpret_cast<float*>(updated)};
}

template <class OnCpu, class OnCuda>
void launch(const Place& place, OnCpu on_cpu, OnCuda on_cuda) {
  py::gil_scoped_release release;
  if (place.segments == 0) {
    on_cpu();
    return;
  }
#if defined(ACCEL_WITH_CUDA)
  on_cuda(reinterpret_cast<const Segment*>(place.segments), reinterpret_cast<void*>(place.stream));
#else
  (void)on_cuda;
  ACCEL_CHECK(false, "this build of lightning_accel has no CUDA kernels; build it where nvcc is found (ACCEL_CUDA=ON)");
#endif
}

// Lets the generic lambdas below name cuda:: functions in builds without them.
#if defined(ACCEL_WITH_CUDA)
#define ACCEL_ON_CUDA(call) [&](const Segment* segments, void* stream) { call; }
#else
#define ACCEL_ON_CUDA(call) [](const Segment*, void*) {}
#endif

const uint8_t* bytes_at(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }
uint8_t* mutable_bytes_at(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }
void* memory_at(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

void register_codecs(py::module_& module) {
  module.def(
      "encode",
      [](const Plan& plan, uintptr_t tensor, int64_t numel, uintptr_t wire, int64_t wire_bytes, uintptr_t old, uintptr_t updated,
         int64_t residual_numel, uintptr_t segments, uintptr_t stream) {
        check_tensor(plan, tensor, numel);
        check_wire(plan, wire, wire_bytes, "message");
        const Residuals residuals = residuals_at(plan, old, updated, residual_numel);
        launch(
            {segments, stream}, [&] { cpu::encode(plan, memory_at(tensor), mutable_bytes_at(wire), residuals); },
            ACCEL_ON_CUDA(cuda::encode(plan, segments, memory_at(tensor), mutable_bytes_at(wire), residuals, stream)));
      },
      py::arg("plan"), py::arg("tensor"), py::arg("numel"), py::arg("wire"), py::arg("wire_bytes"), py::arg("old"),
      py::arg("updated"), py::arg("residual_numel"), py::arg("segments"), py::arg("stream"));

  module.def(
      "decode",
      [](const Plan& plan, uintptr_t wire, int64_t wire_bytes, uintptr_t tensor, int64_t numel, uintptr_t segments,
         uintptr_t stream) {
        check_tensor(plan, tensor, numel);
        check_wire(plan, wire, wire_bytes, "message");
        launch(
            {segments, stream}, [&] { cpu::decode(plan, bytes_at(wire), memory_at(tensor)); },
            ACCEL_ON_CUDA(cuda::decode(plan, segments, bytes_at(wire), memory_at(tensor), stream)));
      },
      py::arg("plan"), py::arg("wire"), py::arg("wire_bytes"), py::arg("tensor"), py::arg("numel"), py::arg("segments"),
      py::arg("stream"));

  module.def(
      "decode_accumulate",
      [](const Plan& plan, uintptr_t wire, int64_t wire_bytes, uintptr_t accumulator, int64_t numel, uintptr_t segments,
         uintptr_t stream) {
        check_tensor(plan, accumulator, numel);
        check_wire(plan, wire, wire_bytes, "message");
        launch(
            {segments, stream}, [&] { cpu::decode_accumulate(plan, bytes_at(wire), memory_at(accumulator)); },
            ACCEL_ON_CUDA(cuda::decode_accumulate(plan, segments, bytes_at(wire), memory_at(accumulator), stream)));
      },
      py::arg("plan"), py::arg("wire"), py::arg("wire_bytes"), py::arg("accumulator"), py::arg("numel"), py::arg("segments"),
      py::arg("stream"));

  module.def(
      "decode_sum_encode",
      [](const Plan& plan, uintptr_t messages, int64_t messages_bytes, int64_t count, int64_t stride_bytes, float divisor,
         uintptr_t wire, int64_t wire_bytes, uintptr_t old, uintptr_t updated, int64_t residual_numel, uintptr_t segments,
         uintptr_t stream) {
        ACCEL_CHECK(count >= 1, "at least one message is needed, got " << count);
        ACCEL_CHECK(stride_bytes >= plan.wire_bytes() && stride_bytes % kWireAlignment == 0,
                    "messages must lie a multiple of " << kWireAlignment << " bytes apart, at least " << plan.wire_bytes()
                                                       << ": got " << stride_bytes);
        check_wire(plan, messages, messages_bytes - (count - 1) * stride_bytes, "last message");
        check_wire(plan, wire, wire_bytes, "message");
        const Messages source{bytes_at(messages), count, stride_bytes};
        const Residuals residuals = residuals_at(plan, old, updated, residual_numel);
        launch(
            {segments, stream}, [&] { cpu::decode_sum_encode(plan, source, divisor, mutable_bytes_at(wire), residuals); },
            ACCEL_ON_CUDA(cuda::decode_sum_encode(plan, segments, source, divisor, mutable_bytes_at(wire), residuals, stream)));
      },
      py::arg("plan"), py::arg("messages"), py::arg("messages_bytes"), py::arg("count"), py::arg("stride_bytes"),
      py::arg("divisor"), py::arg("wire"), py::arg("wire_bytes"), py::arg("old"), py::arg("updated"), py::arg("residual_numel"),
      py::arg("segments"), py::arg("stream"));
}

}  // namespace accel
