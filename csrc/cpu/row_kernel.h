// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (generic.cpp, avx2.cpp, ...).
//
// Each row is passed over twice, the second time out of the cache:
//   statistics  s, stored unless it is x itself; rstd = 1 / sqrt(mean(s^2) + eps)
//   normalize   y = the operator's formula of s, rstd and weight + offset
// A thread with many rows does the second of a row and the first of the next one side by side: memory is read while the
// processor computes, and the latencies of a row's end (tree, root, division) hide behind other rows.
//
// The bits are the same on every instruction set, NaN payloads aside. Every operation on V does what IEEE operations would do, lane
// by lane (see LaneSum for the one that does not quite), and the order of a sum of squares depends on hidden and dtype alone: a
// lane adds up the same one or two elements of every step, chunk by chunk, and one fixed tree adds up the lanes. The last,
// incomplete step of a row is padded with zeros, which change no sum.
//
// All of this is in an anonymous namespace and calls no inline function of the standard library: the linker must never merge
// what is compiled here for one instruction set with that of another.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "isa.h"
#include "rows.h"
#include "squares.h"
#include "weights.h"

namespace gemma_norm {
namespace {

// --- How a thread goes about its rows

// A thread with at least this many rows first converts or packs the weights, once, and reserves a buffer for the sums of two rows.
// Longer rows do not fit into the buffers and are done one by one.
constexpr int64_t kManyRows = 4;
constexpr int64_t kBufferElements = 16384;

// From here on, float32 weights, two bfloat16 rows and the outputs of one do not fit into an innermost cache of 32 KiB. Packed
// weights make 1024 x 4096 take 14 % less time, and 8 % more where all fits.
constexpr int64_t kPackedFrom = (32 << 10) / (sizeof(float) + 3 * sizeof(BFloat16)) + 1;

// An output of so many bytes is written around the caches: most of it would leave them before anybody reads it, and an ordinary
// store first reads from memory what it overwrites. At this size, norm and copy in turn took 10 % less time. At half of it, they
// took 14 % less where one thread wrote all of it, but 40 % more where two did: the second number is for one thread's part.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kStreamBytesOfThread = kStreamBytes / 2;

struct Strategy {
  bool beside;  // each row's second pass goes beside the next row's first
  bool packed;  // the weights are kept in 16 bits, not in float32; only beside
  bool stream;  // outputs are written around the caches; the sum only beside
};

// Whether to write an output around the caches: it is large, none of it is in them as an input, and it is made of whole lines.
template <class T>
bool streams(const RowParams& p, int64_t rows, Operand output) {
  constexpr int64_t kItem = sizeof(T);
  const void* const out = p.data[output];
  const int64_t row_bytes = p.hidden * kItem;
  if (p.rows * row_bytes < kStreamBytes && rows * row_bytes < kStreamBytesOfThread) return false;
  for (int o = 0; o < kOperands; ++o)
    if (o != output && out == p.data[o]) return false;
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && p.strides[output][d] * kItem % kCacheLine == 0;
  return aligned;
}

template <class C>
Strategy choose(const RowParams& p, int64_t rows) {
  using V = typename C::V;
  Strategy strategy{};
  strategy.beside = rows >= kManyRows && weight_count(p) <= kBufferElements;
  strategy.packed = kPacks<V, typename C::W> && strategy.beside && p.hidden >= kPackedFrom && weight_count(p) == p.hidden;
  const bool stores_sum = p.data[kResidualOut] && strategy.beside;
  strategy.stream =
      V::kStreams && streams<typename C::X>(p, rows, kOut) && (!stores_sum || streams<typename C::S>(p, rows, kResidualOut));
  return strategy;
}

// --- The second pass

// Writes a row's outputs. Prepared weights reach to the end of the last vector.
template <class C, class Factors>
class Normalizer {
  using V = typename C::V;
  using X = typename C::X;
  using S = typename C::S;

 public:
  Normalizer(const RowParams& p, Factors factors, const Row<C>& row, float rstd, bool stream)
      : p_(p), factors_(factors), row_(row), rstd_(V::broadcast(rstd)), stream_(stream) {}

  [[gnu::always_inline]] void vector(int64_t i) const {
    const V y = formula(s_at(i), factors_.template at<V>(row_.weight + i), row_.gate ? row_.gate + i : nullptr);
    if (V::kStreams && stream_)
      y.stream(row_.out + i);
    else
      y.store(row_.out + i);
  }
  [[gnu::always_inline]] void rest(int64_t i, int64_t hidden) const {
    for (; i + kLanes <= hidden; i += kLanes) vector(i);
    if (const int64_t rest = hidden - i) {
      S s[kStep] = {};
      X gate[kLanes] = {}, y[kLanes];
      if (!C::kIsX && row_.sum)
        copy(s, row_.sum + i, rest);
      else
        rest_of_sum<C>(p_, row_, i, rest, s);
      if (C::Form::Formula::kGated && row_.gate) copy(gate, row_.gate + i, rest);
      formula(V::load(s), factors_.template rest_at<V>(row_.weight + i, rest), row_.gate ? gate : nullptr).store(y);
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
    if constexpr (sizeof(S) > sizeof(X)) s = s.without_payload();  // see Weights
    if constexpr (C::Form::Formula::kGated)
      return C::Form::Formula::apply(s, rstd_, factor, activation<C>(p_, gate), round);
    else
      return C::Form::Formula::apply(s, rstd_, factor, round);
  }

  const RowParams& p_;
  const Factors factors_;
  const Row<C> row_;
  const V rstd_;
  const bool stream_;
};

// --- Both

// Calls step(i) for all whole steps of a row and end_chunk() after every chunk of them; returns where the rest begins.
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

template <class C>
float statistics(const RowParams& p, const Row<C>& row, bool stream) {
  Squares<C> squares(p, row, stream);
  const int64_t i = each_step(p.hidden, [&](int64_t i) { squares.add_step(i); }, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  return squares.rstd();
}

template <class C, class Factors>
void normalize(const RowParams& p, Factors factors, const Row<C>& row, float rstd, bool stream) {
  Normalizer<C, Factors>(p, factors, row, rstd, stream).rest(0, p.hidden);
}

// Brings in what a V will want soon.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* row, int64_t i) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, 2);
}

// Normalises `row` and returns the rstd of `next`, while the memory in `ahead` is brought in.
template <class C, class Factors>
[[gnu::always_inline]] inline float normalize_beside(const RowParams& p, Factors factors, const Row<C>& row, float rstd,
                                                     const Row<C>& next, Row<C> ahead, bool stream) {
  Squares<C> squares(p, next, stream);
  const Normalizer<C, Factors> normalizer(p, factors, row, rstd, stream);
  const auto step = [&](int64_t i) {
    squares.add_step(i);
    for (int k = 0; k < kStep; k += kLanes) {
      prefetch(ahead.x, i + k);
      if (!stream) prefetch(ahead.out, i + k);
      if constexpr (C::kHasResidual) {
        prefetch(ahead.residual, i + k);
        if (!stream) prefetch(ahead.residual_out, i + k);
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

// --- All of a thread's rows, by a strategy

// Row by row. `sum` holds one row, or is null where a row is too long.
template <class C, class Factors>
void run_few(const RowParams& p, Factors factors, typename C::S* sum, bool stream, int64_t begin, int64_t end) {
  RowCursor<C> cursor(p, begin);
  for (; begin < end; ++begin) {
    Row<C> row = cursor.next();
    if constexpr (C::kGatesX) row.sum = sum;
    normalize<C>(p, factors, row, statistics<C>(p, row, false), stream);
  }
}

// Each row beside the next. `sums` holds two rows: s, where it is not stored, or around the caches.
template <class C, class Factors>
void run_beside(const RowParams& p, Factors factors, typename C::S* sums, bool stream, int64_t begin, int64_t end) {
  RowCursor<C> cursor(p, begin);
  const auto take = [&](int64_t index) {
    Row<C> row = cursor.next();
    if (C::kGatesX || (C::kHasResidual && stream)) row.sum = sums + index % 2 * kBufferElements;
    return row;
  };
  Row<C> row = take(begin), next = take(begin + 1);
  float rstd = statistics<C>(p, row, stream);
  for (; begin + 1 < end; ++begin) {
    const Row<C> after = take(begin + 2);  // perhaps another thread's: it is prefetched at most
    Row<C> ahead = after;
    ahead.out = next.out;
    if constexpr (C::Form::Formula::kGated) ahead.gate = next.gate;
    rstd = normalize_beside<C>(p, factors, row, rstd, next, ahead, stream);
    row = next;
    next = after;
  }
  normalize<C>(p, factors, row, rstd, stream);
}

// Large buffers have stack frames of their own, here and below: few rows do not even touch them.
template <class C, class Factors>
[[gnu::noinline]] void run_few_with_sum(const RowParams& p, Factors factors, bool stream, int64_t begin, int64_t end) {
  alignas(kCacheLine) typename C::S sum[kBufferElements];
  run_few<C>(p, factors, sum, stream, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_beside_with_sums(const RowParams& p, Factors factors, bool stream, int64_t begin, int64_t end) {
  alignas(kCacheLine) typename C::S sums[C::kIsX ? 1 : 2 * kBufferElements];
  run_beside<C>(p, factors, sums, stream, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_prepared(const RowParams& p, Factors weights, bool stream, int64_t begin, int64_t end) {
  alignas(kCacheLine) float factors[kBufferElements + kLanes];
  const auto prepared = prepare<typename C::V>(weights, weight_count(p), factors);
  run_beside_with_sums<C>(p, prepared, stream, begin, end);
}

template <class C, class Factors>
[[gnu::noinline]] void run_packed(const RowParams& p, Factors weights, bool stream, int64_t begin, int64_t end) {
  alignas(kCacheLine) typename C::W packed[kBufferElements];
  run_beside_with_sums<C>(p, pack<typename C::V>(weights, p.hidden, packed), stream, begin, end);
}

template <class C, class Factors>
void run(const RowParams& p, Factors factors, const Strategy& strategy, int64_t begin, int64_t end) {
  const bool stream = strategy.stream;
  if (!strategy.beside) {
    if constexpr (C::kGatesX)
      if (p.hidden <= kBufferElements) return run_few_with_sum<C>(p, factors, stream, begin, end);
    run_few<C>(p, factors, nullptr, stream, begin, end);
  } else if constexpr (!C::kHasWeight) {
    run_beside_with_sums<C>(p, factors, stream, begin, end);
  } else {
    if constexpr (kPacks<typename C::V, typename C::W>)
      if (strategy.packed) return run_packed<C>(p, factors, stream, begin, end);
    run_prepared<C>(p, factors, stream, begin, end);
  }
}

// --- From what is known at run time

template <class V, class Op>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  with_variant<Op, Float16, BFloat16>(p, [&](auto variant) {
    using C = Choice<V, Op, decltype(variant)>;
    const Strategy strategy = choose<C>(p, end - begin);
    if constexpr (C::kHasWeight) {
      using W = typename C::W;
      run<C>(p, Weights<typename C::X, W>{static_cast<const W*>(p.data[kWeight]), p.weight_offset}, strategy, begin, end);
    } else {
      run<C>(p, Ones(), strategy, begin, end);
    }
  });
  V::fence();
}

template <class V, class... Op>
constexpr CpuKernels cpu_kernels(OpList<Op...>) {
  return {{&run<V, Op>...}};
}

}  // namespace
}  // namespace gemma_norm
