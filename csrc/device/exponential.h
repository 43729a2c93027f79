// The exponential, and the activations of gates made of it, from additions, multiplications and fused multiply-adds alone: each of
// these is rounded as IEEE says on every device, so the results have the same bits on all of them.
//
// V is a float (an element in a GPU's lane) or a vector of them (on a CPU). M does arithmetic on V:
//
//   M::all(f)                     a V of f
//   M::fma(a, b, c)               a * b + c, rounded once
//   M::magnitude_up_to(g, limit)  min(|g|, limit); of a NaN, limit
//   M::at_least(v, limit)         max(v, limit); of a NaN, limit
//   M::where_negative(g, a, b)    g < 0 ? a : b
//   M::one_unless_nan(g)          1; a NaN for a NaN
//   M::times_power(p, n)          p * 2^k, where k is what the low bits of n's fraction hold
#pragma once

#include "anywhere.h"

namespace gemma_norm::formulas {

// 2^64 exp(-t) for t from 0 to 125, within 0.9 units in the last place. The power keeps it a normal number: exp(-t) itself is
// subnormal from 87.4 on.
template <class M, class V>
GEMMA_NORM_ANYWHERE V scaled_exponential(const V& t) {
  // exp(-t) = 2^k exp(r) with |r| <= log(2) / 2. Numbers from 2^23 to 2^24 are the integers, so adding 1.5 * 2^23 rounds to one,
  // and leaves it in the low bits: k + 64 here.
  constexpr float kInteger = 0x1.8p23f + 64;
  const V shifted = M::fma(t, M::all(-0x1.715476p0f), M::all(kInteger));  // -log2(e)
  const V k = shifted + M::all(-kInteger);
  // log(2) in two parts, as k log(2) must be more exact than a float is.
  V r = M::fma(k, M::all(-0x1.62e4p-1f), t * M::all(-1.0f));
  r = M::fma(k, M::all(-0x1.7f7d1cp-20f), r);
  // The polynomial of degree 6 that is nearest to exp(r), relative to it: 3e-9 off at most.
  V p = M::all(0x1.6a4cb4p-10f);
  p = M::fma(p, r, M::all(0x1.123986p-7f));
  p = M::fma(p, r, M::all(0x1.5558bp-5f));
  p = M::fma(p, r, M::all(0x1.555492p-3f));
  p = M::fma(p, r, M::all(0x1.fffffcp-2f));
  p = M::fma(p, r, M::all(1.0f));
  p = M::fma(p, r, M::all(1.0f));
  return M::times_power(p, shifted);
}

// 1 / d for d from 1 to 2, within a unit in the last place.
template <class M, class V>
GEMMA_NORM_ANYWHERE V reciprocal(const V& d) {
  // The parabola that is nearest to 1 / d, relative to it, is 1 % off; each of Newton's steps squares that.
  V r = M::fma(M::fma(M::all(32.0f / 99), d, M::all(-144.0f / 99)), d, M::all(210.0f / 99));
  for (int step = 0; step < 2; ++step) {
    const V error = M::fma(d * M::all(-1.0f), r, M::all(1.0f));
    r = M::fma(r, error, r);
  }
  return r;
}

// n / d for d from 1 to 2: but for rare cases, the nearest number.
template <class M, class V>
GEMMA_NORM_ANYWHERE V quotient(const V& n, const V& d) {
  const V r = reciprocal<M>(d), q = n * r;
  // How much too large q is. Of an infinite n that is a NaN, from which at_least() makes a number: so the quotient stays infinite.
  // The signs are such that a quotient of -0 stays -0.
  const V excess = M::at_least(M::fma(d, q, n * M::all(-1.0f)), -0x1.fffffep127f);
  return M::fma(excess * M::all(-1.0f), r, q);
}

// silu(g) = g / (1 + exp(-g)) or, with kSigmoid, 1 / (1 + exp(-g)), within 3.2 units in the last place. For negative g it is
// computed from exp(g), so that no number overflows.
template <class M, bool kSigmoid, class V>
GEMMA_NORM_ANYWHERE V activation(const V& g) {
  const V t = M::magnitude_up_to(g, 125);  // beyond, the results for negative g are zero
  const V e = scaled_exponential<M>(t);
  const V d = M::fma(e, M::all(0x1p-64f), M::all(1.0f));
  if constexpr (kSigmoid)
    return quotient<M>(M::where_negative(g, e * M::all(0x1p-64f), M::one_unless_nan(g)), d);
  else
    return quotient<M>(M::where_negative(g, t * e * M::all(-0x1p-64f), g), d);
}

}  // namespace gemma_norm::formulas
