// float16 and bfloat16 by arithmetic on doubles, and float32, which is the host's. References use it, so that it shares
// neither code nor a trick with the kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gemma_norm.h"

namespace gemma_norm {

struct Format {
  int precision;        // bits of the significand, the hidden one included
  int least, greatest;  // exponents of the smallest normal number and of the largest
};
inline Format format(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return {11, -14, 15};
    case DType::kBFloat16: return {8, -126, 127};
    default: return {24, -126, 127};
  }
}
// Powers of two. They are asked for at every element, and come from a table.
inline const auto kPowers = [] {
  std::array<double, 513> all{};
  for (int e = 0; e < 513; ++e) all[e] = std::ldexp(1, e - 256);
  return all;
}();
inline double power(int exponent) { return kPowers[exponent + 256]; }

inline double largest(DType dtype) {
  const Format f = format(dtype);
  return (2 - power(1 - f.precision)) * power(f.greatest);
}

// The exponent of a number, as std::ilogb has it, but for 0 and subnormal doubles, which are below every format here.
// It is asked for several times at every element, and the library's function is not inlined.
inline int exponent_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

// The distance between neighbouring numbers of the format at `value`, which is finite.
inline double ulp(DType dtype, double value) {
  const Format f = format(dtype);
  return power(std::min(std::max(exponent_of(value), f.least), f.greatest) - f.precision + 1);
}

inline double rounded(DType dtype, double value) {
  if (dtype == DType::kFloat32) {
    const volatile float nearest =
        static_cast<float>(value);  // volatile: GCC 12 drops two such conversions when it vectorises them
    return nearest;
  }
  if (!std::isfinite(value)) return value;
  const double unit = ulp(dtype, value), nearest = std::nearbyint(value / unit) * unit;
  return std::fabs(nearest) > largest(dtype) ? std::copysign(INFINITY, value) : std::copysign(nearest, value);
}

// The bits of `value` rounded.
inline uint32_t rounded_bits(DType dtype, double value) {
  if (dtype == DType::kFloat32) {
    const float f = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
  }
  const Format f = format(dtype);
  const int fraction = f.precision - 1;
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0, infinity = ((1u << (15 - fraction)) - 1) << fraction;
  if (std::isnan(value)) return sign + infinity + (1u << (fraction - 1));
  const double magnitude = std::fabs(rounded(dtype, value));
  if (std::isinf(magnitude)) return sign + infinity;
  const double steps = magnitude / ulp(dtype, magnitude);  // below 2^fraction for subnormals, else at least that
  const uint32_t exponent = magnitude < power(f.least) ? 0 : exponent_of(magnitude) - f.least;
  return sign + (exponent << fraction) + static_cast<uint32_t>(steps);
}

// The value of a number's bits.
inline double element(DType dtype, uint32_t bits) {
  if (dtype == DType::kFloat32) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  const Format f = format(dtype);
  const int fraction = f.precision - 1, exponent = (bits & 0x7fff) >> fraction;
  const double steps = bits & ((1u << fraction) - 1), one = power(fraction);
  double value =
      exponent == 0 ? steps * power(f.least - fraction) : (one + steps) * power(exponent - 1 + f.least - fraction);
  if (exponent == 2 * f.greatest + 1) value = steps ? NAN : INFINITY;
  return bits & 0x8000 ? -value : value;
}

inline size_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
inline uint32_t bits_at(DType dtype, const void* memory) {
  uint32_t bits = 0;
  std::memcpy(&bits, memory, bytes_of(dtype));  // little-endian
  return bits;
}
inline double element_at(DType dtype, const void* memory) { return element(dtype, bits_at(dtype, memory)); }
inline void round_to(DType dtype, double value, void* memory) {
  const uint32_t bits = rounded_bits(dtype, value);
  std::memcpy(memory, &bits, bytes_of(dtype));
}

}  // namespace gemma_norm
