// The all_reduce over shared memory, compiled for the host (emulated_cuda/): each rank is a thread, and what it ends with is what
// the CPU's operations make of the same tensors by messages, byte for byte: tensors, residuals of both sides, several calls of
// different sizes in the same memory, one right behind another on ranks that dawdle here and there. A rank that does not come,
// or a part of it, leaves NaN and its number, after the time it was given or when the host says so.
#include <cmath>
#include <random>
#include <string>
#include <thread>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "lightning_accel/peer_all_reduce.h"
#include "memory.h"

// Last, because it is made of the headers before.
#include "../cuda/peer_all_reduce.cu"

namespace {

using accel::CodecId;
using accel::DType;
using accel::Plan;
using accel::Residuals;

constexpr int kElementBytes[] = {4, 2, 2, 8};
constexpr double kLongSeconds = 60;
constexpr double kShortSeconds = 2;  // more than a busy machine keeps a thread waiting

// How a tensor's runs are dealt to ranks: the same on all. Rank `rank` sums `own`.
struct Deal {
  Plan everything;
  std::vector<Plan> own;
  int64_t stride_bytes;
  bool is_whole;
};

// Runs of several sizes that lie apart, in the tensor and among the residuals, alternately each rank's; the last rank has one
// less, and a rank may have none.
Deal deal(CodecId codec, DType dtype, int count, bool is_whole, const std::vector<int64_t>& numels) {
  const int shares = is_whole ? 1 : count;
  std::vector<std::vector<int64_t>> tensor_offsets(shares), sizes(shares), residual_offsets(shares), owned_offsets(shares);
  int64_t tensor_end = 0, residual_end = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    const size_t owner = i % static_cast<size_t>(shares);
    const int64_t owned_end = sizes[owner].empty() ? 0 : owned_offsets[owner].back() + sizes[owner].back();
    tensor_offsets[owner].push_back(tensor_end + numels[i] % 3);
    sizes[owner].push_back(numels[i]);
    residual_offsets[owner].push_back(residual_end + numels[i] % 5);
    owned_offsets[owner].push_back(owned_end);
    tensor_end = tensor_offsets[owner].back() + numels[i];
    residual_end = residual_offsets[owner].back() + numels[i];
  }
  std::vector<Plan> own;
  int64_t stride_bytes = 0;
  for (int k = 0; k < shares; ++k) {
    own.emplace_back(codec, dtype, tensor_offsets[k], sizes[k], std::vector<int64_t>(sizes[k].size(), -1),
                     is_whole ? residual_offsets[k] : owned_offsets[k]);
    stride_bytes = std::max(stride_bytes, own.back().wire_bytes());
  }
  std::vector<int64_t> all_tensor, all_sizes, all_wire, all_residual;
  for (int k = 0; k < shares; ++k) {
    for (size_t i = 0; i < sizes[k].size(); ++i) {
      all_tensor.push_back(tensor_offsets[k][i]);
      all_sizes.push_back(sizes[k][i]);
      all_residual.push_back(residual_offsets[k][i]);
      all_wire.push_back(k * stride_bytes + own[k].segments()[i].wire_offset);
    }
  }
  own.resize(static_cast<size_t>(count), own[0]);
  return {Plan(codec, dtype, all_tensor, all_sizes, all_wire, all_residual), own, stride_bytes, is_whole};
}

// What a rank has: its tensor, and what its codes have lost.
struct State {
  Memory tensor, worker, server;

  State(const Deal& deal, int64_t server_numel)
      : tensor(deal.everything.tensor_numel() * kElementBytes[static_cast<int>(deal.everything.dtype())]),
        worker(deal.everything.residual_numel() * 4),
        server(server_numel * 4) {}
  Residuals of_worker() { return residuals(worker); }
  Residuals of_server() { return residuals(server); }

 private:
  static Residuals residuals(Memory& memory) {
    float* values = reinterpret_cast<float*>(memory.data());
    return {values, values};
  }
};

void fill(std::vector<State>& ranks, DType dtype, bool special, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return static_cast<double>(static_cast<int64_t>(random())) * 0x1p-63; };
  for (State& rank : ranks) {
    accel::visit_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t i = 0; i < rank.tensor.bytes() / static_cast<int64_t>(sizeof(T)); ++i) {
        const double value = special && random() % 3000 == 0 ? INFINITY : uniform();
        T item;
        if constexpr (std::is_same_v<T, double>) {
          item = value;
        } else {
          item = accel::Convert<T>::from_float(static_cast<float>(value));
        }
        std::memcpy(rank.tensor.data() + i * static_cast<int64_t>(sizeof(T)), &item, sizeof item);
      }
    });
    for (Memory* memory : {&rank.worker, &rank.server}) {
      for (int64_t i = 0; i < memory->bytes() / 4; ++i) {
        reinterpret_cast<float*>(memory->data())[i] = static_cast<float>(uniform()) * 0.01f;
      }
    }
  }
}

// By messages, on the CPU.
void expect(const Deal& deal, std::vector<State>& ranks, float divisor, bool has_feedback) {
  const int count = static_cast<int>(ranks.size());
  const int shares = deal.is_whole ? 1 : count;
  std::vector<Memory> sent, means;
  for (State& rank : ranks) {
    sent.emplace_back(shares * deal.stride_bytes);
    accel::cpu::encode(deal.everything, rank.tensor.data(), sent.back().data(), has_feedback ? rank.of_worker() : Residuals{});
  }
  for (int rank = 0; rank < count; ++rank) {
    const int share = deal.is_whole ? 0 : rank;
    Memory received(count * deal.stride_bytes);
    for (int k = 0; k < count; ++k) {
      std::memcpy(received.data() + k * deal.stride_bytes, sent[k].data() + share * deal.stride_bytes, deal.stride_bytes);
    }
    means.emplace_back(deal.stride_bytes);
    accel::cpu::decode_sum_encode(deal.own[rank], {received.data(), count, deal.stride_bytes}, divisor, means.back().data(),
                                  has_feedback ? ranks[rank].of_server() : Residuals{});
  }
  for (int rank = 0; rank < count; ++rank) {
    Memory gathered(shares * deal.stride_bytes);
    for (int k = 0; k < shares; ++k) {
      std::memcpy(gathered.data() + k * deal.stride_bytes, means[deal.is_whole ? rank : k].data(), deal.stride_bytes);
    }
    accel::cpu::decode(deal.everything, gathered.data(), ranks[rank].tensor.data());
  }
}

// The memory of all ranks, as each of them sees it.
struct Shared {
  std::vector<Memory> memory;
  std::vector<int32_t> failures;

  Shared(int count, int64_t bytes) : failures(count, 0) {
    for (int k = 0; k < count; ++k) {
      memory.emplace_back(bytes);
      std::memset(memory.back().data(), 0, accel::kPeerMessagesOffset);
    }
  }
  accel::Peers of(int rank) {
    accel::Peers peers{};
    peers.memory_bytes = memory[0].bytes();
    peers.count = static_cast<int>(memory.size());
    peers.rank = rank;
    for (int k = 0; k < peers.count; ++k) {
      peers.memory[k] = memory[k].data();
    }
    return peers;
  }
};

void call(const Deal& deal, int rank, State& state, Shared& shared, float divisor, bool has_feedback, double timeout_seconds) {
  accel::cuda::all_reduce_peers({deal.everything, deal.own[rank], deal.stride_bytes, deal.is_whole},
                                deal.everything.segments().data(), deal.own[rank].segments().data(), state.tensor.data(),
                                shared.of(rank), divisor, has_feedback ? state.of_worker() : Residuals{},
                                has_feedback ? state.of_server() : Residuals{}, &shared.failures[rank], timeout_seconds, nullptr);
}

// body(rank) on each of the first ranks, side by side. A rank that dawdles sleeps behind one barrier in some.
template <class Body>
void on_ranks(int count, bool dawdle, Body body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < count; ++rank) {
    threads.emplace_back([=] {
      if (dawdle) {
        emulated::after_barrier = [random = std::mt19937(rank)]() mutable {
          if (random() % 8 == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(random() % 4));
          }
        };
      }
      body(rank);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

std::vector<State> make_ranks(const Deal& deal, int count) {
  std::vector<State> ranks;
  for (int rank = 0; rank < count; ++rank) {
    ranks.emplace_back(deal, deal.own[rank].residual_numel());
  }
  return ranks;
}

const std::vector<int64_t> kSeveral{7, 513, 1, 1000, 512, 2 * 512, 129, 1500, 511};

void test_equals_messages(CodecId codec, DType dtype, int count, bool is_whole, bool has_feedback) {
  const std::vector<std::vector<int64_t>> sizes{{5}, {600, 700, 800, 900}, kSeveral, {}, {2, 1030}, {9, 4000, 3000, 3500}, {700}};
  std::vector<Deal> deals;
  std::vector<std::vector<State>> ranks, expected;
  int64_t bytes = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    deals.push_back(deal(codec, dtype, count, is_whole, sizes[i]));
    bytes = std::max(bytes, accel::peer_memory_bytes(is_whole ? 1 : count, deals[i].stride_bytes));
    ranks.push_back(make_ranks(deals[i], count));
    fill(ranks[i], dtype, i == 2, i);
    expected.push_back(ranks[i]);
    expect(deals[i], expected[i], static_cast<float>(count), has_feedback);
  }
  Shared shared(count, bytes);
  on_ranks(count, true, [&](int rank) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      call(deals[i], rank, ranks[i][rank], shared, static_cast<float>(count), has_feedback, kLongSeconds);
    }
  });
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int rank = 0; rank < count; ++rank) {
      const std::string what = "codec " + std::to_string(static_cast<int>(codec)) + ", dtype " +
                               std::to_string(static_cast<int>(dtype)) + ", rank " + std::to_string(rank) + " of " +
                               std::to_string(count) + (is_whole ? ", whole" : "") + (has_feedback ? ", feedback" : "") +
                               ", call " + std::to_string(i);
      CHECK(ranks[i][rank].tensor.difference(expected[i][rank].tensor) < 0, what << ": the tensor differs");
      CHECK(ranks[i][rank].worker.difference(expected[i][rank].worker) < 0, what << ": the worker's residuals differ");
      CHECK(ranks[i][rank].server.difference(expected[i][rank].server) < 0, what << ": the server's residuals differ");
      CHECK(shared.failures[rank] == 0, what << ": failed");
    }
  }
}

// More blocks than a grid has warps.
void test_large() {
  const Deal dealt = deal(CodecId::kInt8, DType::kBFloat16, 2, false, {600 * 512 + 3, 5, 520 * 512});
  Shared shared(2, accel::peer_memory_bytes(2, dealt.stride_bytes));
  std::vector<State> ranks = make_ranks(dealt, 2);
  fill(ranks, DType::kBFloat16, true, 3);
  std::vector<State> expected = ranks;
  on_ranks(2, false, [&](int rank) { call(dealt, rank, ranks[rank], shared, 2.0f, false, kLongSeconds); });
  expect(dealt, expected, 2.0f, false);
  CHECK(ranks[0].tensor.difference(expected[0].tensor) < 0 && ranks[1].tensor.difference(expected[1].tensor) < 0,
        "a large tensor differs");
}

// How many of the plan's elements are NaN; the others must be as expected.
int64_t count_nan(const Deal& deal, State& state, State& expected, const char* what) {
  const float* values = reinterpret_cast<float*>(state.tensor.data());
  const float* means = reinterpret_cast<float*>(expected.tensor.data());
  int64_t count = 0;
  for (const accel::Segment& segment : deal.everything.segments()) {
    for (int64_t i = segment.tensor_offset; i < segment.tensor_offset + segment.numel; ++i) {
      count += std::isnan(values[i]);
      CHECK(std::isnan(values[i]) || values[i] == means[i], what << ": element " << i << " is " << values[i]);
    }
  }
  return count;
}

int64_t numel_of(const Deal& deal) {
  int64_t numel = 0;
  for (const accel::Segment& segment : deal.everything.segments()) {
    numel += segment.numel;
  }
  return numel;
}

// A rank that does not come: all others end, say who was missing, and their tensors are NaN, in this call and in later ones, even
// if the rank comes then.
void test_missing_rank() {
  const Deal dealt = deal(CodecId::kInt8, DType::kFloat32, 3, false, kSeveral);
  Shared shared(3, accel::peer_memory_bytes(3, dealt.stride_bytes));
  std::vector<State> ranks = make_ranks(dealt, 3);
  for (const int num_coming : {2, 3}) {
    fill(ranks, DType::kFloat32, false, 5);
    on_ranks(num_coming, false, [&](int rank) { call(dealt, rank, ranks[rank], shared, 3.0f, false, kShortSeconds); });
    for (int rank = 0; rank < 2; ++rank) {
      CHECK(shared.failures[rank] == 3, "rank " << rank << " missed " << shared.failures[rank] - 1);
      CHECK(count_nan(dealt, ranks[rank], ranks[rank], "a rank is missing") == numel_of(dealt), "some elements are not NaN");
    }
  }
  CHECK(shared.failures[2] != 0, "the late rank goes on");
}

// One thread block of a rank that is late: its namesakes fail, others may have come to their end. No element stays what it was.
void test_late_thread_block() {
  const Deal dealt = deal(CodecId::kInt8, DType::kFloat32, 3, false, {6000, 6000, 6000, 5000});
  Shared shared(3, accel::peer_memory_bytes(3, dealt.stride_bytes));
  reinterpret_cast<uint32_t*>(shared.memory[1].data() + accel::kPeerFlagsBytes)[2] = 0xFFFFFFF0u;  // it tells old rounds
  std::vector<State> ranks = make_ranks(dealt, 3);
  fill(ranks, DType::kFloat32, false, 6);
  std::vector<State> expected = ranks;
  expect(dealt, expected, 3.0f, false);
  on_ranks(3, false, [&](int rank) { call(dealt, rank, ranks[rank], shared, 3.0f, false, kShortSeconds); });
  for (const int rank : {0, 2}) {
    const int64_t num_nan = count_nan(dealt, ranks[rank], expected[rank], "a thread block is late");
    CHECK(0 < num_nan && num_nan < numel_of(dealt), num_nan << " elements are NaN");
    CHECK(shared.failures[rank] == 2, "rank " << rank << " missed " << shared.failures[rank] - 1);
  }
}

// The host ends a wait.
void test_host_ends_it() {
  const Deal dealt = deal(CodecId::kNone, DType::kFloat32, 2, false, kSeveral);
  Shared shared(2, accel::peer_memory_bytes(2, dealt.stride_bytes));
  std::vector<State> ranks = make_ranks(dealt, 2);
  fill(ranks, DType::kFloat32, false, 7);
  std::thread host([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    __atomic_store_n(&shared.failures[0], -1, __ATOMIC_RELEASE);
  });
  on_ranks(1, false, [&](int rank) { call(dealt, rank, ranks[rank], shared, 2.0f, false, kLongSeconds); });
  host.join();
  CHECK(shared.failures[0] == -1, "it went on to the end of its time: " << shared.failures[0]);
  CHECK(count_nan(dealt, ranks[0], ranks[0], "ended by the host") == numel_of(dealt), "some elements are not NaN");
}

}  // namespace

int main() {
  for (const CodecId codec : {CodecId::kInt8, CodecId::kNone}) {
    for (int count = 1; count <= 4; ++count) {
      for (int type = 0; type < (count == 2 ? 4 : 1); ++type) {
        for (const bool is_whole : {false, true}) {
          for (const bool has_feedback : {false, true}) {
            if ((!is_whole || count <= 2) && (!has_feedback || codec == CodecId::kInt8)) {
              test_equals_messages(codec, static_cast<DType>(type), count, is_whole, has_feedback);
            }
          }
        }
      }
    }
  }
  test_large();
  test_missing_rank();
  test_late_thread_block();
  test_host_ends_it();
  return check::report("test_peers_emulated");
}
