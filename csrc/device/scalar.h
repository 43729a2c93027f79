// The arithmetic that exponential.h needs, on one float at a time. Include it after fma(), as_bits(), as_float(),
// clamp() and approximate_reciprocal() are declared.
#pragma once

namespace gemma_norm::device {

struct Scalar {
  static constexpr int kCount = 1;
  static GEMMA_NORM_DEVICE float load(const float* f) { return *f; }
  static GEMMA_NORM_DEVICE void store(float v, float* f) { *f = v; }

  static GEMMA_NORM_DEVICE float all(float f) { return f; }
  static GEMMA_NORM_DEVICE float fma(float a, float b, float c) { return device::fma(a, b, c); }
  static GEMMA_NORM_DEVICE float clamp(float g, float low, float high) { return device::clamp(g, low, high); }
  static GEMMA_NORM_DEVICE float one_unless_nan(float g) { return g == g ? 1.0f : g; }
  static GEMMA_NORM_DEVICE float power_of_two(float n) { return as_float(as_bits(n) << 23); }
  static GEMMA_NORM_DEVICE float reciprocal(float d) { return refine_reciprocal<Scalar>(d, approximate_reciprocal(d)); }
};

}  // namespace gemma_norm::device
