// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (rms_norm_*.cpp).
//
// Each row is passed over twice, the second time out of the cache:
//   statistics  s = the sum of the inputs, stored where there is something to add; rstd = 1 / sqrt(mean(s^2) + eps)
//   normalize   y = s * rstd * (weight + offset)
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

// A fused multiply-add rounds once where an instruction set without it rounds twice. (Clang's -ffp-contract=fast overrules this.)
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "../core/row_params.h"
#include "rows.h"
#include "squares.h"
#include "weights.h"

namespace gemma_norm {
namespace {

// What a thread with many rows sets up: weights converted or packed once, and a place for two rows' sums. Rows that are longer
// still do without, and go one by one.
constexpr int64_t kManyRows = 4;
constexpr int64_t kBufferElements = 16384;

// From here on, float32 weights, two bfloat16 rows and the outputs of one do not fit into an innermost cache of 32 KiB. Packed
// weights take 14 % less time for 1024 x 4096, and 8 % more where all fits.
constexpr int64_t kPackedFrom = (32 << 10) / (sizeof(float) + 3 * sizeof(BFloat16)) + 1;

// Outputs from here on are written around the caches: most would leave them before anybody reads them, and an ordinary store
// first reads from memory what it overwrites. At this size, norm and copy in turn took 10 % less so. At half of it, they took 14 %
// less where one thread wrote it all, but 40 % more where two did.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kStreamBytesOfThread = kStreamBytes / 2;

// --- The second pass

// Writes a row's outputs. Prepared weights reach to the end of the last vector.
template <class V, class T, class Factors, bool kStream>
class Normalizer {
 public:
  Normalizer(Factors factors, const Row<T>& row, float rstd)
      : factors_(factors), s_(row.sum ? row.sum : row.x), out_(row.out), scale_(V::broadcast(rstd)) {}

  [[gnu::always_inline]] void vector(int64_t i) const {
    const V y = V::load(s_ + i) * scale_ * factors_.template at<V>(i);
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
      (V::load(y) * scale_ * factors_.template rest_at<V>(i, rest)).store(y);
      copy(out_ + i, y, rest);
    }
  }

 private:
  const Factors factors_;
  const T* const s_;
  T* const out_;
  const V scale_;
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

template <class V, class T, class Factors, bool kStream>
void normalize(const RowParams& p, Factors factors, const Row<T>& row, float rstd) {
  Normalizer<V, T, Factors, kStream>(factors, row, rstd).rest(0, p.hidden);
}

// Brings in what a V will want soon.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* row, int64_t i) {
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, 2);
}

// Normalises `row` and returns the rstd of `next`, while the memory in `ahead` is brought in.
template <class V, class T, class Factors, Addition kAddition, bool kStreamSum, bool kStreamOut>
[[gnu::always_inline]] inline float normalize_beside(const RowParams& p, Factors factors, const Row<T>& row, float rstd,
                                                     const Row<T>& next, Row<T> ahead) {
  Squares<V, T, kAddition, kStreamSum> squares(next);
  const Normalizer<V, T, Factors, kStreamOut> normalizer(factors, row, rstd);
  const auto step = [&](int64_t i) {
    squares.add_step(i);
    for (int k = 0; k < kStep; k += kLanes) {
      prefetch(ahead.x, i + k);
      if constexpr (!kStreamOut) prefetch(ahead.out, i + k);
      if constexpr (kAddition != Addition::kNone) {
        prefetch(ahead.residual, i + k);
        if constexpr (!kStreamSum) prefetch(ahead.residual_out, i + k);
      }
      normalizer.vector(i + k);
    }
  };
  const int64_t i = each_step(p.hidden, step, [&] { squares.end_chunk(); });
  if (i < p.hidden) squares.add_rest(i, p.hidden - i);
  normalizer.rest(i, p.hidden);
  return squares.rstd(p);
}

// Whether to write an output around the caches: it is large, none of it is in them as an input, and it is made of whole lines.
template <class T>
bool streams(const RowParams& p, int64_t rows_of_thread, const void* out, const int64_t* strides) {
  constexpr int64_t kItem = sizeof(T);
  const int64_t row_bytes = p.hidden * kItem;
  if (p.rows * row_bytes < kStreamBytes && rows_of_thread * row_bytes < kStreamBytesOfThread) return false;
  if (out == p.data[kX] || out == p.data[kResidual] || out == p.data[kPost]) return false;
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && strides[d] * kItem % kCacheLine == 0;
  return aligned;
}

// Row by row.
template <class V, class T, class W>
void run_few(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  const auto first_pass = !p.data[kResidual] ? &statistics<V, T, Addition::kNone, false>
                          : !p.data[kPost]   ? &statistics<V, T, Addition::kResidual, false>
                                             : &statistics<V, T, Addition::kResidualAndPost, false>;
  const auto second_pass = streams<T>(p, end - begin, p.data[kOut], p.strides[kOut]) ? &normalize<V, T, Weights<T, W>, true>
                                                                                     : &normalize<V, T, Weights<T, W>, false>;
  RowCursor<T> cursor(p, begin);
  for (; begin < end; ++begin) {
    const Row<T> row = cursor.next();
    second_pass(p, weights, row, first_pass(p, row));
  }
}

// Each row beside the next. `sums` holds two rows.
template <class V, class T, class Factors, Addition kAddition, bool kStreamSum, bool kStreamOut>
void run_beside(const RowParams& p, Factors factors, T* sums, int64_t begin, int64_t end) {
  RowCursor<T> cursor(p, begin);
  const auto take = [&](int64_t index) {
    Row<T> row = cursor.next();
    if constexpr (kStreamSum) row.sum = sums + index % 2 * kBufferElements;
    return row;
  };
  Row<T> row = take(begin), next = take(begin + 1);
  float rstd = statistics<V, T, kAddition, kStreamSum>(p, row);
  for (; begin + 1 < end; ++begin) {
    const Row<T> after = take(begin + 2);  // perhaps another thread's: it is prefetched at most
    const Row<T> ahead{after.x, after.residual, nullptr, next.out, after.residual_out, nullptr};
    rstd = normalize_beside<V, T, Factors, kAddition, kStreamSum, kStreamOut>(p, factors, row, rstd, next, ahead);
    row = next;
    next = after;
  }
  normalize<V, T, Factors, kStreamOut>(p, factors, row, rstd);
}

template <class V, class T, class Factors, bool kStreamSum, bool kStreamOut>
auto choose_beside(const RowParams& p) {
  return !p.data[kResidual] ? &run_beside<V, T, Factors, Addition::kNone, false, kStreamOut>
         : !p.data[kPost]   ? &run_beside<V, T, Factors, Addition::kResidual, kStreamSum, kStreamOut>
                            : &run_beside<V, T, Factors, Addition::kResidualAndPost, kStreamSum, kStreamOut>;
}

// Large buffers have stack frames of their own, here and below: not even touched for few rows.
template <class V, class T, class Factors>
void run_many(const RowParams& p, Factors factors, int64_t begin, int64_t end) {
  alignas(kCacheLine) T sums[2 * kBufferElements];
  const bool stream_out = streams<T>(p, end - begin, p.data[kOut], p.strides[kOut]);
  const bool stream_sum = p.data[kResidual] && streams<T>(p, end - begin, p.data[kResidualOut], p.strides[kResidualOut]);
  auto pass = choose_beside<V, T, Factors, false, false>(p);
  if (stream_sum && stream_out)
    pass = choose_beside<V, T, Factors, true, true>(p);
  else if (stream_sum)
    pass = choose_beside<V, T, Factors, true, false>(p);
  else if (stream_out)
    pass = choose_beside<V, T, Factors, false, true>(p);
  pass(p, factors, sums, begin, end);
}

template <class V, class T, class W>
[[gnu::noinline]] void run_prepared(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  alignas(kCacheLine) float factors[kBufferElements];
  run_many<V, T>(p, prepare<V>(weights, p.hidden, factors), begin, end);
}

template <class V, class T, class W>
[[gnu::noinline]] void run_packed(const RowParams& p, Weights<T, W> weights, int64_t begin, int64_t end) {
  alignas(kCacheLine) W packed[kBufferElements];
  run_many<V, T>(p, pack<V>(weights, p.hidden, packed), begin, end);
}

template <class V, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const Weights<T, W> weights{static_cast<const W*>(p.data[kWeight]), p.weight_offset};
  if (end - begin < kManyRows || p.hidden > kBufferElements)
    run_few<V>(p, weights, begin, end);
  else if constexpr (kPacks<V, W>)
    (p.hidden < kPackedFrom ? run_prepared<V, T, W> : run_packed<V, T, W>)(p, weights, begin, end);
  else
    run_prepared<V>(p, weights, begin, end);
  V::fence();
}

template <class V, class T>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (p.dtypes[kWeight] == DType::kFloat32)
    run<V, T, float>(p, begin, end);
  else
    run<V, T, T>(p, begin, end);
}

template <class V>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  switch (p.dtypes[kX]) {
    case DType::kFloat32: return run<V, float, float>(p, begin, end);
    case DType::kFloat16: return run<V, Float16>(p, begin, end);
    case DType::kBFloat16: return run<V, BFloat16>(p, begin, end);
    case DType::kOther: return;  // check() refuses it
  }
}

}  // namespace
}  // namespace gemma_norm
