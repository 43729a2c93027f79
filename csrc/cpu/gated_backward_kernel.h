// The kernels of the gated norm's backward pass; ops/gated_rms_norm_backward.h has the formulas. Everything about the
// norm is computed by backward_kernel.h, for a row of s and u. One of the two is an operand of the call; the other is a
// product with the activation, a row of float32 in a buffer.
//
//   activate  computes the logistic function of the gate, and the product: u with norm_before_gate, otherwise s
//   finish    computes dx and dgate, and adds u * n to the partial sums
//
// Between them is gradient_statistics(). The first pass reads everything of a row that it needs before the second
// writes, and each vector of the second is written after all its loads, so an output may be an input's memory. Part of
// backward_kernel.h, with the same anonymous namespace.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backward_kernel.h"

namespace gemma_norm {
namespace {

// Points to one row of each operand.
template <class X>
struct GatedGradientRow {
  X *x = nullptr, *gate = nullptr, *dout = nullptr, *dx = nullptr, *dgate = nullptr;

  template <class Visit>
  void each(const Visit& visit) {
    visit(kX, x);
    visit(kGate, gate);
    visit(kDOut, dout);
    visit(kDX, dx);
    visit(kDGate, dgate);
  }
};

template <class V, class X, bool kNormBeforeGate>
class GatedRow {
  using Norm = std::conditional_t<kNormBeforeGate, GradientRow<X, float>, GradientRow<float, X>>;
  using NormDifferentiator = Differentiator<V, Norm, 1>;

 public:
  GatedRow(const RowParams& p, const float* factors, const GatedGradientRow<X>& row, float* buffer, int64_t columns,
           bool nontemporal)
      : p_(p),
        factors_(factors),
        row_(row),
        logistic_(buffer),
        product_(buffer + columns),
        nontemporal_(V::kHasNontemporalStores && nontemporal) {}

  void activate() const {
    int64_t i = 0;
    for (; i + kLanes <= p_.hidden; i += kLanes) activate(i, other() + i, row_.gate + i);
    if (i < p_.hidden) activate_rest(i, p_.hidden - i);
  }

  void finish(float* partial) const {
    Norm rows[1];
    rows[0] = norm();
    const GradientStatistics statistics[1] = {gradient_statistics<V>(p_, factors_, rows[0])};
    // ds, which goes to the buffer without norm_before_gate, is soon read again.
    const NormDifferentiator differentiator(factors_, partial, rows, statistics, kNormBeforeGate && nontemporal_);
    const V rstd = V::broadcast(statistics[0].rstd);
    int64_t i = 0;
    for (; i + kLanes <= p_.hidden; i += kLanes) vector(differentiator, rstd, i);
    if (i < p_.hidden) rest(differentiator, rstd, i, p_.hidden - i);
  }

 private:
  Norm norm() const {
    Norm norm;
    if constexpr (kNormBeforeGate) {
      norm.x = row_.x;
      norm.dout = product_;
      norm.dx = row_.dx;
    } else {
      norm.x = norm.dx = product_;  // ds takes the place of s
      norm.dout = row_.dout;
    }
    return norm;
  }

  // What the activation is multiplied by.
  const X* other() const { return kNormBeforeGate ? row_.dout : row_.x; }

  // The activation and its derivative, from l, the logistic function of the gate.
  [[gnu::always_inline]] V activation_of(const V& l, const X* gate) const { return p_.sigmoid ? l : V::load(gate) * l; }
  [[gnu::always_inline]] V slope_of(const V& l, const X* gate) const {
    const V slope = l * (V::broadcast(1) + l * V::broadcast(-1));
    return p_.sigmoid ? slope : l + V::load(gate) * slope;
  }

  [[gnu::always_inline]] void activate(int64_t i, const X* other, const X* gate) const {
    const V l = formulas::activation<V, formulas::Activation::kSigmoid>(V::load(gate));
    l.store(logistic_ + i);
    (V::load(other) * activation_of(l, gate)).store(product_ + i);
  }
  [[gnu::noinline]] void activate_rest(int64_t i, int64_t count) const {
    X padded[kLanes] = {}, gate[kLanes] = {};
    copy(padded, other() + i, count);
    copy(gate, row_.gate + i, count);
    activate(i, padded, gate);
  }

  // dgate of the elements from i on. Without norm_before_gate, ds is in the buffer.
  [[gnu::always_inline]] V dgate(int64_t i, const V& rstd, const X* x, const X* gate, const X* dout) const {
    const V slope = slope_of(V::load(logistic_ + i), gate);
    if constexpr (kNormBeforeGate)
      return V::load(dout) * (V::load(x) * rstd) * V::load(factors_ + i) * slope;
    else
      return V::load(product_ + i) * V::load(x) * slope;
  }
  // dx without norm_before_gate. With it, the differentiator stores dx.
  [[gnu::always_inline]] V dx(int64_t i, const X* gate) const {
    return V::load(product_ + i) * activation_of(V::load(logistic_ + i), gate);
  }

  [[gnu::always_inline]] void store(const V& value, X* to) const {
    if (nontemporal_)
      value.store_nontemporal(to);
    else
      value.store(to);
  }

  [[gnu::always_inline]] void vector(const NormDifferentiator& differentiator, const V& rstd, int64_t i) const {
    const X *const x = row_.x + i, *const gate = row_.gate + i;
    if constexpr (kNormBeforeGate) {
      const V of_gate = dgate(i, rstd, x, gate, row_.dout + i);
      differentiator.vector(i);
      store(of_gate, row_.dgate + i);
    } else {
      differentiator.vector(i);
      const V of_gate = dgate(i, rstd, x, gate, nullptr), of_x = dx(i, gate);
      store(of_x, row_.dx + i);
      store(of_gate, row_.dgate + i);
    }
  }
  // The last, incomplete vector.
  [[gnu::noinline]] void rest(const NormDifferentiator& differentiator, const V& rstd, int64_t i, int64_t count) const {
    X x[kLanes] = {}, gate[kLanes] = {}, dout[kLanes] = {}, result[kLanes];
    copy(x, row_.x + i, count);
    copy(gate, row_.gate + i, count);
    if constexpr (kNormBeforeGate) {
      copy(dout, row_.dout + i, count);
      differentiator.rest(i, count);
    } else {
      differentiator.rest(i, count);
      dx(i, gate).store(result);
      copy(row_.dx + i, result, count);
    }
    dgate(i, rstd, x, gate, dout).store(result);
    copy(row_.dgate + i, result, count);
  }

  const RowParams& p_;
  const float* const factors_;
  const GatedGradientRow<X> row_;
  float *const logistic_, *const product_;
  const bool nontemporal_;
};

template <class V, class X, bool kNormBeforeGate>
[[gnu::noinline]] void differentiate_gated_row(const RowParams& p, const float* factors, float* partial,
                                               const GatedGradientRow<X>& row, float* buffer, int64_t columns,
                                               bool nontemporal) {
  const GatedRow<V, X, kNormBeforeGate> gated(p, factors, row, buffer, columns, nontemporal);
  gated.activate();
  gated.finish(partial);
}

template <class V, class X, bool kNormBeforeGate>
void run_gated_rows(const BackwardWork& work, int64_t begin, int64_t end) {
  const RowParams& p = work.params;
  int64_t row = first_row(p.rows, work.chunks, begin);
  const int64_t rows = first_row(p.rows, work.chunks, end) - row;
  if (rows <= 0) return;
  const bool nontemporal =
      V::kHasNontemporalStores && worth_nontemporal<X>(p, rows, kDX) && worth_nontemporal<X>(p, rows, kDGate);
  RowCursor<GatedGradientRow<X>> cursor(p, row);
  int64_t section = row % work.sections;  // groups are the last dimension of rows
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* const partial = work.partial(chunk);
    for (const int64_t last = first_row(p.rows, work.chunks, chunk + 1); row < last; ++row) {
      const int64_t first = section * work.columns;
      differentiate_gated_row<V, X, kNormBeforeGate>(p, work.factors + first, partial ? partial + first : nullptr,
                                                     cursor.next(), work.buffer(begin), work.columns, nontemporal);
      if (++section == work.sections) section = 0;
    }
  }
}

template <class V>
void run_gated_chunks(const BackwardWork& work, int64_t begin, int64_t end) {
  const auto run = [&](auto x) {
    using X = decltype(x);
    work.params.norm_before_gate ? run_gated_rows<V, X, true>(work, begin, end)
                                 : run_gated_rows<V, X, false>(work, begin, end);
  };
  switch (work.params.dtypes[kX]) {
    case DType::kFloat16: run(Float16()); break;
    case DType::kBFloat16: run(BFloat16()); break;
    default: run(float());
  }
  V::fence();
}

}  // namespace
}  // namespace gemma_norm
