// The exponential function and the activations of gates. They consist of additions, multiplications, fused
// multiply-adds and one division, each of which every device rounds as IEEE 754 says. The results therefore have the
// same bits on all devices.
//
// V is a float (an element in a GPU's lane) or a vector of them (on a CPU). M does arithmetic on V:
//
//   M::all(f)                a V of f
//   M::fma(a, b, c)          a * b + c, rounded once
//   M::clamp(g, low, high)   min(max(g, low), high); for a NaN, either bound
//   M::one_unless_nan(g)     1; for a NaN, a NaN
//   M::power_of_two(n)       2^(k - 127), where k, from 1 to 254, is the integer in the low bits of n's fraction
//   M::reciprocal(d)         1 / d, rounded to nearest even, for d from 2^-64 to 2^120
#pragma once

#include "anywhere.h"

namespace gemma_norm::formulas {

// fraction * power is 2^-64 exp(-g), with an error of at most 0.9 units in the last place.
template <class V>
struct Exponential {
  V fraction, power;
};

// For g from -125 to 43. The factor 2^-64 is there because exp(125) does not fit into a float.
template <class M, class V>
GEMMA_NORM_ANYWHERE Exponential<V> exponential(const V& g) {
  // exp(-g) = 2^k exp(r) with |r| <= log(2) / 2. Between 2^23 and 2^24 the floats are the integers. Adding 1.5 * 2^23
  // therefore rounds to an integer and leaves it in the low bits: k - 64 + 127 here.
  constexpr float kInteger = 0x1.8p23f - 64 + 127;
  const V shifted = M::fma(g, M::all(-0x1.715476p0f), M::all(kInteger));  // -log2(e)
  const V k = shifted + M::all(-kInteger);
  // log(2) is the sum of two constants, because a float is not exact enough for k log(2).
  V r = M::fma(k, M::all(-0x1.62e4p-1f), g * M::all(-1.0f));
  r = M::fma(k, M::all(-0x1.7f7d1cp-20f), r);
  // The polynomial of degree 6 with the smallest relative error for exp(r), at most 3e-9.
  V p = M::all(0x1.6a4cb4p-10f);
  p = M::fma(p, r, M::all(0x1.123986p-7f));
  p = M::fma(p, r, M::all(0x1.5558bp-5f));
  p = M::fma(p, r, M::all(0x1.555492p-3f));
  p = M::fma(p, r, M::all(0x1.fffffcp-2f));
  p = M::fma(p, r, M::all(1.0f));
  p = M::fma(p, r, M::all(1.0f));
  return {p, M::power_of_two(shifted)};
}

enum class Activation { kSigmoid, kSilu };

// sigmoid(g) = 1 / (1 + exp(-g)), with an error of at most 2.5 units in the last place. Below -87.3 it is subnormal;
// the error is then at most 1.5 * 2^-149. For a NaN, the sigmoid of either bound of the clamp.
template <class M, class V>
GEMMA_NORM_ANYWHERE V sigmoid_unless_nan(const V& g) {
  // The clamp changes no result: above 43, 1 + exp(-g) rounds to 1, and below -125, its reciprocal rounds to 0.
  const Exponential<V> e = exponential<M>(M::clamp(g, -125, 43));
  return M::reciprocal(M::fma(e.fraction, e.power, M::all(0x1p-64f))) * M::all(0x1p-64f);
}

// sigmoid(g), or silu(g) = g * sigmoid(g), whose error is at most 3 units in the last place and, below -87.3, |g| times
// that of the sigmoid.
template <class M, Activation kActivation, class V>
GEMMA_NORM_ANYWHERE V activation(const V& g) {
  const V sigmoid = sigmoid_unless_nan<M>(g);
  return sigmoid * (kActivation == Activation::kSilu ? g : M::one_unless_nan(g));
}

}  // namespace gemma_norm::formulas
