// A plan: which elements of a tensor stand where in a message.
//
// A message is a sequence of segments. A segment is a run of a tensor's elements, coded in blocks of kBlockNumel from its first
// element on; only its last block may be shorter. On the wire it is, at a multiple of 16 bytes,
//
//   headers: ceil(numel / Codec::kScaleNumel) x Codec::Header, padded to 16 bytes     (nothing for none, fp16, bf16)
//   codes:   numel x Codec::kCodeBits bits, padded to 16 bytes
//
// so that codes are aligned for vector loads and a message's size depends on the plan alone. Padding is never read.
#pragma once

#include <cstdint>
#include <vector>

#include "lightning_accel/dispatch.h"

namespace accel {

constexpr int64_t kWireAlignment = 16;  // bytes; one vector load of a GPU thread

ACCEL_INLINE int64_t align_wire(int64_t bytes) { return (bytes + kWireAlignment - 1) / kWireAlignment * kWireAlignment; }
ACCEL_INLINE int64_t num_blocks(int64_t numel) { return (numel + kBlockNumel - 1) / kBlockNumel; }

template <class Codec>
ACCEL_INLINE int64_t headers_bytes(int64_t numel) {
  return align_wire((numel + Codec::kScaleNumel - 1) / Codec::kScaleNumel * Codec::kHeaderBytes);
}
template <class Codec>
ACCEL_INLINE int64_t codes_bytes(int64_t numel) {
  return align_wire((numel * Codec::kCodeBits + 7) / 8);
}

// Plain integers only: the table is copied to the GPU as it is.
struct Segment {
  int64_t tensor_offset;    // elements, of the segment's first element in the tensor
  int64_t numel;            // elements
  int64_t wire_offset;      // bytes, of the segment in the message; a multiple of 16
  int64_t first_block;      // blocks in the segments before this one
  int64_t residual_offset;  // elements, of the segment's first element among the residuals
};

// Immutable and validated when made, so that the kernels need no checks but those of the buffers' sizes. Thread-safe.
class Plan {
 public:
  // wire_offsets[i] < 0 puts segment i right behind segment i - 1. Without residual_offsets residuals lie as the tensor does.
  // @throws std::invalid_argument on unknown codes, negative sizes, misaligned or overlapping offsets.
  Plan(CodecId codec, DType dtype, const std::vector<int64_t>& tensor_offsets, const std::vector<int64_t>& numels,
       const std::vector<int64_t>& wire_offsets, const std::vector<int64_t>& residual_offsets = {});

  CodecId codec() const { return codec_; }
  DType dtype() const { return dtype_; }
  const std::vector<Segment>& segments() const { return segments_; }
  int64_t num_blocks() const { return num_blocks_; }          // of all segments
  int64_t tensor_numel() const { return tensor_numel_; }      // elements the tensor must have at least
  int64_t residual_numel() const { return residual_numel_; }  // elements the residuals must have at least
  int64_t wire_bytes() const { return wire_bytes_; }          // bytes the message must have at least

 private:
  CodecId codec_;
  DType dtype_;
  std::vector<Segment> segments_;
  int64_t num_blocks_ = 0;
  int64_t tensor_numel_ = 0;
  int64_t residual_numel_ = 0;
  int64_t wire_bytes_ = 0;
};

}  // namespace accel
