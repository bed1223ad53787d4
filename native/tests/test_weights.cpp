// Means and differences of weights, for every instruction set, against one element at a time; sizes around a chunk.
#include <cmath>
#include <random>

#include "check.h"
#include "lightning_accel/codecs.h"
#include "lightning_accel/weights.h"
#include "memory.h"
#include "reference.h"

using accel::DType;

namespace {

constexpr int64_t kSizes[] = {0, 1, 7, 127, 128, 129, 1000};

// The element's bits as a double, and a double as its bits, rounded half to even.
struct Element {
  DType dtype;
  reference::Format format;
  int64_t bytes;
};
const Element kElements[] = {
    {DType::kFloat32, reference::kFloat, 4}, {DType::kFloat16, reference::kHalf, 2}, {DType::kBFloat16, reference::kBFloat16, 2}};

uint64_t bits_at(const Memory& memory, int64_t i, int64_t bytes) {
  uint64_t bits = 0;
  std::memcpy(&bits, memory.data() + i * bytes, bytes);
  return bits;
}

// 16-bit floats are summed in float32, float32 in double.
void test_mean(const Element& element, int64_t count, int64_t numel, const std::string& isa) {
  std::mt19937_64 random(static_cast<uint64_t>(count * 1000 + numel));
  std::normal_distribution<double> normal;
  Memory rows(count * numel * element.bytes, element.bytes), out(numel * element.bytes, element.bytes);
  for (int64_t i = 0; i < count * numel; ++i) {
    // Every third is the same in all rows: its mean is itself.
    const double x = i % numel % 3 == 0 ? std::sin(static_cast<double>(i % numel)) : normal(random);
    const uint64_t bits = reference::to_bits(element.format, x);
    std::memcpy(rows.data() + i * element.bytes, &bits, element.bytes);
  }
  accel::cpu::mean(element.dtype, rows.data(), count, out.data(), numel);
  for (int64_t i = 0; i < numel; ++i) {
    double sum = reference::from_bits(element.format, bits_at(rows, i, element.bytes));
    for (int64_t k = 1; k < count; ++k) {
      sum += reference::from_bits(element.format, bits_at(rows, k * numel + i, element.bytes));
      sum = element.bytes == 2 ? static_cast<float>(sum) : sum;
    }
    const double mean =
        element.bytes == 2 ? static_cast<float>(sum) / static_cast<float>(count) : sum / static_cast<double>(count);
    const uint64_t expected = reference::to_bits(element.format, mean);
    CHECK(bits_at(out, i, element.bytes) == expected, isa << " mean of " << count << " at " << i << " of " << numel);
    CHECK(i % 3 != 0 || expected == bits_at(rows, i, element.bytes), isa << " the mean of equals differs at " << i);
  }
}

template <class T>
void test_ring_difference(DType dtype, int64_t numel, const std::string& isa) {
  std::mt19937_64 random(static_cast<uint64_t>(numel));
  std::normal_distribution<T> normal;
  std::vector<T> x(numel), w(numel), left(numel), right(numel), expected(numel);
  for (int64_t i = 0; i < numel; ++i) {
    x[i] = w[i] = left[i] = right[i] = normal(random);
    if (i % 2) {
      x[i] += T(0.01) * normal(random), left[i] += T(0.01) * normal(random), right[i] += T(0.01) * normal(random);
    }
    const T of_left = left[i] - w[i], of_right = right[i] - w[i], own = x[i] - w[i];
    const T sum = of_left + of_right;
    expected[i] = own + sum / T(3);
  }
  accel::cpu::ring_difference(dtype, x.data(), w.data(), left.data(), right.data(), numel);
  for (int64_t i = 0; i < numel; ++i) {
    CHECK(x[i] == expected[i], isa << " difference at " << i << " of " << numel << ": " << x[i] << ", not " << expected[i]);
    CHECK(i % 2 || x[i] == 0, isa << " the difference of equals is " << x[i]);
  }
}

}  // namespace

int main() {
  for (const std::string& isa : accel::cpu::instruction_sets()) {
    accel::cpu::use_instruction_set(isa);
    for (const int64_t numel : kSizes) {
      for (const Element& element : kElements) {
        for (const int64_t count : {1, 2, 3, 7}) {
          test_mean(element, count, numel, isa);
        }
      }
      test_ring_difference<float>(DType::kFloat32, numel, isa);
      test_ring_difference<double>(DType::kFloat64, numel, isa);
    }
    CHECK_THROWS((accel::cpu::ring_difference(DType::kFloat16, nullptr, nullptr, nullptr, nullptr, 0), 0), "float32 or float64");
  }
  return check::report("test_weights");
}
