// What differs between the backward operators, for one vector of a row:
//
//   load()    starts the loads that may be made a row ahead
//   prefetch() has them brought closer instead
//   hold()    what is needed of the row besides, once it is its turn
//   wait_for() see device::wait_for_load
//   values()  s, which was normalised, and u, the gradient of n * w, where n = s * rstd and w is the weight's factor;
//             without Held, it is computed anew
//   store()   dx, and dgate if there is a gate, from ds, the gradient of s
//
// The kernels compute the rest from s and u: ds = rstd * (u * w - n * mean(u * w * n)), and dweight, the sum of u * n.
#pragma once

#include "backward_rows.cuh"
#include "policies.cuh"

namespace gemma_norm::gpu {

// RMSNorm of x, with elements of X in x and of Y in dout: s is x, and u is dout.
template <class X_, class Y>
struct PlainTerms {
  using X = X_;
  static constexpr bool kGated = false;
  static constexpr int kCount = kItems<X>;
  struct Loaded {
    Vector16 x, dout;
  };
  struct Held {
    Vector16 dsum;
  };

  template <bool kAligned, Reuse kReuse, class At, class Index, class End>
  static GEMMA_NORM_DEVICE void load(const RowParams& p, const At& at, Index first, int step, End end, Loaded& v) {
    v.x = load_items<kAligned, kReuse, kCount>(at.template pointer<X>(p, kX), first, step, end);
    v.dout = load_items<kAligned, kReuse, kCount>(at.template pointer<Y>(p, kDOut), first, step, end);
  }
  static GEMMA_NORM_DEVICE void prefetch(const RowParams& p, const ShortRowSteps& at, int first) {
    device::prefetch(at.template pointer<X>(p, kX) + first);
    device::prefetch(at.template pointer<Y>(p, kDOut) + first);
  }
  template <bool kAligned, class At, class Index>
  static GEMMA_NORM_DEVICE void hold(const RowParams& p, const At& at, Index first, int step, Index end, const Loaded&,
                                     Held& held) {
    if (p.data[kDSum])
      held.dsum = load_items<kAligned, Reuse::kNone, kCount>(at.template pointer<X>(p, kDSum), first, step, end);
  }
  static GEMMA_NORM_DEVICE void wait_for(const Loaded& v) {
    device::wait_for_load(v.x);
    device::wait_for_load(v.dout);
  }
  static GEMMA_NORM_DEVICE void values(const RowParams& p, const Loaded& v, const Held&, float (&s)[kCount],
                                       float (&u)[kCount]) {
    values(p, v, s, u);
  }
  static GEMMA_NORM_DEVICE void values(const RowParams&, const Loaded& v, float (&s)[kCount], float (&u)[kCount]) {
    unpack_items<X>(v.x, s);
    unpack_items<Y>(v.dout, u);
  }
  // `n` and `w` are for the gradient of a gate.
  template <bool kAligned, class At, class Index>
  static GEMMA_NORM_DEVICE void store(const RowParams& p, const At& at, Index first, int step, Index end, const Loaded&,
                                      const Held& held, const float (&)[kCount], const float (&)[kCount],
                                      float (&ds)[kCount]) {
    if (p.data[kDSum]) {
      float dsum[kCount];
      unpack_items<X>(held.dsum, dsum);
#pragma unroll
      for (int i = 0; i < kCount; ++i) ds[i] += dsum[i];
    }
    store_items<kAligned, kCount>(at.template pointer<X>(p, kDX), first, step, end, pack_items<X>(ds));
  }
};

// The gated norm, whose activation a is silu or the logistic function of the gate. With norm_before_gate, s is x and u
// is dout * a; otherwise s is x * a and u is dout.
template <class X_>
struct GatedTerms {
  using X = X_;
  static constexpr bool kGated = true;
  static constexpr int kCount = kItems<X>;
  struct Loaded {
    Vector16 x, dout, gate;
  };
  struct Held {
    float logistic[kCount];  // of the gate, since computing it takes more time than all else
  };

  template <bool kAligned, Reuse kReuse, class At, class Index, class End>
  static GEMMA_NORM_DEVICE void load(const RowParams& p, const At& at, Index first, int step, End end, Loaded& v) {
    v.x = load_items<kAligned, kReuse, kCount>(at.template pointer<X>(p, kX), first, step, end);
    v.dout = load_items<kAligned, kReuse, kCount>(at.template pointer<X>(p, kDOut), first, step, end);
    v.gate = load_items<kAligned, kReuse, kCount>(at.template pointer<X>(p, kGate), first, step, end);
  }
  static GEMMA_NORM_DEVICE void prefetch(const RowParams& p, const ShortRowSteps& at, int first) {
    for (const Operand operand : {kX, kDOut, kGate}) device::prefetch(at.template pointer<X>(p, operand) + first);
  }
  template <bool kAligned, class At, class Index>
  static GEMMA_NORM_DEVICE void hold(const RowParams&, const At&, Index, int, Index, const Loaded& v, Held& held) {
    compute(v, held);
  }
  static GEMMA_NORM_DEVICE void wait_for(const Loaded& v) {
    device::wait_for_load(v.x);
    device::wait_for_load(v.dout);
    device::wait_for_load(v.gate);
  }
  static GEMMA_NORM_DEVICE void values(const RowParams& p, const Loaded& v, const Held& held, float (&s)[kCount],
                                       float (&u)[kCount]) {
    float gate[kCount];
    unpack_items<X>(v.x, s);
    unpack_items<X>(v.dout, u);
    unpack_items<X>(v.gate, gate);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float a = p.sigmoid ? held.logistic[i] : gate[i] * held.logistic[i];
      // Not a choice between two places: clang 15 then keeps both arrays in memory.
      u[i] = p.norm_before_gate ? u[i] * a : u[i];
      s[i] = p.norm_before_gate ? s[i] : s[i] * a;
    }
  }
  static GEMMA_NORM_DEVICE void values(const RowParams& p, const Loaded& v, float (&s)[kCount], float (&u)[kCount]) {
    Held held;
    compute(v, held);
    values(p, v, held, s, u);
  }
  template <bool kAligned, class At, class Index>
  static GEMMA_NORM_DEVICE void store(const RowParams& p, const At& at, Index first, int step, Index end,
                                      const Loaded& v, const Held& held, const float (&n)[kCount],
                                      const float (&w)[kCount], float (&ds)[kCount]) {
    float x[kCount], dout[kCount], gate[kCount];
    unpack_items<X>(v.x, x);
    unpack_items<X>(v.dout, dout);
    unpack_items<X>(v.gate, gate);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // The activation and its slope: l and l (1 - l), or g l and l + g l (1 - l).
      const float l = held.logistic[i], rest = l * (1.0f - l);
      const float a = p.sigmoid ? l : gate[i] * l, slope = p.sigmoid ? rest : device::fma(gate[i], rest, l);
      const float upstream = p.norm_before_gate ? dout[i] * n[i] * w[i] : ds[i] * x[i];
      gate[i] = upstream * slope;
      if (!p.norm_before_gate) ds[i] *= a;
    }
    store_items<kAligned, kCount>(at.template pointer<X>(p, kDX), first, step, end, pack_items<X>(ds));
    store_items<kAligned, kCount>(at.template pointer<X>(p, kDGate), first, step, end, pack_items<X>(gate));
  }

 private:
  static GEMMA_NORM_DEVICE void compute(const Loaded& v, Held& held) {
    unpack_items<X>(v.gate, held.logistic);
    activate<formulas::Activation::kSigmoid>(held.logistic);
  }
};

}  // namespace gemma_norm::gpu
