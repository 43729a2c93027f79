// A float as the vector of one that exponential.h computes with. Needs fma(), as_bits(), as_float(), clamp() and
// newton_reciprocal().
#pragma once

namespace gemma_norm::device {

struct Scalar {
  static GEMMA_NORM_DEVICE float all(float f) { return f; }
  static GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return device::fma(a, b, c); }
  static GEMMA_NORM_DEVICE float clamp(float g, float low, float high) { return device::clamp(g, low, high); }
  static GEMMA_NORM_DEVICE float one_unless_nan(float g) { return g == g ? 1.0f : g; }
  static GEMMA_NORM_DEVICE float power_of_two(float n) { return as_float(as_bits(n) << 23); }
  static GEMMA_NORM_DEVICE float reciprocal(float d) { return newton_reciprocal(d); }
};

}  // namespace gemma_norm::device
