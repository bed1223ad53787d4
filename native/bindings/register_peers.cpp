// As register_codecs.cpp: addresses and sizes are checked, the GIL is released.
#include <pybind11/stl.h>

#include "lightning_accel/check.h"
#include "lightning_accel/peer_all_reduce.h"
#include "register.h"

namespace py = pybind11;

namespace accel {
namespace {

// Addresses of old and updated residuals, both 0 where there are none, and their number of elements.
using ResidualsAt = std::tuple<uintptr_t, uintptr_t, int64_t>;

Residuals residuals_at(const Plan& plan, const ResidualsAt& at, const char* name) {
  const auto [old, updated, numel] = at;
  ACCEL_CHECK((old == 0) == (updated == 0), name << " need both memories, the old ones and the updated ones");
  ACCEL_CHECK(old == 0 || numel >= plan.residual_numel(),
              "the plan needs " << name << " of at least " << plan.residual_numel() << " elements, got " << numel);
  return {reinterpret_cast<const float*>(old), reinterpret_cast<float*>(updated)};
}

void all_reduce(const Plan& everything, const Plan& own, int64_t stride_bytes, bool is_whole, uintptr_t everything_segments,
                uintptr_t own_segments, uintptr_t tensor, int64_t numel, const std::vector<uintptr_t>& memory,
                int64_t memory_bytes, int rank, float divisor, const ResidualsAt& worker, const ResidualsAt& server,
                uintptr_t failure, double timeout_seconds, uintptr_t stream) {
  const int64_t count = static_cast<int64_t>(memory.size());
  ACCEL_CHECK(1 <= count && count <= kMostPeers && 0 <= rank && rank < count,
              "there must be 1 to " << kMostPeers << " peers, one of them this rank: got rank " << rank << " of " << count);
  Peers peers{{}, memory_bytes, static_cast<int>(count), rank};
  for (int64_t k = 0; k < count; ++k) {
    ACCEL_CHECK(memory[k] != 0 && memory[k] % kWireAlignment == 0,
                "rank " << k << "'s memory must lie at a multiple of " << kWireAlignment << " bytes, got address " << memory[k]);
    peers.memory[k] = reinterpret_cast<uint8_t*>(memory[k]);
  }
  const int64_t num_messages = is_whole ? 1 : count;
  ACCEL_CHECK(own.codec() == everything.codec() && own.dtype() == everything.dtype(), "both plans must have one codec and dtype");
  ACCEL_CHECK(stride_bytes % kWireAlignment == 0 && stride_bytes >= own.wire_bytes() &&
                  num_messages * stride_bytes >= everything.wire_bytes(),
              "messages of " << stride_bytes << " bytes do not hold the plans' " << own.wire_bytes() << " and "
                             << everything.wire_bytes() << " bytes");
  ACCEL_CHECK(
      memory_bytes >= peer_memory_bytes(static_cast<int>(num_messages), stride_bytes) && memory_bytes % kWireAlignment == 0,
      "the peers' memory must have a multiple of 16 bytes, at least "
          << peer_memory_bytes(static_cast<int>(num_messages), stride_bytes) << " bytes, got " << memory_bytes);
  ACCEL_CHECK(numel >= everything.tensor_numel() && (tensor != 0 || everything.tensor_numel() == 0),
              "the plan needs a tensor of at least " << everything.tensor_numel() << " elements, got " << numel);
  ACCEL_CHECK(failure != 0 && timeout_seconds > 0, "there must be a place for failures, and time to come");
  const Residuals of_worker = residuals_at(everything, worker, "the worker's residuals");
  const Residuals of_server = residuals_at(own, server, "the server's residuals");
  // A rank that sums nothing has no memory for residuals of it.
  const bool has_both = everything.residual_numel() > 0 && own.residual_numel() > 0;
  ACCEL_CHECK(!has_both || (of_worker.old == nullptr) == (of_server.old == nullptr), "both sides keep residuals, or none");
#if defined(ACCEL_WITH_CUDA)
  py::gil_scoped_release release;
  cuda::all_reduce_peers({everything, own, stride_bytes, is_whole}, reinterpret_cast<const Segment*>(everything_segments),
                         reinterpret_cast<const Segment*>(own_segments), reinterpret_cast<void*>(tensor), peers, divisor,
                         of_worker, of_server, reinterpret_cast<int32_t*>(failure), timeout_seconds,
                         reinterpret_cast<void*>(stream));
#else
  (void)divisor, (void)everything_segments, (void)own_segments, (void)stream;
  ACCEL_CHECK(false, "this build of lightning_accel has no CUDA kernels; build it where nvcc is found (ACCEL_CUDA=ON)");
#endif
}

}  // namespace

void register_peers(py::module_& module) {
  module.attr("MOST_PEERS") = kMostPeers;
  module.attr("PEER_MESSAGES_OFFSET") = kPeerMessagesOffset;
  module.def("peer_memory_bytes", &peer_memory_bytes, py::arg("num_messages"), py::arg("stride_bytes"));
  module.def("peer_all_reduce", &all_reduce, py::arg("everything"), py::arg("own"), py::arg("stride_bytes"), py::arg("is_whole"),
             py::arg("everything_segments"), py::arg("own_segments"), py::arg("tensor"), py::arg("numel"), py::arg("memory"),
             py::arg("memory_bytes"), py::arg("rank"), py::arg("divisor"), py::arg("worker"), py::arg("server"),
             py::arg("failure"), py::arg("timeout_seconds"), py::arg("stream"));
}

}  // namespace accel
