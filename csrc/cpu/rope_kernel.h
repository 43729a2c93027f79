// Norms of heads and their rotation (ops/qk_norm_rope.h), written once over a vector type V, as row_kernel.h is, and
// with the same anonymous namespace.
//
// The cosines and sines of a token are converted to float32 once for all of its heads, with the sine of the first
// element of each pair negated. A head is read as a whole before any of it is written.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "../core/head_params.h"
#include "row_kernel.h"

namespace gemma_norm {
namespace {

constexpr int64_t kHeadBuffer = kMaxHeadDim + kLanes;

template <class V, class T>
void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) V::load(from + i).without_payload().store(to + i);
  if (i < count) {
    T padded[kLanes] = {};
    copy(padded, from + i, count - i);
    V::load(padded).without_payload().store(to + i);
  }
}

template <class V>
void widen(const void* from, DType dtype, int64_t offset, int64_t count, float* to) {
  switch (dtype) {
    case DType::kFloat16: return widen<V>(static_cast<const Float16*>(from) + offset, count, to);
    case DType::kBFloat16: return widen<V>(static_cast<const BFloat16*>(from) + offset, count, to);
    default: return widen<V>(static_cast<const float*>(from) + offset, count, to);
  }
}

// The offset of a token in an operand, in elements.
inline int64_t token_offset(const RowParams& p, Operand operand, int64_t token) {
  int64_t offset = 0;
  for (int d = kMaxRowDims - 1; d >= 0; --d) {
    offset += token % p.sizes[d] * p.strides[operand][d];
    token /= p.sizes[d];
  }
  return offset;
}

// What each element of a head is multiplied by, and its partner.
struct Angles {
  alignas(kCacheLine) float cos[kHeadBuffer], sin[kHeadBuffer];

  template <class V>
  [[gnu::noinline]] void load(const RowParams& p, const HeadParams& h, int64_t token) {
    if (h.cache_rows) {
      const int pairs = h.rotary / 2, axes = h.axis_stride ? Sections::kAxes : 1;
      alignas(kCacheLine) float rows[Sections::kAxes][2][kHeadBuffer];
      for (int axis = 0; axis < axes; ++axis) {
        const int64_t at = token_offset(p, kPositions, token) + axis * h.axis_stride;
        const int64_t position = p.dtypes[kPositions] == DType::kInt32
                                     ? static_cast<const int32_t*>(p.data[kPositions])[at]
                                     : static_cast<const int64_t*>(p.data[kPositions])[at];
        for (int part = 0; part < 2; ++part)
          widen<V>(p.data[kCosSinCache], p.dtypes[kCosSinCache], position * h.cache_stride + part * pairs, pairs,
                   rows[axis][part]);
      }
      for (int i = 0; i < h.rotary; ++i) {
        const int pair = h.pair_of(i), axis = h.axis(pair);
        cos[i] = rows[axis][0][pair];
        sin[i] = rows[axis][1][pair];
      }
    } else {
      widen<V>(p.data[kCos], p.dtypes[kCos], token_offset(p, kCos, token), h.rotary, cos);
      widen<V>(p.data[kSin], p.dtypes[kSin], token_offset(p, kSin, token), h.rotary, sin);
    }
    for (int i = 0; i < h.rotary; ++i)
      if (h.is_first(i)) sin[i] = -sin[i];
    for (int64_t i = h.rotary; i < h.rotary + kLanes; ++i) cos[i] = sin[i] = 0;
  }
};

// What is rounded to X beside y: nothing, the norm, or both products as well.
enum class Rounded { kNothing, kNorm, kProducts };

// The heads of q, or of k, of one token.
template <class C, class Factors>
class Heads {
  using V = typename C::V;
  using X = typename C::X;

  static constexpr bool kSixteenBits = sizeof(X) == 2;

 public:
  Heads(const RowParams& p, const HeadParams& h, Factors factors) : p_(p), h_(h), factors_(factors) {
    if (!kSixteenBits || !h.round_rotation) return;
    const bool narrow = p.dtypes[h.cache_rows ? kCosSinCache : kCos] == p.dtypes[kX];
    rounded_ = narrow ? Rounded::kProducts : Rounded::kNorm;
  }

  [[gnu::noinline]] void compute(const Angles& angles, const X* x, X* out) const {
    RowPointers<C> row;
    row.x = const_cast<X*>(x);
    const V rstd = V::broadcast(statistics<C>(p_, row, false));
    if constexpr (kSixteenBits) {
      if (rounded_ == Rounded::kProducts) return rotate<Rounded::kProducts>(angles, x, out, rstd);
      if (rounded_ == Rounded::kNorm) return rotate<Rounded::kNorm>(angles, x, out, rstd);
    }
    rotate<Rounded::kNothing>(angles, x, out, rstd);
  }

 private:
  template <Rounded kRounded>
  [[gnu::always_inline]] void rotate(const Angles& angles, const X* x, X* out, const V& rstd) const {
    if (!h_.interleaved && h_.rotary % (2 * kLanes) == 0 && p_.hidden % kLanes == 0)
      halves<kRounded>(angles, x, out, rstd);
    else
      buffered<kRounded>(angles, x, out, rstd);
  }

  // Both elements of a pair are in whole vectors. Both are read before either is written.
  template <Rounded kRounded>
  [[gnu::always_inline]] void halves(const Angles& angles, const X* x, X* out, const V& rstd) const {
    const int64_t rotary = h_.rotary, half = rotary / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
      const V first = norm<kRounded>(V::load(x + i), rstd, factors_.template at<V>(i)),
              second = norm<kRounded>(V::load(x + half + i), rstd, factors_.template at<V>(half + i));
      rotated<kRounded>(angles, i, first, second).store(out + i);
      rotated<kRounded>(angles, half + i, second, first).store(out + half + i);
    }
    for (int64_t i = rotary; i < p_.hidden; i += kLanes)
      norm<kRounded>(V::load(x + i), rstd, factors_.template at<V>(i)).store(out + i);
  }

  // Pairs of any other kind, by way of buffers.
  template <Rounded kRounded>
  [[gnu::noinline]] void buffered(const Angles& angles, const X* x, X* out, const V& rstd) const {
    alignas(kCacheLine) float n[kHeadBuffer], partner[kHeadBuffer], y[kHeadBuffer];
    const int64_t hidden = p_.hidden, rotary = h_.rotary, half = rotary / 2;
    int64_t i = 0;
    for (; i + kLanes <= hidden; i += kLanes)
      norm<kRounded>(V::load(x + i), rstd, factors_.template at<V>(i)).store(n + i);
    if (i < hidden) {
      X padded[kLanes] = {};
      copy(padded, x + i, hidden - i);
      norm<kRounded>(V::load(padded), rstd, factors_.template rest_at<V>(i, hidden - i)).store(n + i);
    }
    if (h_.interleaved) {
      for (int64_t k = 0; k < rotary; k += 2) partner[k] = n[k + 1], partner[k + 1] = n[k];
    } else {
      copy(partner, n + half, half);
      copy(partner + half, n, half);
    }
    for (int64_t k = rotary; k < rotary + kLanes; ++k) partner[k] = 0;
    for (int64_t k = 0; k < rotary; k += kLanes)
      rotated<kRounded>(angles, k, V::load(n + k), V::load(partner + k)).store(y + k);
    copy(n, y, rotary);
    for (i = 0; i + kLanes <= hidden; i += kLanes) V::load(n + i).store(out + i);
    if (i < hidden) {
      X rest[kLanes];
      V::load(n + i).store(rest);
      copy(out + i, rest, hidden - i);
    }
  }

  template <Rounded kRounded>
  [[gnu::always_inline]] V norm(const V& x, const V& rstd, const V& factor) const {
    constexpr bool kRounds = kRounded != Rounded::kNothing;
    V n = x * rstd;
    if (kRounds && h_.round_norm) n = rounded<V, X>(n);
    return rounded_if<kRounds>(n * factor);
  }
  template <Rounded kRounded>
  [[gnu::always_inline]] V rotated(const Angles& angles, int64_t i, const V& n, const V& partner) const {
    constexpr bool kRounds = kRounded == Rounded::kProducts;
    return rounded_if<kRounds>(n * V::load(angles.cos + i)) + rounded_if<kRounds>(partner * V::load(angles.sin + i));
  }
  template <bool kRounds>
  [[gnu::always_inline]] static V rounded_if(const V& v) {
    if constexpr (kRounds) return rounded<V, X>(v);
    return v;
  }

  const RowParams& p_;
  const HeadParams& h_;
  const Factors factors_;
  Rounded rounded_ = Rounded::kNothing;
};

// A token's heads that are copied.
template <class X>
void copy_heads(const RowParams& p, const CopiedHeads& copied, int64_t token) {
  for (int which = 0; which < 2; ++which) {
    const Operand from = CopiedHeads::kFrom[which], to = CopiedHeads::kTo[which];
    if (copied.heads[which] == 0) continue;
    const X* x = static_cast<const X*>(p.data[from]) + token_offset(p, from, token);
    X* out = static_cast<X*>(p.data[to]) + token_offset(p, to, token);
    for (int64_t i = 0; i < copied.heads[which]; ++i, x += copied.strides[which], out += copied.out_strides[which])
      copy(out, x, p.hidden);
  }
}

template <class V>
void compute_heads(const RowParams& p, const HeadParams& h, const CopiedHeads& copied, int64_t begin, int64_t end) {
  RowParams once = p;  // one variant serves both values of round_each_step
  once.round_each_step = 0;
  with_variant<RmsNorm, Float16, BFloat16>(once, [&](auto variant) {
    using C = Choice<V, RmsNorm, decltype(variant)>;
    using X = typename C::X;
    const auto compute = [&](const Angles& angles, int64_t token, int which, auto factors) {
      const Operand in = which ? kKey : kX, result = which ? kKeyOut : kOut;
      const Heads<C, decltype(factors)> heads(once, h, factors);
      const X* x = static_cast<const X*>(p.data[in]) + token_offset(p, in, token);
      X* out = static_cast<X*>(p.data[result]) + token_offset(p, result, token);
      for (int64_t i = 0; i < h.heads[which]; ++i, x += h.strides[which], out += h.out_strides[which])
        heads.compute(angles, x, out);
    };
    Angles angles;
    for (int64_t token = begin; token < end; ++token) {
      angles.template load<V>(p, h, token);
      for (int which = 0; which < 2; ++which) {
        if constexpr (C::kHasWeight) {
          using W = typename C::W;
          compute(angles, token, which,
                  StoredWeights<X, W>{static_cast<const W*>(p.data[which ? kKeyWeight : kWeight]), p.weight_offset});
        } else {
          compute(angles, token, which, Ones());
        }
      }
      copy_heads<X>(p, copied, token);
    }
  });
}

}  // namespace
}  // namespace gemma_norm
