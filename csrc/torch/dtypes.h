// PyTorch's dtypes: their names, and those that operators know.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cctype>
#include <cstdint>
#include <string>

#include "../gemma_norm.h"

namespace gemma_norm::binding {

inline const char* dtype_name(int32_t dtype) {
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  // The Python name of every other dtype is its C++ name in lower case, such as float8_e4m3fn or uint16.
  static const auto names = [] {
    std::array<std::string, static_cast<size_t>(ScalarType::NumOptions) + 1> all;
    for (size_t i = 0; i < all.size(); ++i)
      for (const char* c = torch::headeronly::toString(static_cast<ScalarType>(i)); *c; ++c)
        all[i] += static_cast<char>(std::tolower(static_cast<unsigned char>(*c)));
    return all;
  }();
  return dtype >= 0 && dtype < static_cast<int32_t>(names.size()) ? names[dtype].c_str() : "an unknown dtype";
}

inline DType to_dtype(int32_t dtype) {
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Float8_e4m3fn: return DType::kFloat8E4M3FN;
    case ScalarType::Float8_e4m3fnuz: return DType::kFloat8E4M3FNUZ;
    case ScalarType::Float8_e5m2: return DType::kFloat8E5M2;
    case ScalarType::Float4_e2m1fn_x2: return DType::kFloat4E2M1FNx2;
    case ScalarType::Float8_e8m0fnu: return DType::kFloat8E8M0FNU;
    default: return DType::kOther;
  }
}

// Of what operators make new tensors of by an option.
inline int32_t to_scalar_type(DType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case DType::kInt8: return static_cast<int32_t>(ScalarType::Char);
    case DType::kFloat8E4M3FN: return static_cast<int32_t>(ScalarType::Float8_e4m3fn);
    case DType::kFloat8E4M3FNUZ: return static_cast<int32_t>(ScalarType::Float8_e4m3fnuz);
    case DType::kFloat8E5M2: return static_cast<int32_t>(ScalarType::Float8_e5m2);
    case DType::kFloat4E2M1FNx2: return static_cast<int32_t>(ScalarType::Float4_e2m1fn_x2);
    case DType::kFloat8E8M0FNU: return static_cast<int32_t>(ScalarType::Float8_e8m0fnu);
    case DType::kInt32: return static_cast<int32_t>(ScalarType::Int);
    default: return static_cast<int32_t>(ScalarType::Float);
  }
}

}  // namespace gemma_norm::binding
