// The formats that operators quantise to and those of scales, and the rounding to them, the same on every device.
//
// A number beyond a format's largest becomes the largest, with its sign; so does an infinity. Rounding is to nearest,
// ties to even. A NaN becomes a NaN. int8 and float4 have none: it becomes 0 in int8 and 6 in float4.
#pragma once

#include <cstdint>

#include "../device/anywhere.h"
#include "../gemma_norm.h"

namespace gemma_norm {

// A format of 8 or 4 bits. A float32 is rounded to a float8 or float4 in two ways, and then one result is taken. If the
// result is normal, the fraction is rounded where it is, and the exponent is that of the other bias. If it is
// subnormal, a number is added whose last bit is worth the format's least number, so that this addition rounds.
struct QuantizedFormat {
  DType dtype;
  float largest, inverse_largest;
  uint32_t nan;
  uint32_t least_normal;  // the bits of the float32
  uint32_t rebias;        // what is subtracted from the bits of a float32, for the other bias
  uint32_t dropped;       // bits of the fraction that a float32 has and this format has not
  uint32_t to_subnormal;  // the bits of the number that is added
  uint32_t negative_zero;
  int32_t sign_shift;  // from the place of a float32's sign to that of the format's

  GEMMA_NORM_ANYWHERE int32_t log2_items() const { return dtype == DType::kFloat4E2M1FNx2; }  // in a byte
};

GEMMA_NORM_ANYWHERE constexpr QuantizedFormat format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3FN: return {dtype, 448, 1.0f / 448, 0x7f, 121u << 23, 120u << 23, 20, 141u << 23, 0x80, 24};
    // The only zero is +0. What would be -0 is its NaN.
    case DType::kFloat8E4M3FNUZ: return {dtype, 240, 1.0f / 240, 0x80, 120u << 23, 119u << 23, 20, 140u << 23, 0, 24};
    case DType::kFloat8E5M2:
      return {dtype, 57344, 1.0f / 57344, 0x7f, 113u << 23, 112u << 23, 21, 134u << 23, 0x80, 24};
    case DType::kFloat4E2M1FNx2: return {dtype, 6, 1.0f / 6, 7, 127u << 23, 126u << 23, 22, 149u << 23, 8, 28};
    default: return {DType::kInt8, 127, 1.0f / 127, 0, 0, 0, 0, 0, 0, 0};
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

GEMMA_NORM_ANYWHERE uint32_t float_bits(float v, const QuantizedFormat& f) {
  const uint32_t bits = same_bits<uint32_t>(v), any = bits & 0x7fffffffu, sign = (bits ^ any) >> f.sign_shift;
  const uint32_t most = same_bits<uint32_t>(f.largest), magnitude = any < most ? any : most;
  const uint32_t half = (1u << f.dropped >> 1) - 1;
  const uint32_t normal = (magnitude - f.rebias + half + (magnitude >> f.dropped & 1u)) >> f.dropped;
  const uint32_t subnormal =
      same_bits<uint32_t>(same_bits<float>(magnitude) + same_bits<float>(f.to_subnormal)) - f.to_subnormal;
  const uint32_t rounded = magnitude < f.least_normal ? subnormal : normal;
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

// The number that these bits stand for in float8_e4m3fn. The sign is that of +.
GEMMA_NORM_ANYWHERE float e4m3_value(uint32_t bits) {
  if (bits == 0x7f) return same_bits<float>(0x7fc00000u);
  return bits < 8 ? static_cast<float>(bits) * 0x1p-9f : same_bits<float>((bits << 20) + (120u << 23));
}

// What is stored of a scale, and what the elements are multiplied by.
struct Scale {
  uint32_t bits;
  float inverse;
};

// In the format `dtype`. In float8_e4m3fn, a scale is relative to `global`, or to 1 where that is null; if it is
// rounded to 0, so are the elements.
GEMMA_NORM_ANYWHERE Scale stored_scale(float scale, DType dtype, const float* global) {
  if (dtype == DType::kFloat32) return {same_bits<uint32_t>(scale), 1.0f / scale};
  if (dtype != DType::kFloat8E4M3FN) return {same_bits<uint32_t>(scale) >> 23 & 0xffu, 1.0f / scale};
  constexpr QuantizedFormat kE4M3 = format_of(DType::kFloat8E4M3FN);
  const float unit = global ? *global : 1.0f;
  const uint32_t bits = float_bits(scale / unit, kE4M3);
  return {bits, bits ? 1.0f / (e4m3_value(bits) * unit) : 0.0f};
}

GEMMA_NORM_ANYWHERE int64_t scale_bytes(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 1;
}

// Stores the scale of a row's group. `row` points to the scales of the row, `stride` leads from a scale to the next, or
// with kInt32 from four scales to the next four. What is left of the last four is set to 0.
GEMMA_NORM_ANYWHERE void store_scale(void* row, const Scale& scale, DType dtype, int64_t group, int64_t groups,
                                     int64_t stride) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(row)[group * stride] = same_bits<float>(scale.bits);
  } else if (dtype != DType::kInt32) {
    static_cast<uint8_t*>(row)[group * stride] = static_cast<uint8_t>(scale.bits);
  } else {
    uint8_t* const four = static_cast<uint8_t*>(row) + (group >> 2) * stride * 4;
    four[group & 3] = static_cast<uint8_t>(scale.bits);
    for (int64_t next = group + 1; group == groups - 1 && next & 3; ++next) four[next & 3] = 0;
  }
}

}  // namespace quantized
}  // namespace gemma_norm
