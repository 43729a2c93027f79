// 1 / d and 1 / sqrt(v), computed by Newton's method from the hardware's approximations. They have the bits of an IEEE
// division and an IEEE square root, at half the cost. Include it after GEMMA_NORM_DEVICE, fma() and approximate_rsqrt()
// are declared.
#pragma once

namespace gemma_norm::device {

// 1 / d, rounded to nearest even, for d from 2^-120 to 2^120. `r` is an approximation of it, off by at most one unit in
// the last place. V is a float or a vector of them, and M does arithmetic on V, as in exponential.h.
// tests/cpp/reciprocal_root_test.cpp tries every mantissa.
template <class M, class V>
GEMMA_NORM_DEVICE V refine_reciprocal(V d, V r) {
  // Start from above. From below, the reciprocal of a number whose mantissa is all ones would stay half a unit too
  // small.
  r = r * M::all(0x1.000002p0f);
  V error = M::fma(-d, r, M::all(1.0f));
  r = M::fma(r, M::fma(error, error, error), r);
  error = M::fma(-d, r, M::all(1.0f));
  return M::fma(r, error, r);
}

// 1 / sqrt(v), where the root is rounded to nearest even, and then its reciprocal. v may be from 2^-96 to the largest
// float; below that, an intermediate difference could be subnormal. `r` is an approximation of 1 / sqrt(v), off by at
// most 3 units in the last place. tests/cpp/reciprocal_root_test.cpp tries every mantissa.
GEMMA_NORM_DEVICE float refine_reciprocal_root(float v, float r) {
  float half = 0.5f * r, root = v * r;
  const float error = fma(-half, root, 0.5f);
  half = fma(half, error, half);
  root = fma(root, error, root);
  root = fma(fma(-root, root, v), half, root);
  // Start from above. From below, the reciprocal of a root whose mantissa is all ones would stay half a unit too small.
  float y = half * 0x1.000002p1f;
  y = fma(fma(-root, y, 1.0f), y, y);
  return fma(fma(-root, y, 1.0f), y, y);
}

GEMMA_NORM_DEVICE float newton_reciprocal_root(float v) {
  const bool tiny = v < 0x1p-96f;
  const float scaled = tiny ? v * 0x1p64f : v, r = approximate_rsqrt(scaled);
  const float y = refine_reciprocal_root(scaled, r) * (tiny ? 0x1p32f : 1.0f);
  return y == y ? y : r;  // for 0, Inf and NaN the steps give NaN, and the approximation is exact
}

}  // namespace gemma_norm::device
