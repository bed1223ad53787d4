// Deals elements out to threads. Not in qadam_kernels.cpp: what the standard library brings along must not be compiled for an
// instruction set that the machine may not have.
#include "lightning_accel/qadam.h"

#include <system_error>
#include <thread>

#include "kernels.h"

namespace accel::cpu {
namespace {

// Below this a thread costs more than it saves.
constexpr int64_t kNumelOfThread = int64_t{1} << 18;

// Calls body(tensor, begin, end) for every element of `tensors`, each thread with equally many, in whole cache lines.
template <class Tensor, class Body>
void for_each_part(const std::vector<Tensor>& tensors, int threads, Body body) {
  int64_t total = 0;
  for (const Tensor& tensor : tensors) {
    total += tensor.numel;
  }
  const int64_t wanted = total / kNumelOfThread;
  const int64_t parts = wanted < 1 ? 1 : (wanted < threads ? wanted : threads);
  const int64_t share = (total / parts / 64 + 1) * 64;
  const auto work = [&](int64_t part) {
    int64_t before = 0;
    for (const Tensor& tensor : tensors) {
      const int64_t begin = part * share - before;
      const int64_t end = part + 1 == parts ? tensor.numel : begin + share;
      const int64_t first = begin > 0 ? begin : 0;
      const int64_t last = end < tensor.numel ? end : tensor.numel;
      if (first < last) {
        body(tensor, first, last);
      }
      before += tensor.numel;
    }
  };
  std::vector<std::thread> others;
  int64_t started = 1;
  try {
    for (; started < parts; ++started) {
      others.emplace_back(work, started);
    }
  } catch (const std::system_error&) {
    // The machine gives no more threads: this one does their parts.
  }
  work(0);
  for (int64_t part = started; part < parts; ++part) {
    work(part);
  }
  for (std::thread& other : others) {
    other.join();
  }
}

}  // namespace

void fold(DType dtype, const std::vector<FoldTensor>& tensors, const FoldScalars& scalars, int threads) {
  for_each_part(tensors, threads, [&](const FoldTensor& tensor, int64_t begin, int64_t end) {
    qadam_kernels().fold(dtype, tensor, begin, end, scalars);
  });
}

void step(DType dtype, const std::vector<StepTensor>& tensors, const StepScalars& scalars, int threads) {
  for_each_part(tensors, threads, [&](const StepTensor& tensor, int64_t begin, int64_t end) {
    qadam_kernels().step(dtype, tensor, begin, end, scalars);
  });
}

}  // namespace accel::cpu
