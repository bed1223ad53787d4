#include "lightning_accel/plan.h"

#include "lightning_accel/check.h"

namespace accel {
namespace {

constexpr int64_t kLargest = int64_t{1} << 48;  // elements or bytes; sums and products of such sizes fit in 64 bits

}  // namespace

Plan::Plan(CodecId codec, DType dtype, const std::vector<int64_t>& tensor_offsets, const std::vector<int64_t>& numels,
           const std::vector<int64_t>& wire_offsets, const std::vector<int64_t>& residual_offsets)
    : codec_(codec), dtype_(dtype) {
  ACCEL_CHECK(tensor_offsets.size() == numels.size() && wire_offsets.size() == numels.size(),
              "a plan needs as many offsets as sizes: got " << tensor_offsets.size() << " tensor offsets, " << numels.size()
                                                            << " sizes and " << wire_offsets.size() << " wire offsets");
  ACCEL_CHECK(
      residual_offsets.empty() || residual_offsets.size() == numels.size(),
      "a plan needs no residual offsets or as many as sizes: got " << residual_offsets.size() << " for " << numels.size());
  visit_codec(codec, dtype, [](auto, auto) { return 0; });  // unknown codes are refused without segments as well
  segments_.reserve(numels.size());
  for (size_t i = 0; i < numels.size(); ++i) {
    const int64_t numel = numels[i];
    const int64_t wire_offset = wire_offsets[i] < 0 ? wire_bytes_ : wire_offsets[i];
    const int64_t residual_offset = residual_offsets.empty() ? tensor_offsets[i] : residual_offsets[i];
    ACCEL_CHECK(numel >= 0 && tensor_offsets[i] >= 0 && residual_offset >= 0,
                "segment " << i << " must not be negative: got offset " << tensor_offsets[i] << ", size " << numel
                           << ", residual offset " << residual_offset);
    ACCEL_CHECK(numel <= kLargest && tensor_offsets[i] <= kLargest && wire_offset <= kLargest && residual_offset <= kLargest,
                "segment " << i << " must have sizes and offsets of at most " << kLargest << ": got tensor offset "
                           << tensor_offsets[i] << ", size " << numel << ", wire offset " << wire_offset << ", residual offset "
                           << residual_offset);
    ACCEL_CHECK(wire_offset % kWireAlignment == 0 && wire_offset >= wire_bytes_,
                "segment " << i << " must start on the wire at a multiple of " << kWireAlignment
                           << " bytes and behind the segment before it, which ends at " << wire_bytes_ << ": got "
                           << wire_offset);
    segments_.push_back({tensor_offsets[i], numel, wire_offset, num_blocks_, residual_offset});
    num_blocks_ += accel::num_blocks(numel);
    const int64_t tensor_end = tensor_offsets[i] + numel;
    tensor_numel_ = tensor_end > tensor_numel_ ? tensor_end : tensor_numel_;
    const int64_t residual_end = residual_offset + numel;
    residual_numel_ = residual_end > residual_numel_ ? residual_end : residual_numel_;
    wire_bytes_ = visit_codec(codec, dtype, [&](auto codec_type, auto) {
      using Codec = typename decltype(codec_type)::type;
      return wire_offset + headers_bytes<Codec>(numel) + codes_bytes<Codec>(numel);
    });
  }
}

}  // namespace accel
