// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (generic.cpp,
// avx2.cpp, ...).
//
// There are two passes over each row. The second finds the row in the cache.
//
//   statistics  computes s, stores it unless it is x itself, and computes rstd = 1 / sqrt(mean(s^2) + eps)
//               (an operator that normalises x before the addition has a pass before this one, for x's own rstd)
//   normalize   computes y, the operator's formula of s, rstd and weight + offset
//
// A thread with many rows interleaves the second pass over a row with the first pass over the next row. Memory is then
// read while the processor computes, and the latencies at the end of a row (tree, root, division) overlap with work on
// another row.
//
// All instruction sets give the same bits, except for the payloads of NaNs. Each operation on V does in each lane what
// the IEEE operation does (LaneSum explains the one exception). The order in which squares are added depends only on
// hidden and dtype: a lane adds the same one or two elements of every step, chunk by chunk, and one fixed tree adds the
// lanes. The last, incomplete step of a row is padded with zeros, which change no sum.
//
// All code here is in an anonymous namespace and calls no inline function of the standard library. Otherwise the linker
// could merge a function compiled for one instruction set with the same function compiled for another.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "isa.h"
#include "memory.h"
#include "quantize.h"
#include "rows.h"
#include "squares.h"
#include "weights.h"

namespace gemma_norm {
namespace {

// --- The strategy of a thread

// A thread with at least kManyRows rows first converts or packs the weights, once, and reserves a buffer for s of two
// rows. Rows of more than kBufferElements do not fit into these buffers and are computed one by one.
constexpr int64_t kManyRows = 4;
constexpr int64_t kBufferElements = 16384;

// The smallest hidden size for which float32 weights, two bfloat16 rows and the output of one do not fit into an L1
// cache of 32 KiB. Packed weights reduced the time of 1024 x 4096 by 14 %, but increased it by 8 % where all of these
// fit (docs/tuning-log.md, T79).
constexpr int64_t kPackedFrom = (32 << 10) / (sizeof(float) + 3 * sizeof(BFloat16)) + 1;

struct Strategy {
  bool beside;       // the second pass over a row is interleaved with the first pass over the next
  bool packed;       // the weights are packed in 16 bits instead of converted to float32; only with `beside`
  bool nontemporal;  // outputs are written around the caches; residual_out only with `beside`
};

template <class C>
Strategy choose(const RowParams& p, int64_t rows) {
  using V = typename C::V;
  Strategy strategy{};
  strategy.beside = rows >= kManyRows && weight_count(p) <= kBufferElements;
  strategy.packed =
      kPacks<V, typename C::W> && strategy.beside && p.hidden >= kPackedFrom && weight_count(p) == p.hidden;
  const bool stores_sum = p.data[kResidualOut] && strategy.beside;
  strategy.nontemporal = V::kHasNontemporalStores && worth_nontemporal<typename C::X>(p, rows, kOut) &&
                         (!stores_sum || worth_nontemporal<typename C::S>(p, rows, kResidualOut));
  return strategy;
}

// --- The second pass

// The second pass over a row: vector() for kLanes elements, rest() for all elements from i on.
template <class C, class Factors>
class Normalizer {
  using V = typename C::V;
  using X = typename C::X;
  using S = typename C::S;

 public:
  Normalizer(const RowParams& p, Factors factors, const RowPointers<C>& row, float rstd, bool nontemporal)
      : p_(p), factors_(factors), row_(row), rstd_(V::broadcast(rstd)), nontemporal_(nontemporal) {}

  // y before it is rounded, kLanes elements from i on.
  [[gnu::always_inline]] V unrounded(int64_t i) const {
    return formula(s_at(i), factors_.template at<V>(row_.weight + i), row_.gate ? row_.gate + i : nullptr);
  }
  // The same where the row has only `rest` elements from i on.
  [[gnu::always_inline]] V unrounded_rest(int64_t i, int64_t rest) const {
    S s[kStep] = {};
    X gate[kLanes] = {};
    if (!C::kIsX && row_.sum)
      copy(s, row_.sum + i, rest);
    else
      rest_of_sum<C>(p_, row_, i, rest, s);
    if (C::Form::Formula::kGated && row_.gate) copy(gate, row_.gate + i, rest);
    return formula(V::load(s), factors_.template rest_at<V>(row_.weight + i, rest), row_.gate ? gate : nullptr);
  }

  [[gnu::always_inline]] void vector(int64_t i) const {
    const V y = unrounded(i);
    if (V::kHasNontemporalStores && nontemporal_)
      y.store_nontemporal(row_.out + i);
    else
      y.store(row_.out + i);
  }
  [[gnu::always_inline]] void rest(int64_t i, int64_t hidden) const {
    for (; i + kLanes <= hidden; i += kLanes) vector(i);
    if (const int64_t rest = hidden - i) {
      X y[kLanes];
      unrounded_rest(i, rest).store(y);
      copy(row_.out + i, y, rest);
    }
  }

 private:
  [[gnu::always_inline]] V s_at(int64_t i) const {
    if constexpr (C::kIsX) return V::load(row_.x + i);
    if (C::kHasResidual || row_.sum) return V::load(row_.sum + i);
    S s[kLanes];
    store_sum<C>(p_, row_, i, s, false);
    return V::load(s);
  }

  [[gnu::always_inline]] V formula(V s, V factor, const X* gate) const {
    const auto round = [](const V& v) {
      if constexpr (C::kRoundEachStep) return rounded<V, X>(v);
      return v;
    };
    if constexpr (sizeof(S) > sizeof(X)) s = s.without_payload();  // see StoredWeights::sum
    if constexpr (C::Form::Formula::kGated)
      return C::Form::Formula::apply(s, rstd_, factor, activation<C>(p_, gate), round);
    else
      return C::Form::Formula::apply(s, rstd_, factor, round);
  }

  const RowParams& p_;
  const Factors factors_;
  const RowPointers<C> row_;
  const V rstd_;
  const bool nontemporal_;
};

// --- Both passes

template <class C, bool kOfX = C::kIsX>
float statistics(const RowParams& p, const RowPointers<C>& row, bool nontemporal) {
  Squares<C, kOfX> squares(p, row, nontemporal);
  const int64_t i = each_step(p.hidden, [&](int64_t i) { squares.add_step(i); }, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  return squares.rstd();
}

template <class C, class Factors>
void normalize(const RowParams& p, Factors factors, const RowPointers<C>& row, float rstd, bool nontemporal) {
  Normalizer<C, Factors>(p, factors, row, rstd, nontemporal).rest(0, p.hidden);
}

// The second pass over `row` and the first pass over `next`, interleaved. Also prefetches the rows of `ahead`. Returns
// the rstd of `next`.
template <class C, class Factors>
[[gnu::always_inline]] inline float normalize_beside(const RowParams& p, Factors factors, const RowPointers<C>& row,
                                                     float rstd, const RowPointers<C>& next, RowPointers<C> ahead,
                                                     bool nontemporal) {
  Squares<C> squares(p, next, nontemporal);
  const Normalizer<C, Factors> normalizer(p, factors, row, rstd, nontemporal);
  const auto step = [&](int64_t i) {
    squares.add_step(i);
    for (int k = 0; k < kStep; k += kLanes) {
      prefetch(ahead.x, i + k);
      if (!nontemporal) prefetch(ahead.out, i + k);
      if constexpr (C::kHasResidual) {
        prefetch(ahead.residual, i + k);
        if (!nontemporal) prefetch(ahead.residual_out, i + k);
      }
      if (C::Op::kInfos[0].has(kGate) && ahead.gate) prefetch(ahead.gate, i + k);
      normalizer.vector(i + k);
    }
  };
  const int64_t i = each_step(p.hidden, step, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  normalizer.rest(i, p.hidden);
  return squares.rstd();
}

// --- All rows of a thread, by a strategy

// One row after another. `sum` is a buffer for s of one row, or null if the row is too long for it.
template <class C, class Factors>
void run_few(const RowParams& p, Factors factors, typename C::S* sum, bool nontemporal, int64_t begin, int64_t end) {
  RowCursor<RowPointers<C>> cursor(p, begin);
  for (; begin < end; ++begin) {
    RowPointers<C> row = cursor.next();
    row.sum = row.residual_out;
    if constexpr (C::kGatesX) row.sum = sum;
    if constexpr (C::kNormsX) row.x_rstd = statistics<C, true>(p, row, false);
    normalize<C>(p, factors, row, statistics<C>(p, row, false), nontemporal);
  }
}

// Each row interleaved with the next. `sums` is a buffer for s of two rows. It is used if s is not stored, or is stored
// around the caches.
template <class C, class Factors>
void run_beside(const RowParams& p, Factors factors, typename C::S* sums, bool nontemporal, int64_t begin,
                int64_t end) {
  RowCursor<RowPointers<C>> cursor(p, begin);
  const auto take = [&](int64_t index) {
    RowPointers<C> row = cursor.next();
    row.sum = row.residual_out;
    if (C::kGatesX || (C::kHasResidual && nontemporal)) row.sum = sums + index % 2 * kBufferElements;
    return row;
  };
  RowPointers<C> row = take(begin), next = take(begin + 1);
  if constexpr (C::kNormsX) row.x_rstd = statistics<C, true>(p, row, nontemporal);
  float rstd = statistics<C>(p, row, nontemporal);
  for (; begin + 1 < end; ++begin) {
    if constexpr (C::kNormsX) next.x_rstd = statistics<C, true>(p, next, nontemporal);
    const RowPointers<C> after = take(begin + 2);  // may be another thread's row; it is then only prefetched
    RowPointers<C> ahead = after;
    ahead.out = next.out;
    if constexpr (C::Form::Formula::kGated) ahead.gate = next.gate;
    rstd = normalize_beside<C>(p, factors, row, rstd, next, ahead, nontemporal);
    row = next;
    next = after;
  }
  normalize<C>(p, factors, row, rstd, nontemporal);
}

// y of a row, for RowQuantizer.
template <class C, class Factors>
class QuantizedValues {
  using V = typename C::V;
  using X = typename C::X;

 public:
  QuantizedValues(const RowParams& p, const Normalizer<C, Factors>& normalizer, X* y_out)
      : round_first_(p.round_first), normalizer_(normalizer), y_out_(y_out) {}

  [[gnu::always_inline]] void operator()(int64_t i, int64_t count, float* y) const {
    const V v = count == kLanes ? normalizer_.unrounded(i) : normalizer_.unrounded_rest(i, count);
    (round_first_ ? rounded<V, X>(v) : v).store(y);
  }
  [[gnu::always_inline]] void store(int64_t i, int64_t count, const float* y) const {
    if (!y_out_) return;
    X x[kLanes];
    V::load(y).store(x);
    copy(y_out_ + i, x, count);
  }

 private:
  const bool round_first_;
  const Normalizer<C, Factors>& normalizer_;
  X* const y_out_;
};

// One row after another, quantised. `sum` is as for run_few.
template <class C, class Factors>
void run_quantized(const RowParams& p, Factors factors, typename C::S* sum, int64_t begin, int64_t end) {
  RowCursor<RowPointers<C>> cursor(p, begin);
  for (; begin < end; ++begin) {
    RowPointers<C> row = cursor.next();
    row.sum = C::kGatesX ? sum : row.residual_out;
    const Normalizer<C, Factors> normalizer(p, factors, row, statistics<C>(p, row, false), false);
    const QuantizedValues<C, Factors> values(p, normalizer, p.data[kYOut] ? row.y_out : nullptr);
    RowQuantizer(p, values, row.out, row.scales).run();
  }
}

// The large buffers, here and below, are in functions that are not inlined, so that a call with few rows does not touch
// their stack frames.
template <class C, class Factors>
[[gnu::noinline]] void run_few_with_sum(const RowParams& p, Factors factors, bool nontemporal, int64_t begin,
                                        int64_t end) {
  alignas(kCacheLine) typename C::S sum[kBufferElements];
  run_few<C>(p, factors, sum, nontemporal, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_quantized_with_sum(const RowParams& p, Factors factors, int64_t begin, int64_t end) {
  alignas(kCacheLine) typename C::S sum[C::kGatesX ? kBufferElements : 1];
  run_quantized<C>(p, factors, C::kGatesX && p.hidden <= kBufferElements ? sum : nullptr, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_beside_with_sums(const RowParams& p, Factors factors, bool nontemporal, int64_t begin,
                                            int64_t end) {
  alignas(kCacheLine) typename C::S sums[C::kIsX ? 1 : 2 * kBufferElements];
  run_beside<C>(p, factors, sums, nontemporal, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_prepared(const RowParams& p, Factors weights, bool nontemporal, int64_t begin, int64_t end) {
  alignas(kCacheLine) float factors[kBufferElements + kLanes];
  const auto prepared = prepare<typename C::V>(weights, weight_count(p), factors);
  run_beside_with_sums<C>(p, prepared, nontemporal, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_packed(const RowParams& p, Factors weights, bool nontemporal, int64_t begin, int64_t end) {
  alignas(kCacheLine) typename C::W packed[kBufferElements];
  run_beside_with_sums<C>(p, pack<typename C::V>(weights, p.hidden, packed), nontemporal, begin, end);
}

template <class C, class Factors>
void run_strategy(const RowParams& p, Factors factors, const Strategy& strategy, int64_t begin, int64_t end) {
  const bool nontemporal = strategy.nontemporal;
  if (!strategy.beside) {
    if constexpr (C::kGatesX)
      if (p.hidden <= kBufferElements) return run_few_with_sum<C>(p, factors, nontemporal, begin, end);
    run_few<C>(p, factors, nullptr, nontemporal, begin, end);
  } else if constexpr (!C::kHasWeight) {
    run_beside_with_sums<C>(p, factors, nontemporal, begin, end);
  } else {
    if constexpr (kPacks<typename C::V, typename C::W>)
      if (strategy.packed) return run_packed<C>(p, factors, nontemporal, begin, end);
    run_prepared<C>(p, factors, nontemporal, begin, end);
  }
}

// --- The entry: from dtypes and options at run time to compiled code

template <class V, class Op>
void compute_rows(const RowParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  with_variant<Op, Float16, BFloat16>(p, [&](auto variant) {
    using C = Choice<V, Op, decltype(variant)>;
    const auto run = [&](auto factors) {
      if constexpr (C::Form::kQuantizes)
        run_quantized_with_sum<C>(p, factors, begin, end);
      else
        run_strategy<C>(p, factors, choose<C>(p, end - begin), begin, end);
    };
    if constexpr (C::kHasWeight) {
      using W = typename C::W;
      run(StoredWeights<typename C::X, W>{static_cast<const W*>(p.data[kWeight]), p.weight_offset});
    } else {
      run(Ones());
    }
  });
  V::fence();
}

}  // namespace
}  // namespace gemma_norm
