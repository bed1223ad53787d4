// A two-shot all_reduce by one kernel a rank, over memory that ranks on one machine map into each other's address space.
//
// The equations are those of the all_reduce by messages (collectives/two_shot.py), and so are the bytes: each rank
//
//   1. encodes every rank's blocks into its own memory,
//   2. waits until all have,
//   3. reads the others' codes of the blocks it owns, sums in rank order, divides, and encodes into its own memory,
//   4. waits until all have,
//   5. reads every owner's codes and decodes them.
//
// A rank's memory holds, from byte 0 on,
//
//   flags:    kMostThreadBlocks x kMostPeers x 4 bytes; [b][k] is what thread block b of rank k has told this rank
//   rounds:   kMostThreadBlocks x 4 bytes; what thread block b last told the others
//   failed:   16 bytes; the first 4 are not 0 once a wait took too long
//   messages: num_messages x stride_bytes; codes for each owner, or for all in one where every rank sums all
//   ...
//   means:    the last stride_bytes; codes of what this rank summed. At the end, because others may still read those of a call
//             when this rank writes the next one's messages, whatever their sizes
//
// The flags only grow: nobody takes one back, so a rank that is early by a round cannot be missed. Before the first call all of
// it, up to the messages, must be zero on every rank.
#pragma once

#include <cstdint>

#include "lightning_accel/codecs.h"
#include "lightning_accel/plan.h"

namespace accel {

constexpr int kMostPeers = 16;
constexpr int kMostThreadBlocks = 128;  // of a call; about one a multiprocessor, so that backward goes on beside it
constexpr int64_t kPeerFlagsBytes = int64_t{kMostThreadBlocks} * kMostPeers * 4;
constexpr int64_t kPeerRoundsBytes = int64_t{kMostThreadBlocks} * 4;
constexpr int64_t kPeerMessagesOffset = kPeerFlagsBytes + kPeerRoundsBytes + 16;

// The ranks' memory, as this process sees it.
struct Peers {
  uint8_t* memory[kMostPeers];
  int64_t memory_bytes;  // of each, a multiple of 16, as much as the largest of all calls needs
  int count;
  int rank;
};

// What an all_reduce sends, planned as for messages.
struct PeerMessages {
  const Plan& everything;  // all blocks; owner k's messages from k * stride_bytes on
  const Plan& own;         // those this rank sums, as one message
  int64_t stride_bytes;
  bool is_whole;  // every rank sums all blocks: there is one message
};

// Bytes that each rank's memory must have at least.
inline int64_t peer_memory_bytes(int num_messages, int64_t stride_bytes) {
  return kPeerMessagesOffset + (num_messages + 1) * stride_bytes;
}

#if defined(ACCEL_WITH_CUDA)
namespace cuda {

// tensor <- (sum of the ranks' tensors) / divisor, coded twice by the plan's codec, int8 or none. Enqueued on `stream` of the
// current device; all ranks do so in the same order, one call at a time in each memory.
//
// No rank goes on before all have come, but for at most `timeout_seconds` at each of the two waits, or until *failure, a word in
// memory that the host shares, is not 0. Then it becomes 1 + the rank that was missing, the elements that were not summed become
// NaN, and so do all in later calls.
// @throws std::runtime_error when the launch is refused, std::invalid_argument on another codec.
void all_reduce_peers(const PeerMessages& messages, const Segment* everything_segments, const Segment* own_segments, void* tensor,
                      const Peers& peers, float divisor, const Residuals& worker, const Residuals& server, int32_t* failure,
                      double timeout_seconds, void* stream);

}  // namespace cuda
#endif

}  // namespace accel
