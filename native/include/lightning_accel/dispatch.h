// Codes for dtypes and codecs, as they come from Python, and the one place that maps them to types.
#pragma once

#include "lightning_accel/check.h"
#include "lightning_accel/codec_cast.h"
#include "lightning_accel/codec_minmax_uint8.h"
#include "lightning_accel/codec_sign.h"
#include "lightning_accel/codec_symmetric.h"
#include "lightning_accel/numeric.h"

namespace accel {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
enum class CodecId : int { kNone = 0, kFp16 = 1, kBf16 = 2, kInt8 = 3, kMinMaxUInt8 = 4, kInt4 = 5, kSign = 6 };

template <class T>
struct Type {
  using type = T;
};

// Calls visitor(Type<T>{}) with the storage type of `dtype`.
template <class Visitor>
auto visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat32: return visitor(Type<float>{});
    case DType::kFloat16: return visitor(Type<Half>{});
    case DType::kBFloat16: return visitor(Type<BFloat16>{});
    case DType::kFloat64: return visitor(Type<double>{});
  }
  ACCEL_CHECK(false, "dtype must be one of 0..3, got " << static_cast<int>(dtype));
  return visitor(Type<float>{});
}

// Calls visitor(Type<Codec>{}, Type<Tensor>{}): Tensor is the storage type of `dtype`, Codec what `codec` makes of it.
template <class Visitor>
auto visit_codec(CodecId codec, DType dtype, Visitor&& visitor) {
  return visit_dtype(dtype, [&](auto tensor) {
    using Tensor = typename decltype(tensor)::type;
    switch (codec) {
      case CodecId::kNone: return visitor(Type<Cast<Tensor>>{}, tensor);
      case CodecId::kFp16: return visitor(Type<Cast<Half>>{}, tensor);
      case CodecId::kBf16: return visitor(Type<Cast<BFloat16>>{}, tensor);
      case CodecId::kInt8: return visitor(Type<Int8>{}, tensor);
      case CodecId::kMinMaxUInt8: return visitor(Type<MinMaxUInt8>{}, tensor);
      case CodecId::kInt4: return visitor(Type<Int4>{}, tensor);
      case CodecId::kSign: return visitor(Type<Sign>{}, tensor);
    }
    ACCEL_CHECK(false, "codec must be one of 0..6, got " << static_cast<int>(codec));
    return visitor(Type<Int8>{}, tensor);
  });
}

}  // namespace accel
