// The parts of operators (ops/parts.h) in GPU kernels. Each works on the vectors of one slot: `first(k)` is the index
// of the first element of the k-th vector, `step` the distance to the vector's next element, and `end` the end of the
// row. Indices count from the element that the thread's pointers point to.
#pragma once

#include "../device/exponential.h"
#include "../ops/variants.h"
#include "row.cuh"

namespace gemma_norm::gpu {

// The activations of a vector of gates, in place or into `a`.
template <formulas::Activation kActivation, int kCount>
GEMMA_NORM_DEVICE void activate(float (&gates)[kCount]) {
  using M = device::Arithmetic;
#pragma unroll
  for (int i = 0; i < kCount; i += M::kCount)
    M::store(formulas::activation<M, kActivation>(M::load(gates + i)), gates + i);
}
template <class X, int kCount>
GEMMA_NORM_DEVICE void activate(Vector16 gate, bool sigmoid, float (&a)[kCount]) {
  unpack_items<X>(gate, a);
  if (sigmoid) {
    activate<formulas::Activation::kSigmoid>(a);
  } else {
    activate<formulas::Activation::kSilu>(a);
  }
}

// --- Sources

// A source gives the vectors of s, kVectors at a time. load() starts the loads, sum() turns what they bring into s. In
// a kernel that does not hold s, read_again() gives one vector of s a second time; kReuse says whether the kernel calls
// it. The vectors of the second row (residual or gate) are not members of the source but are passed to it, because nvcc
// 13.0 splits 16-byte stores and spills registers if arrays are members.
template <class Source, class V, int kVectors, class Order, Reuse kReuse>
struct SourceOf;

template <class V, int kVectors, class Order, Reuse kReuse>
struct SourceOf<InputSource, V, kVectors, Order, kReuse> {
  using X = typename V::X;
  static constexpr int kCount = kItems<X>;
  const X* x;
  struct Second {};

  GEMMA_NORM_DEVICE SourceOf(const RowParams& p, const RowIndex& row, int start) : x(row.pointer<X>(p, kX, start)) {}

  template <bool kAligned, class First, class End>
  GEMMA_NORM_DEVICE void load(Vector16 (&s)[kVectors], Second (&)[kVectors], const First& first, int step,
                              End end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned, kReuse, kCount>(x, first(k), step, end);
  }
  static constexpr bool kSumsBeforeStores = false;
  template <bool kAligned, class First, class End, class BeforeStores>
  GEMMA_NORM_DEVICE void sum(Vector16 (&)[kVectors], Second (&)[kVectors], const First&, int, End,
                             const BeforeStores&) const {}

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE Vector16 read_again(Index first, int step, End end) const {
    return load_items<kAligned, Reuse::kNone, kCount>(x, first, step, end);
  }
};

template <class V, int kVectors, class Order, bool kTakesPost>
struct SumSource {
  using X = typename V::X;
  using S = typename V::S;
  static constexpr int kCount = kItems<S>;
  const X* x;
  const S *residual, *post;
  S* residual_out;
  const RowParams& p;
  using Second = Vector16;

  GEMMA_NORM_DEVICE SumSource(const RowParams& p, const RowIndex& row, int start)
      : x(row.pointer<X>(p, kX, start)),
        residual(row.pointer<S>(p, kResidual, start)),
        post(row.pointer<S>(p, kPost, start)),
        residual_out(row.pointer<S>(p, kResidualOut, start)),
        p(p) {}

  template <bool kAligned, class First, class End>
  GEMMA_NORM_DEVICE void load(Vector16 (&s)[kVectors], Second (&r)[kVectors], const First& first, int step,
                              End end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned, Reuse::kNone, kCount>(x, first(k), step, end);
    if constexpr (Order::kWholeRows) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        r[k] = load_items<kAligned, Reuse::kNone, kCount>(residual, first(k), step, end);
    }
  }

  // If true, sum() first computes all sums, then calls before_stores(), then stores the sums. If false, it stores each
  // sum when it is computed and never calls before_stores().
  static constexpr bool kSumsBeforeStores = Order::kWholeRows && device::kLoadsBeforeStores;
  template <bool kAligned, class First, class End, class BeforeStores>
  GEMMA_NORM_DEVICE void sum(Vector16 (&s)[kVectors], Second (&r)[kVectors], const First& first, int step, End end,
                             const BeforeStores& before_stores) const {
    if constexpr (Order::kWholeRows) {
      if (kTakesPost && p.data[kPost]) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          r[k] = add_rounded<S, S>(r[k], load_items<kAligned, Reuse::kNone, kCount>(post, first(k), step, end));
      }
    }
    if constexpr (kSumsBeforeStores) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) s[k] = add_rounded<X, S>(s[k], r[k]);
      before_stores();
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (Order::kStoreOneByOne && !(first(k) < end)) break;
      if constexpr (!Order::kWholeRows) {
        constexpr int kBatch = kVectors / 4;
        if (k % kBatch == 0) {
          for (int i = k; i < k + kBatch; ++i) {
            r[i] = load_items<kAligned, Reuse::kNone, kCount>(residual, first(i), step, end);
            if (kTakesPost && p.data[kPost])
              r[i] = add_rounded<S, S>(r[i], load_items<kAligned, Reuse::kNone, kCount>(post, first(i), step, end));
          }
          for (int i = k; i < k + kBatch; ++i) {
            device::wait_for_load(r[i]);
            if constexpr (Order::kKeepPacked) device::keep_packed(&r[i]);
          }
        }
      }
      if constexpr (!kSumsBeforeStores) s[k] = add_rounded<X, S>(s[k], r[k]);
      if constexpr (Order::kKeepPacked) device::keep_packed(&s[k]);
      store_items<kAligned, kCount>(residual_out, first(k), step, end, s[k]);
    }
  }

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE Vector16 read_again(Index first, int step, End end) const {  // the thread wrote these itself
    return load_items<kAligned, Reuse::kNone, kCount>(residual_out, first, step, end);
  }
};

template <class V, int kVectors, class Order, Reuse kReuse>
struct SourceOf<ResidualSource, V, kVectors, Order, kReuse> : SumSource<V, kVectors, Order, true> {
  using SumSource<V, kVectors, Order, true>::SumSource;
};

// Between load() and sum(), the kernel replaces the vectors of x by those of its norm.
template <class V, int kVectors, class Order, Reuse kReuse>
struct SourceOf<NormedResidualSource, V, kVectors, Order, kReuse> : SumSource<V, kVectors, Order, false> {
  using SumSource<V, kVectors, Order, false>::SumSource;
};

template <class V, int kVectors, class Order, Reuse kReuse>
struct SourceOf<GatedSource, V, kVectors, Order, kReuse> {
  using X = typename V::X;
  static constexpr int kCount = kItems<float>;
  const X *x, *gate;
  const RowParams& p;
  using Second = Vector16;

  GEMMA_NORM_DEVICE SourceOf(const RowParams& p, const RowIndex& row, int start)
      : x(row.pointer<X>(p, kX, start)), gate(row.pointer<X>(p, kGate, start)), p(p) {}

  template <bool kAligned, class First, class End>
  GEMMA_NORM_DEVICE void load(Vector16 (&s)[kVectors], Second (&g)[kVectors], const First& first, int step,
                              End end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned, kReuse, kCount>(x, first(k), step, end);
    if (Order::kWholeRows && p.data[kGate]) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) g[k] = load_items<kAligned, kReuse, kCount>(gate, first(k), step, end);
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) device::leave_unset(&g[k]);
    }
  }

  static constexpr bool kSumsBeforeStores = false;
  template <bool kAligned, class First, class End, class BeforeStores>
  GEMMA_NORM_DEVICE void sum(Vector16 (&s)[kVectors], Second (&g)[kVectors], const First& first, int step, End end,
                             const BeforeStores&) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!Order::kWholeRows && p.data[kGate]) g[k] = load_items<kAligned, kReuse, kCount>(gate, first(k), step, end);
      s[k] = gated(s[k], g[k]);
    }
  }

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE Vector16 read_again(Index first, int step, End end) const {
    const Vector16 s = load_items<kAligned, Reuse::kNone, kCount>(x, first, step, end);
    return gated(s, p.data[kGate] ? load_items<kAligned, Reuse::kNone, kCount>(gate, first, step, end) : Vector16{});
  }

 private:
  GEMMA_NORM_DEVICE Vector16 gated(Vector16 x, Vector16 gate) const {
    float s[kCount], g[kCount];
    unpack_items<X>(x, s);
    if (p.data[kGate]) {
      activate<X>(gate, p.sigmoid, g);
#pragma unroll
      for (int i = 0; i < kCount; ++i) s[i] *= g[i];
    }
    return pack_items<float>(s);
  }
};

// --- Statistics

// The sum of squares. A slot has one running sum for each element of a vector; every vector of the slot adds its
// squares to them. At the end the running sums are added pairwise.
template <class X>
struct SquareSum {
  static constexpr int kNumbers = 1;
  float sum[kItems<X>] = {};

  GEMMA_NORM_DEVICE void add(Vector16 s) {
    float f[kItems<X>];
    unpack_items<X>(s, f);
#pragma unroll
    for (int i = 0; i < kItems<X>; ++i) sum[i] = device::fma(f[i], f[i], sum[i]);
  }
  // The same for two threads that share a slot: this one holds the slot's vector number `own`, the lane 2^log2_slots
  // away the other one. They swap vectors, and both add both in the same order.
  GEMMA_NORM_DEVICE void add_pair(Vector16 s, int own, int log2_slots) {
    Vector16 other, first, second;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      other.word[w] = device::as_bits(device::value_of_lane(1 << log2_slots, device::as_float(s.word[w])));
      first.word[w] = own ? other.word[w] : s.word[w];
      second.word[w] = own ? s.word[w] : other.word[w];
    }
    add(first);
    add(second);
  }
  // What a thread contributes to the exchange.
  GEMMA_NORM_DEVICE void total(float (&numbers)[kNumbers]) {
    if constexpr (kItems<X> == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    }
    numbers[0] = (sum[0] + sum[2]) + (sum[1] + sum[3]);  // neighbours last: CDNA adds two floats at once
  }
};

template <bool kQuick, class Params>
GEMMA_NORM_DEVICE float reciprocal_std(float square_sum, const Params& p) {
  return device::reciprocal_root<kQuick>(device::fma(square_sum, p.inv_hidden, p.eps));
}

// --- Finishes

// out = round(Formula(s, rstd, weight + offset)). The norm that x may have of its own is the same with post_weight.
template <class V>
struct FinishOf {
  using Formula = typename V::Form::Formula;
  using X = typename V::X;
  using S = typename V::S;
  using W = typename V::W;
  static constexpr int kCount = kItems<S>;  // elements of a vector of s; their weights take up to two vectors
  static constexpr int kWeightVectors = !V::kHasWeight ? 0 : sizeof(W) > sizeof(S) ? 2 : 1;
  static constexpr int kWeightCount = kCount / (kWeightVectors == 2 ? 2 : 1);
  // A float32 NaN can have all its fraction bits below those of bfloat16; see device::keep_nan.
  static constexpr bool kKeepNan = std::is_same_v<X, bfloat16> && sizeof(S) > sizeof(X);
  using Out = std::conditional_t<V::Form::kQuantizes, uint8_t, X>;

  Out* out;
  const W* weight;
  const W* post_weight = nullptr;
  const X* gate = nullptr;
  const RowParams& p;
  struct WeightVectors {
    Vector16 v[kWeightVectors ? kWeightVectors : 1];
  };
  struct Nothing {};
  using HeldWeights = std::conditional_t<V::kHasWeight, WeightVectors, Nothing>;
  // The gates of a vector and, once activate_gate() was called, their activations.
  struct GateVector {
    Vector16 packed;
    float activation[kCount];
  };
  using Gate = std::conditional_t<Formula::kGated, GateVector, Nothing>;

  GEMMA_NORM_DEVICE FinishOf(const RowParams& p, const RowIndex& row, int start)
      : out(row.pointer<Out>(p, kOut, start)), weight(static_cast<const W*>(p.data[kWeight]) + start), p(p) {
    if constexpr (V::Form::kGroups) weight = row.pointer<W>(p, kWeight, start);
    if constexpr (V::Form::kNormsX) post_weight = static_cast<const W*>(p.data[kPostWeight]) + start;
    if constexpr (Formula::kGated) gate = row.pointer<X>(p, kGate, start);
  }

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE void load_gate(Gate& g, Index first, int step, End end) const {
    if constexpr (Formula::kGated)
      if (p.data[kGate]) g.packed = load_items<kAligned, Reuse::kNone, kCount>(gate, first, step, end);
  }
  GEMMA_NORM_DEVICE void activate_gate(Gate& g) const {
    if constexpr (Formula::kGated) {
      if (p.data[kGate]) {
        activate<X>(g.packed, p.sigmoid, g.activation);
      } else {
#pragma unroll
        for (float& a : g.activation) a = 1.0f;
      }
    }
  }

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE static void load(HeldWeights& w, const W* weight, Index first, int step, End end) {
    if constexpr (V::kHasWeight) {
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i)
        w.v[i] = load_items<kAligned, Reuse::kSome, kWeightCount>(
            weight, first + static_cast<Index>(i) * kWeightCount * step, step, end);
    }
  }

  // See device::wait_for_load.
  GEMMA_NORM_DEVICE void wait_for(const HeldWeights& w) const {
    if constexpr (V::kHasWeight) {
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i) device::wait_for_load(w.v[i]);
    }
  }

  // y before it is rounded.
  GEMMA_NORM_DEVICE void unrounded(Vector16 s, const HeldWeights& w, const Gate& gate, float rstd,
                                   float (&y)[kCount]) const {
    float f[kCount];
    unpack_items<S>(s, y);
    if constexpr (V::kHasWeight) {
#pragma unroll
      for (int i = 0; i < kWeightVectors; ++i)
        unpack_items<W>(w.v[i], reinterpret_cast<float(&)[kWeightCount]>(f[i * kWeightCount]));
    }
    const auto round = [](float v) {
      if constexpr (V::kRoundEachStep) return rounded<X>(v);
      return v;
    };
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (!V::kHasWeight) {
        f[i] = 1.0f;
      } else {
        if constexpr (std::is_same_v<X, bfloat16> && sizeof(W) != sizeof(X)) f[i] = device::keep_nan(f[i]);
        if constexpr (V::Form::kGemma) f[i] += p.weight_offset;
      }
      if constexpr (kKeepNan) y[i] = device::keep_nan(y[i]);
      if constexpr (Formula::kGated)
        y[i] = Formula::apply(y[i], rstd, f[i], gate.activation[i], round);
      else
        y[i] = Formula::apply(y[i], rstd, f[i], round);
    }
  }
  GEMMA_NORM_DEVICE Vector16 norm(Vector16 s, const HeldWeights& w, const Gate& gate, float rstd) const {
    float y[kCount];
    unrounded(s, w, gate, rstd, y);
    return pack_items<X>(y);
  }
  // What is quantised.
  GEMMA_NORM_DEVICE void to_quantize(Vector16 s, const HeldWeights& w, const Gate& gate, float rstd,
                                     float (&y)[kCount]) const {
    unrounded(s, w, gate, rstd, y);
    if (!p.round_first) return;
#pragma unroll
    for (float& f : y) f = rounded<X>(f);
  }
  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE void store(Vector16 s, const HeldWeights& w, const Gate& gate, float rstd, Index first, int step,
                               End end) const {
    store_items<kAligned, kCount>(out, first, step, end, norm(s, w, gate, rstd));
  }
};

}  // namespace gemma_norm::gpu
