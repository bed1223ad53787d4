// Exactly as many bytes as asked for, so that AddressSanitizer sees a step beyond, at a chosen distance from 64-byte alignment.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t distance = 0, uint8_t fill = 0xA5) : bytes_(bytes), distance_(distance) {
    if (posix_memalign(&start_, 64, static_cast<size_t>(distance + bytes)) != 0) {
      throw std::bad_alloc();
    }
    std::memset(data(), fill, static_cast<size_t>(bytes));
  }
  Memory(const Memory& other) : Memory(other.bytes_, other.distance_) { std::memcpy(data(), other.data(), other.bytes_); }
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(start_); }

  uint8_t* data() { return static_cast<uint8_t*>(start_) + distance_; }
  const uint8_t* data() const { return static_cast<const uint8_t*>(start_) + distance_; }
  int64_t bytes() const { return bytes_; }

  // The first byte that differs, or -1.
  int64_t difference(const Memory& other) const {
    for (int64_t i = 0; i < bytes_; ++i) {
      if (data()[i] != other.data()[i]) {
        return i;
      }
    }
    return -1;
  }

 private:
  void* start_ = nullptr;
  int64_t bytes_;
  int64_t distance_;
};
