// none, fp16, bf16: each element by itself, rounded half to even to the wire's type; no header.
//
// NaN becomes the canonical NaN of the wire's type, Inf stays Inf, and what fp16 cannot hold becomes Inf.
#pragma once

#include "lightning_accel/numeric.h"

namespace accel {

// The type in which values of type T are summed.
template <class T>
struct ValueOf {
  using type = float;
};
template <>
struct ValueOf<double> {
  using type = double;
};

template <class Wire>
struct Cast {
  using Value = typename ValueOf<Wire>::type;
  using Code = Wire;

  static constexpr int kScaleNumel = kBlockNumel;
  static constexpr int kCodeBits = 8 * sizeof(Wire);

  struct Header {};
  static constexpr int kHeaderBytes = 0;

  struct Statistic {
    ACCEL_MEMBER void include(Value) {}
    ACCEL_MEMBER void merge(const Statistic&) {}
  };

  struct Grid {
    Header header;
    bool is_blank = false;
    ACCEL_MEMBER explicit Grid(const Statistic&) {}
    ACCEL_MEMBER Code encode(Value x) const { return encode_value(x); }
  };

  ACCEL_MEMBER static Value decode(const Header&, Code code) { return decode_value(code); }

 private:
  ACCEL_MEMBER static Code encode_value(float x) { return Convert<Wire>::from_float(x); }
  ACCEL_MEMBER static double encode_value(double x) { return x == x ? x : bit_cast<double>(uint64_t{0x7FF8000000000000u}); }
  template <class T>
  ACCEL_MEMBER static float decode_value(T code) {
    return Convert<T>::to_float(code);
  }
  ACCEL_MEMBER static double decode_value(double code) { return code; }
};

// A tensor's element as a codec's value, and back.
template <class Value, class Tensor>
ACCEL_INLINE Value load_value(Tensor x) {
  if constexpr (sizeof(Value) == 8) {
    static_assert(sizeof(Tensor) == 8, "only float64 tensors are summed in float64");
    return x;
  } else {
    return Convert<Tensor>::to_float(x);
  }
}

template <class Tensor, class Value>
ACCEL_INLINE Tensor store_value(Value x) {
  if constexpr (sizeof(Value) == 8) {
    static_assert(sizeof(Tensor) == 8, "only float64 tensors are summed in float64");
    return x == x ? x : bit_cast<double>(uint64_t{0x7FF8000000000000u});
  } else {
    return Convert<Tensor>::from_float(x);
  }
}

}  // namespace accel
