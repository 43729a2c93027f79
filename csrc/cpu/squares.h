// The first pass over a row, which computes s and its squares. Part of row_kernel.h, with the same anonymous namespace.
#pragma once

#include <cstdint>

#include "../core/row_params.h"
#include "../device/exponential.h"
#include "rows.h"
#include "weights.h"

namespace gemma_norm {
namespace {

constexpr int kStep = 2 * kLanes;       // elements of a step: two vectors, whose additions overlap in time
constexpr int64_t kChunk = 64 * kStep;  // elements that one chain of additions adds up

// Calls step(i) for all whole steps of a row, and end_chunk() after every chunk of steps. Returns the index of the
// first element after them.
template <class Step, class EndChunk>
[[gnu::always_inline]] inline int64_t each_step(int64_t hidden, Step step, EndChunk end_chunk) {
  int64_t i = 0;
  while (i + kStep <= hidden) {
    const int64_t end = hidden - i < kChunk ? hidden : i + kChunk;
    for (; i + kStep <= end; i += kStep) step(i);
    end_chunk();
  }
  return i;
}

template <class V, class T>
V rounded(V value) {
  T elements[kLanes];
  value.store(elements);
  return V::load(elements);
}

template <class C>
[[gnu::always_inline]] inline typename C::V activation(const RowParams& p, const typename C::X* gate) {
  using V = typename C::V;
  if (!gate) return V::broadcast(1);
  // The two activations differ in a factor alone. Choosing the factor, and not the activation, compiles the exponential
  // function once instead of twice.
  const V g = V::load(gate);
  return formulas::sigmoid_unless_nan<V>(g) * (p.sigmoid ? V::one_unless_nan(g) : g);
}

// The norm of x that comes before the addition, for kLanes elements from i on. It has the bits of rms_norm.
template <class C>
[[gnu::always_inline]] inline typename C::V normed_x(const RowParams& p, const RowPointers<C>& row, int64_t i) {
  using V = typename C::V;
  using X = typename C::X;
  const StoredWeights<X, typename C::W> weights{row.post_weight, p.weight_offset};
  const auto round = [](const V& v) {
    if constexpr (C::kRoundEachStep) return rounded<V, X>(v);
    return v;
  };
  const V factor = weights.template at<V>(i);
  return rounded<V, X>(C::Form::Formula::apply(V::load(row.x + i), V::broadcast(row.x_rstd), factor, round));
}

// Computes s for kLanes elements from i on and stores it in `sum`; with `nontemporal` also in residual_out, around the
// caches.
template <class C>
[[gnu::always_inline]] inline void store_sum(const RowParams& p, const RowPointers<C>& row, int64_t i,
                                             typename C::S* sum, bool nontemporal) {
  using V = typename C::V;
  using S = typename C::S;
  if constexpr (C::kGatesX) {
    const V x = V::load(row.x + i);
    (row.gate ? x * activation<C>(p, row.gate + i) : x).store(sum);
  } else {
    V r = V::load(row.residual + i), x;
    if (row.post) r = rounded<V, S>(r + V::load(row.post + i));
    if constexpr (C::kNormsX)
      x = normed_x<C>(p, row, i);
    else
      x = V::load(row.x + i);
    const V s = x + r;
    s.store(sum);
    if (C::V::kHasNontemporalStores && nontemporal) s.store_nontemporal(row.residual_out + i);
  }
}

// Computes s for the last, incomplete step. What is left of `sum` is zero.
template <class C>
[[gnu::noinline]] void rest_of_sum(const RowParams& p, RowPointers<C> row, int64_t i, int64_t rest,
                                   typename C::S (&sum)[kStep]) {
  using X = typename C::X;
  using S = typename C::S;
  if constexpr (C::kIsX) {
    copy(sum, row.x + i, rest);
  } else {
    X x[kStep] = {}, gate[kStep] = {};
    S residual[kStep] = {}, post[kStep] = {};
    typename C::W post_weight[kStep] = {};
    RowPointers<C> padded;
    padded.x = x;
    copy(x, row.x + i, rest);
    if constexpr (C::kGatesX) {
      if (row.gate) {
        copy(gate, row.gate + i, rest);
        padded.gate = gate;
      }
    } else {
      copy(residual, row.residual + i, rest);
      padded.residual = residual;
      if (row.post) {
        copy(post, row.post + i, rest);
        padded.post = post;
      }
      if constexpr (C::kNormsX) {
        copy(post_weight, row.post_weight + i, rest);
        padded.post_weight = post_weight;
        padded.x_rstd = row.x_rstd;
      }
    }
    for (int k = 0; k < kStep; k += kLanes) store_sum<C>(p, padded, k, sum + k, false);
    if (row.sum) copy(row.sum + i, sum, rest);
    if constexpr (C::kHasResidual) copy(row.residual_out + i, sum, rest);
  }
}

// How the lanes of a V add squares: kElements is the number of elements of a step that a lane adds, and kStart the
// number that its sum starts from. The square of a 16-bit number is exact in float32 unless it underflows, so a fused
// multiply-add gives the same bits as a product and a sum.
template <class T>
struct LaneSum {
  static constexpr int kElements = 1;
  static constexpr float kStart = 0;

  template <class V>
  [[gnu::always_inline]] static V add_squares(const V& sum, const T* s) {
    const V v = V::load(s);
    if constexpr (sizeof(T) == 2)
      return V::multiply_add(v, v, sum);
    else
      return sum + v * v;
  }
};

// AVX-512's instruction for pairs of bfloat16 treats subnormal inputs and sums as zero. Each lane's sum therefore
// starts at the least normal number, which end_chunk() subtracts again. So the sum is never subnormal, and the square
// of a subnormal bfloat16, which is below 2^-252, could not change it anyway.
template <>
struct LaneSum<BFloat16> {
  static constexpr int kElements = 2;
  static constexpr float kStart = 0x1p-126f;

  template <class V>
  [[gnu::always_inline]] static V add_squares(const V& sum, const BFloat16* s) {
    return V::add_squares_of_pairs(sum, s);
  }
};

// Adds up the squares of a row of s, or with kOfX of x: first in chunks, then the sums of the chunks, because the
// rounding errors of one long chain of additions would be larger.
template <class C, bool kOfX = C::kIsX>
class Squares {
  using V = typename C::V;
  using S = std::conditional_t<kOfX, typename C::X, typename C::S>;
  using Sums = LaneSum<S>;

 public:
  Squares(const RowParams& p, const RowPointers<C>& row, bool nontemporal)
      : p_(p), row_(row), nontemporal_(nontemporal) {
    for (int k = 0; k < kSums; ++k) {
      sums_[k] = V::broadcast(0);
      part_[k] = V::broadcast(Sums::kStart);
    }
  }

  [[gnu::always_inline]] void add_step(int64_t i) {
    if constexpr (kOfX) {
      add(row_.x + i);
    } else {
      S local[kStep];
      S* const sum = C::kHasResidual || row_.sum ? row_.sum + i : local;
      for (int k = 0; k < kStep; k += kLanes) store_sum<C>(p_, row_, i + k, sum + k, nontemporal_);
      add(sum);
    }
  }
  [[gnu::always_inline]] void end_chunk() {
    for (int k = 0; k < kSums; ++k) {
      sums_[k] = sums_[k] + (part_[k] + V::broadcast(-Sums::kStart));
      part_[k] = V::broadcast(Sums::kStart);
    }
  }
  [[gnu::always_inline]] void add_rest(int64_t i, int64_t rest) {
    S sum[kStep] = {};
    if constexpr (kOfX)
      copy(sum, row_.x + i, rest);
    else
      rest_of_sum<C>(p_, row_, i, rest, sum);
    add(sum);
    end_chunk();
  }
  [[gnu::always_inline]] float rstd() const {
    V sum = sums_[0];
    for (int k = 1; k < kSums; ++k) sum = sum + sums_[k];
    return 1.0f / __builtin_sqrtf(sum.sum() * p_.inv_hidden + p_.eps);
  }

 private:
  static constexpr int kWidth = kLanes * Sums::kElements;
  static constexpr int kSums = kStep / kWidth;

  [[gnu::always_inline]] void add(const S* s) {
    for (int k = 0; k < kSums; ++k) part_[k] = Sums::add_squares(part_[k], s + k * kWidth);
  }

  const RowParams& p_;
  const RowPointers<C> row_;
  const bool nontemporal_;
  V sums_[kSums];
  V part_[kSums];
};

}  // namespace
}  // namespace gemma_norm
