// The parts of operators (ops/parts.h) as GPU kernels do them. Each works on vectors of one slot: `first(k)` is the index of the
// k-th vector's first element, `step` the distance to the next, `end` the end of the row; all count from where the thread's
// pointers point.
#pragma once

#include "../ops/parts.h"
#include "row.cuh"

namespace gemma_norm::gpu {

// --- Sources

// The vectors of s, kVectors at a time: load() asks for the memory, sum() makes s of it. kReuse: whether the kernel reads s again.
// What a thread holds of the second row meanwhile is no member of it: with arrays as members, nvcc 13.0 splits 16-byte stores and
// spills.
template <class Source, class X, int kVectors, class Order, Reuse kReuse>
struct SourceOf;

template <class X, int kVectors, class Order, Reuse kReuse>
struct SourceOf<InputSource, X, kVectors, Order, kReuse> {
  const X* x;
  struct Second {};

  GEMMA_NORM_DEVICE SourceOf(const RowParams& p, const RowIndex& row, int start) : x(row.pointer<X>(p, kX, start)) {}

  template <bool kAligned, class First, class End>
  GEMMA_NORM_DEVICE void load(Vector16 (&s)[kVectors], Second (&)[kVectors], const First& first, int step, End end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned, kReuse>(x, first(k), step, end);
  }
  static constexpr bool kSumsBeforeStores = false;
  template <bool kAligned, class First, class End, class BeforeStores>
  GEMMA_NORM_DEVICE void sum(Vector16 (&)[kVectors], Second (&)[kVectors], const First&, int, End, const BeforeStores&) const {}

  // Where s is to be found again.
  GEMMA_NORM_DEVICE const X* stored() const { return x; }
};

template <class X, int kVectors, class Order, Reuse kReuse>
struct SourceOf<ResidualSource, X, kVectors, Order, kReuse> {
  const X *x, *residual, *post;
  X* residual_out;
  const RowParams& p;
  using Second = Vector16;

  GEMMA_NORM_DEVICE SourceOf(const RowParams& p, const RowIndex& row, int start)
      : x(row.pointer<X>(p, kX, start)),
        residual(row.pointer<X>(p, kResidual, start)),
        post(row.pointer<X>(p, kPost, start)),
        residual_out(row.pointer<X>(p, kResidualOut, start)),
        p(p) {}

  template <bool kAligned, class First, class End>
  GEMMA_NORM_DEVICE void load(Vector16 (&s)[kVectors], Second (&r)[kVectors], const First& first, int step, End end) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned, Reuse::kNone>(x, first(k), step, end);
    if constexpr (Order::kWholeRows) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) r[k] = load_items<kAligned, Reuse::kNone>(residual, first(k), step, end);
    }
  }

  // The sums are worked out, and before_stores() is called, before any sum is stored; else nobody calls it.
  static constexpr bool kSumsBeforeStores = Order::kWholeRows && device::kLoadsBeforeStores;
  template <bool kAligned, class First, class End, class BeforeStores>
  GEMMA_NORM_DEVICE void sum(Vector16 (&s)[kVectors], Second (&r)[kVectors], const First& first, int step, End end,
                             const BeforeStores& before_stores) const {
    if constexpr (Order::kWholeRows) {
      if (p.data[kPost]) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          r[k] = add_rounded<X>(r[k], load_items<kAligned, Reuse::kNone>(post, first(k), step, end));
      }
    }
    if constexpr (kSumsBeforeStores) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) s[k] = add_rounded<X>(s[k], r[k]);
      before_stores();
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (Order::kStoreOneByOne && !(first(k) < end)) break;
      if constexpr (!Order::kWholeRows) {
        constexpr int kBatch = kVectors / 4;
        if (k % kBatch == 0) {
          for (int i = k; i < k + kBatch; ++i) {
            r[i] = load_items<kAligned, Reuse::kNone>(residual, first(i), step, end);
            if (p.data[kPost]) r[i] = add_rounded<X>(r[i], load_items<kAligned, Reuse::kNone>(post, first(i), step, end));
          }
          for (int i = k; i < k + kBatch; ++i) {
            device::wait_for_load(r[i]);
            if constexpr (Order::kKeepPacked) device::keep_packed(&r[i]);
          }
        }
      }
      if constexpr (!kSumsBeforeStores) s[k] = add_rounded<X>(s[k], r[k]);
      if constexpr (Order::kKeepPacked) device::keep_packed(&s[k]);
      store_items<kAligned>(residual_out, first(k), step, end, s[k]);
    }
  }

  GEMMA_NORM_DEVICE const X* stored() const { return residual_out; }
};

// --- Statistics

// The sum of squares. Each of a slot's vectors adds to as many running sums as it has elements; these are added pairwise.
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
  // For the exchange.
  GEMMA_NORM_DEVICE void total(float (&numbers)[kNumbers]) {
    if constexpr (kItems<X> == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    }
    numbers[0] = (sum[0] + sum[2]) + (sum[1] + sum[3]);  // neighbours last: CDNA computes them as pairs
  }
};

template <bool kQuick>
GEMMA_NORM_DEVICE float reciprocal_std(float square_sum, const RowParams& p) {
  return device::reciprocal_root<kQuick>(device::fma(square_sum, p.inv_hidden, p.eps));
}

// --- Finishes

// out = round(Formula(s, rstd, weight + offset)). The weights of a vector of X are one 16-byte vector of W, or two where X is half
// as wide.
template <class Formula, class X, class W>
struct FinishOf {
  static constexpr int kWeightVectors = sizeof(W) / sizeof(X);
  X* out;
  const W* weight;
  const RowParams& p;
  struct Weights {
    Vector16 v[kWeightVectors];
  };

  GEMMA_NORM_DEVICE FinishOf(const RowParams& p, const RowIndex& row, int start)
      : out(row.pointer<X>(p, kOut, start)), weight(static_cast<const W*>(p.data[kWeight]) + start), p(p) {}

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE void load(Weights& w, Index first, int step, End end) const {
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i)
      w.v[i] = load_items<kAligned, Reuse::kSome>(weight, first + static_cast<Index>(i) * kItems<W> * step, step, end);
  }

  // What waits for the load waits here.
  GEMMA_NORM_DEVICE void wait_for(const Weights& w) const {
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) device::wait_for_load(w.v[i]);
  }

  template <bool kAligned, class Index, class End>
  GEMMA_NORM_DEVICE void store(Vector16 s, const Weights& w, float rstd, Index first, int step, End end) const {
    float y[kItems<X>], f[kItems<X>];
    unpack_items<X>(s, y);
#pragma unroll
    for (int i = 0; i < kWeightVectors; ++i) unpack_items<W>(w.v[i], reinterpret_cast<float(&)[kItems<W>]>(f[i * kItems<W>]));
#pragma unroll
    for (int i = 0; i < kItems<X>; ++i) {
      if constexpr (std::is_same_v<X, bfloat16> && sizeof(W) != sizeof(X)) f[i] = device::keep_nan(f[i]);
      y[i] = Formula::apply(y[i], rstd, f[i] + p.weight_offset);
    }
    store_items<kAligned>(out, first, step, end, pack_items<X>(y));
  }
};

}  // namespace gemma_norm::gpu
