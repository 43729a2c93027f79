// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (generic.cpp, avx2.cpp, ...).
//
// Each row is passed over twice, the second time out of the cache:
//   statistics  s = the sum of the inputs, stored where there is something to add; rstd = 1 / sqrt(mean(s^2) + eps)
//   normalize   y = Op::Formula(s, rstd, weight + offset)
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
  bool beside;                  // each row's second pass goes beside the next row's first
  bool packed;                  // the weights are kept in 16 bits, not in float32; only beside
  bool stream_sum, stream_out;  // written around the caches; the sum only beside
};

// Whether to write an output around the caches: it is large, none of it is in them as an input, and it is made of whole lines.
template <class T>
bool streams(const RowParams& p, int64_t rows, Operand output) {
  constexpr int64_t kItem = sizeof(T);
  const void* const out = p.data[output];
  const int64_t row_bytes = p.hidden * kItem;
  if (!out || (p.rows * row_bytes < kStreamBytes && rows * row_bytes < kStreamBytesOfThread)) return false;
  for (int o = 0; o < kOperands; ++o)
    if (o != output && out == p.data[o]) return false;
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && p.strides[output][d] * kItem % kCacheLine == 0;
  return aligned;
}

template <class V, class T, class W>
Strategy choose(const RowParams& p, int64_t rows) {
  Strategy strategy{};
  strategy.beside = rows >= kManyRows && p.hidden <= kBufferElements;
  strategy.packed = kPacks<V, W> && strategy.beside && p.hidden >= kPackedFrom;
  strategy.stream_sum = V::kStreams && strategy.beside && streams<T>(p, rows, kResidualOut);
  strategy.stream_out = V::kStreams && streams<T>(p, rows, kOut);
  return strategy;
}

// --- The second pass

// Writes a row's outputs. Prepared weights reach to the end of the last vector.
template <class V, class Op, class T, class Factors, bool kStream>
class Normalizer {
 public:
  Normalizer(Factors factors, const Row<T>& row, float rstd)
      : factors_(factors), s_(row.sum ? row.sum : row[kX]), out_(row[kOut]), rstd_(V::broadcast(rstd)) {}

  [[gnu::always_inline]] void vector(int64_t i) const {
    const V y = Op::Formula::apply(V::load(s_ + i), rstd_, factors_.template at<V>(i));
    if constexpr (kStream)
      y.stream(out_ + i);
    else
      y.store(out_ + i);
  }
  [[gnu::always_inline]] void rest(int64_t i, int64_t hidden) const {
    for (; i + kLanes <= hidden; i += kLanes) vector(i);
    if (const int64_t rest = hidden - i) {
      T y[kLanes] = {};
      copy(y, s_ + i, rest);
      Op::Formula::apply(V::load(y), rstd_, factors_.template rest_at<V>(i, rest)).store(y);
      copy(out_ + i, y, rest);
    }
  }

 private:
  const Factors factors_;
  const T* const s_;
  T* const out_;
  const V rstd_;
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

template <class V, class T, Addition kAddition, bool kStream>
float statistics(const RowParams& p, const Row<T>& row) {
  Squares<V, T, kAddition, kStream> squares(row);
  const int64_t i = each_step(p.hidden, [&](int64_t i) { squares.add_step(i); }, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  return squares.rstd(p);
}

template <class V, class Op, class T, class Factors, bool kStream>
void normalize(const RowParams& p, Factors factors, const Row<T>& row, float rstd) {
  Normalizer<V, Op, T, Factors, kStream>(factors, row, rstd).rest(0, p.hidden);
}

// Brings in what a V will want soon.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* row, int64_t i) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, 2);
}

// Normalises `row` and returns the rstd of `next`, while the memory in `ahead` is brought in.
template <class V, class Op, class T, class Factors, Addition kAddition, bool kStreamSum, bool kStreamOut>
[[gnu::always_inline]] inline float normalize_beside(const RowParams& p, Factors factors, const Row<T>& row, float rstd,
                                                     const Row<T>& next, Row<T> ahead) {
  Squares<V, T, kAddition, kStreamSum> squares(next);
  const Normalizer<V, Op, T, Factors, kStreamOut> normalizer(factors, row, rstd);
  const auto step = [&](int64_t i) {
    squares.add_step(i);
    for (int k = 0; k < kStep; k += kLanes) {
      prefetch(ahead[kX], i + k);
      if constexpr (!kStreamOut) prefetch(ahead[kOut], i + k);
      if constexpr (kAddition != Addition::kNone) {
        prefetch(ahead[kResidual], i + k);
        if constexpr (!kStreamSum) prefetch(ahead[kResidualOut], i + k);
      }
      normalizer.vector(i + k);
    }
  };
  const int64_t i = each_step(p.hidden, step, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  normalizer.rest(i, p.hidden);
  return squares.rstd(p);
}

// --- All of a thread's rows, by a strategy

// Row by row.
template <class V, class Op, class T, class W, Addition kAddition, bool kStreamOut>
void run_few(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  RowCursor<Op, T> cursor(p, begin);
  for (; begin < end; ++begin) {
    const Row<T> row = cursor.next();
    normalize<V, Op, T, Weights<T, W>, kStreamOut>(p, weights, row, statistics<V, T, kAddition, false>(p, row));
  }
}

// Each row beside the next. `sums` holds two rows.
template <class V, class Op, class T, class Factors, Addition kAddition, bool kStreamSum, bool kStreamOut>
void run_beside(const RowParams& p, Factors factors, T* sums, int64_t begin, int64_t end) {
  RowCursor<Op, T> cursor(p, begin);
  const auto take = [&](int64_t index) {
    Row<T> row = cursor.next();
    if constexpr (kStreamSum) row.sum = sums + index % 2 * kBufferElements;
    return row;
  };
  Row<T> row = take(begin), next = take(begin + 1);
  float rstd = statistics<V, T, kAddition, kStreamSum>(p, row);
  for (; begin + 1 < end; ++begin) {
    const Row<T> after = take(begin + 2);  // perhaps another thread's: it is prefetched at most
    Row<T> ahead = after;
    ahead.of[kOut] = next[kOut];
    rstd = normalize_beside<V, Op, T, Factors, kAddition, kStreamSum, kStreamOut>(p, factors, row, rstd, next, ahead);
    row = next;
    next = after;
  }
  normalize<V, Op, T, Factors, kStreamOut>(p, factors, row, rstd);
}

// Large buffers have stack frames of their own, here and below: few rows do not even touch them.
template <class V, class Op, class T, Addition kAddition, bool kStreamSum, bool kStreamOut, class Factors>
void run_beside_with_sums(const RowParams& p, Factors factors, int64_t begin, int64_t end) {
  alignas(kCacheLine) T sums[kStreamSum ? 2 * kBufferElements : 1];
  run_beside<V, Op, T, Factors, kAddition, kStreamSum, kStreamOut>(p, factors, sums, begin, end);
}

template <class V, class Op, class T, class W, Addition kAddition, bool kStreamSum, bool kStreamOut>
[[gnu::noinline]] void run_prepared(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  alignas(kCacheLine) float factors[kBufferElements];
  const auto prepared = prepare<V>(weights, p.hidden, factors);
  run_beside_with_sums<V, Op, T, kAddition, kStreamSum, kStreamOut>(p, prepared, begin, end);
}

template <class V, class Op, class T, class W, Addition kAddition, bool kStreamSum, bool kStreamOut>
[[gnu::noinline]] void run_packed(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  alignas(kCacheLine) W packed[kBufferElements];
  run_beside_with_sums<V, Op, T, kAddition, kStreamSum, kStreamOut>(p, pack<V>(weights, p.hidden, packed), begin, end);
}

template <class V, class Op, class T, class W, Addition kAddition, bool kStreamSum, bool kStreamOut>
void run(const RowParams& p, bool beside, bool packed, int64_t begin, int64_t end) {
  const Weights<T, W> weights{static_cast<const W*>(p.data[kWeight]), p.weight_offset};
  if (!beside) return run_few<V, Op, T, W, kAddition, kStreamOut>(p, weights, begin, end);
  if constexpr (kPacks<V, W>)
    if (packed) return run_packed<V, Op, T, W, kAddition, kStreamSum, kStreamOut>(p, weights, begin, end);
  run_prepared<V, Op, T, W, kAddition, kStreamSum, kStreamOut>(p, weights, begin, end);
}

template <class V, class Op, class T, class W, Addition kAddition>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const Strategy s = choose<V, T, W>(p, end - begin);
  auto rows = &run<V, Op, T, W, kAddition, false, false>;
  if constexpr (V::kStreams) {
    if (s.stream_out) rows = &run<V, Op, T, W, kAddition, false, true>;
    if constexpr (kAddition != Addition::kNone) {
      if (s.stream_sum) rows = s.stream_out ? &run<V, Op, T, W, kAddition, true, true> : &run<V, Op, T, W, kAddition, true, false>;
    }
  }
  rows(p, s.beside, s.packed, begin, end);
  V::fence();
}

// --- From types that are known at run time

template <class V, class Op, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if constexpr (!Op::Source::kTwoRows)
    run<V, Op, T, W, Addition::kNone>(p, begin, end);
  else if (p.data[kPost])
    run<V, Op, T, W, Addition::kResidualAndPost>(p, begin, end);
  else
    run<V, Op, T, W, Addition::kResidual>(p, begin, end);
}

template <class V, class Op, class T>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (p.dtypes[kWeight] == DType::kFloat32)
    run<V, Op, T, float>(p, begin, end);
  else
    run<V, Op, T, T>(p, begin, end);
}

template <class V, class Op>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  switch (p.dtypes[kX]) {
    case DType::kFloat32: return run<V, Op, float, float>(p, begin, end);
    case DType::kFloat16: return run<V, Op, Float16>(p, begin, end);
    case DType::kBFloat16: return run<V, Op, BFloat16>(p, begin, end);
    case DType::kOther: return;  // check() refuses it
  }
}

template <class V, class... Op>
constexpr CpuKernels cpu_kernels(OpList<Op...>) {
  return {{&run<V, Op>...}};
}

}  // namespace
}  // namespace gemma_norm
