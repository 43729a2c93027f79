// The formats that operators quantise to and those of scales, and the rounding to them, the same on every device.
//
// A number beyond a format's largest becomes the largest, with its sign; so does an infinity. Rounding is to nearest,
// ties to even. A NaN becomes a NaN. int8 and float4 have none: it becomes 0 in int8 and 6 in float4.
#pragma once

#include <cstdint>

#include "../device/anywhere.h"
#include "../gemma_norm.h"

namespace gemma_norm {

// A format of 8 or 4 bits.
struct QuantizedFormat {
  DType dtype;
  float largest, inverse_largest;
  // Of a float8 or float4.
  uint32_t nan;
  uint32_t least_exponent;  // that of the least normal number, as float32 has it
  uint32_t fraction_bits;
  uint32_t negative_zero;
  int32_t sign_shift;  // from the place of a float32's sign to that of the format's

  GEMMA_NORM_ANYWHERE int32_t log2_items() const { return dtype == DType::kFloat4E2M1FNx2; }  // in a byte
};

GEMMA_NORM_ANYWHERE constexpr QuantizedFormat format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3FN: return {dtype, 448, 1.0f / 448, 0x7f, 121, 3, 0x80, 24};
    // The only zero is +0. What would be -0 is its NaN.
    case DType::kFloat8E4M3FNUZ: return {dtype, 240, 1.0f / 240, 0x80, 120, 3, 0, 24};
    case DType::kFloat8E5M2: return {dtype, 57344, 1.0f / 57344, 0x7f, 113, 2, 0x80, 24};
    case DType::kFloat4E2M1FNx2: return {dtype, 6, 1.0f / 6, 7, 127, 1, 8, 28};
    default: return {DType::kInt8, 127, 1.0f / 127, 0, 0, 0, 0, 0};
  }
}

namespace quantized {

template <class To, class From>
GEMMA_NORM_ANYWHERE To same_bits(From from) {
  return __builtin_bit_cast(To, from);
}

GEMMA_NORM_ANYWHERE uint32_t int8_bits(float v) {
  const float low = v > -128.0f ? v : -128.0f, limited = low < 127.0f ? low : 127.0f;
  // The sum's last bit is worth 1, so the addition rounds, and the last byte is the integer.
  return v == v ? same_bits<uint32_t>(limited + 12582912.0f) & 0xffu : 0u;
}

// The bits of the nearest number of the format. The sum's last bit is worth as much as the format's last bit at this
// exponent, so the addition rounds, and what it changed in the sum counts such units. The codes of the numbers of the
// next greater exponent follow.
GEMMA_NORM_ANYWHERE uint32_t float_bits(float v, const QuantizedFormat& f) {
  const uint32_t bits = same_bits<uint32_t>(v), any = bits & 0x7fffffffu, sign = (bits ^ any) >> f.sign_shift;
  const uint32_t most = same_bits<uint32_t>(f.largest), magnitude = any < most ? any : most;
  const uint32_t exponent = magnitude >> 23 > f.least_exponent ? magnitude >> 23 : f.least_exponent;
  const uint32_t large = (exponent + 23 - f.fraction_bits) << 23;
  const uint32_t units = same_bits<uint32_t>(same_bits<float>(magnitude) + same_bits<float>(large)) - large;
  const uint32_t rounded = units + ((exponent - f.least_exponent) << f.fraction_bits);
  const uint32_t with_sign = rounded ? rounded | sign : sign & f.negative_zero;
  return any > 0x7f800000u ? f.nan : with_sign;
}

GEMMA_NORM_ANYWHERE uint32_t bits_of(float v, const QuantizedFormat& f) {
  return f.dtype == DType::kInt8 ? int8_bits(v) : float_bits(v, f);
}

// The bits `largest` of a positive number or NaN, limited to those of `bound`; of a negative bound, to 0. A NaN stays,
// and bounds nothing.
GEMMA_NORM_ANYWHERE uint32_t bounded(uint32_t largest, float bound) {
  const uint32_t bits = same_bits<uint32_t>(bound), most = bits - 0x80000000u <= 0x7f800000u ? 0 : bits;
  return largest > most && largest <= 0x7f800000u ? most : largest;
}

// The scale of elements of which the largest absolute value has the bits `largest`: that value divided by the format's
// largest number. The bits of positive numbers, of infinity and of NaN are in this order, so a NaN among the elements
// is their largest, and makes the scale one. Zeros get the scale of 1e-10, which is finite and has a finite reciprocal.
// `divide(v, f)` is v / f.largest, rounded as IEEE 754 says.
template <class Divide>
GEMMA_NORM_ANYWHERE float scale_of(uint32_t largest, const QuantizedFormat& f, bool power_of_two,
                                   const Divide& divide) {
  constexpr uint32_t kLeast = 0x2edbe6ffu;  // 1e-10
  const float scale = divide(same_bits<float>(largest > kLeast ? largest : kLeast), f);
  const uint32_t bits = same_bits<uint32_t>(scale);
  return power_of_two && bits < 0x7f000000u ? same_bits<float>((bits + 0x7fffffu) & 0x7f800000u) : scale;
}

// The number that these bits stand for in float8_e4m3fn.
GEMMA_NORM_ANYWHERE float e4m3_value(uint32_t bits) {
  const uint32_t any = bits & 0x7fu, sign = (bits & 0x80u) << 24;
  if (any == 0x7f) return same_bits<float>(0x7fc00000u);
  const float magnitude = any < 8 ? static_cast<float>(any) * 0x1p-9f : same_bits<float>((any << 20) + (120u << 23));
  return same_bits<float>(same_bits<uint32_t>(magnitude) | sign);
}

// What is stored of a scale, and what the elements are multiplied by.
struct Scale {
  uint32_t bits;
  float inverse;
};

// In the format `dtype`. In float8_e4m3fn, a scale is relative to `global`, or to 1 where that is null; if the
// product of both is 0, so are the elements.
GEMMA_NORM_ANYWHERE Scale stored_scale(float scale, DType dtype, const float* global) {
  uint32_t bits = same_bits<uint32_t>(scale);
  if (dtype == DType::kFloat8E4M3FN) {
    const float unit = global ? *global : 1.0f;
    bits = float_bits(scale / unit, format_of(DType::kFloat8E4M3FN));
    scale = e4m3_value(bits) * unit;
  }
  if (dtype == DType::kFloat32) return {bits, 1.0f / scale};
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  return {dtype == DType::kFloat8E4M3FN ? bits : bits >> 23 & 0xffu, inverse};
}

GEMMA_NORM_ANYWHERE int64_t scale_bytes(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 1;
}

// Stores the scale of a row's group. `row` points to the scales of the row, `stride` leads from a scale to the next, or
// with kInt32 from four scales to the next four. What is left of the last four is set to 0.
GEMMA_NORM_ANYWHERE void store_scale(uint8_t* row, const Scale& scale, DType dtype, int64_t group, int64_t groups,
                                     int64_t stride) {
  if (dtype == DType::kFloat32) {
    reinterpret_cast<float*>(row)[group * stride] = same_bits<float>(scale.bits);
    return;
  }
  const bool packed = dtype == DType::kInt32;
  uint8_t* const at = row + (packed ? (group >> 2) * stride * 4 + (group & 3) : group * stride);
  *at = static_cast<uint8_t>(scale.bits);
  for (int next = 1; packed && group == groups - 1 && (group + next) & 3; ++next) at[next] = 0;
}

}  // namespace quantized
}  // namespace gemma_norm
