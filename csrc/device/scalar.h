// A float as the vector of one that exponential.h computes with. Needs fma(), as_bits() and as_float().
#pragma once

namespace gemma_norm::device {

struct Scalar {
  static GEMMA_NORM_DEVICE float all(float f) { return f; }
  static GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return device::fma(a, b, c); }
  static GEMMA_NORM_DEVICE float magnitude_up_to(float g, float limit) { return fminf(fabsf(g), limit); }
  static GEMMA_NORM_DEVICE float at_least(float v, float limit) { return fmaxf(v, limit); }
  static GEMMA_NORM_DEVICE float where_negative(float g, float a, float b) { return g < 0 ? a : b; }
  static GEMMA_NORM_DEVICE float one_unless_nan(float g) { return g == g ? 1.0f : g; }
  static GEMMA_NORM_DEVICE float times_power(float p, float n) { return as_float(as_bits(p) + (as_bits(n) << 23)); }
};

}  // namespace gemma_norm::device
