// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (rms_norm_*.cpp).
//
// A thread takes its rows one by one, or four by four where they are short, and passes over them twice, the second time out of
// the cache:
//   statistics  s = the sum of the inputs, stored where there is something to add; rstd = 1 / sqrt(mean(s^2) + eps)
//   normalize   y = s * rstd * (weight + offset)
//
// The bits are the same on every instruction set, NaN payloads aside. Every operation on V is one IEEE operation a lane, and the
// order of a sum of squares depends on hidden and dtype alone: lane j of sum k adds up the elements that V::load_for_sum puts
// there, one a step and chunk by chunk, and one fixed tree adds up the lanes. The last, incomplete step of a row is padded with
// zeros, which change no sum.
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

#include "../kernels/row_params.h"
#include "rows.h"
#include "weights.h"

namespace gemma_norm {
namespace {

constexpr int kSums = 2;  // an addition takes some cycles: have more than one under way
constexpr int kStep = kLanes * kSums;
constexpr int64_t kChunk = 64 * kStep;  // what one chain of additions adds up

// Short rows, of which four and their outputs share the L1 cache easily, go four by four: they hide each other's latencies
// (tree, root, division) and share each weight that is loaded and converted. Four of 4096 bytes took 1.7x the time of one by one:
// rows at a stride of a page compete for the same cache sets.
constexpr int64_t kShortBytes = 2048;
constexpr int kBlock = 4;

// What a thread with many rows sets up: weights converted once, which saves a fifth of the time of long bfloat16 rows, and a
// place for sums. Rows that are longer still do without.
constexpr int64_t kManyRows = 4;
constexpr int64_t kBufferElements = 16384;

// Outputs from here on are written around the caches: most would leave them before anybody reads them, and an ordinary store
// first reads from memory what it overwrites. At this size, norm and copy in turn took 10 % less so, at half of it the same.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// --- The first pass

enum class Addition { kNone, kResidual, kResidualAndPost };

template <class V, class T>
V rounded(V value) {
  T elements[kLanes];
  value.store(elements);
  return V::load(elements);
}

// s at element i, stored where something is added.
template <class V, class T, Addition kAddition, bool kStream>
[[gnu::always_inline]] inline V sum_at(const Row<T>& row, int64_t i) {
  if constexpr (kAddition == Addition::kNone) {
    return V::load_for_sum(row.x + i);
  } else {
    V r = V::load(row.residual + i);
    if constexpr (kAddition == Addition::kResidualAndPost) r = rounded<V, T>(r + V::load(row.post + i));
    const V s = V::load(row.x + i) + r;
    T* const sum = row.sum + i;
    s.store(sum);
    const V as_stored = V::load_for_sum(sum);
    if constexpr (kStream) s.stream(row.residual_out + i);
    return as_stored;
  }
}

// The squares of the last, incomplete step.
template <class V, class T, Addition kAddition>
[[gnu::noinline]] void rest_squares(Row<T> row, int64_t i, int64_t rest, float (&squares)[kStep]) {
  T x[kStep] = {}, residual[kStep] = {}, post[kStep] = {}, sum[kStep];
  copy(x, row.x + i, rest);
  if constexpr (kAddition != Addition::kNone) copy(residual, row.residual + i, rest);
  if constexpr (kAddition == Addition::kResidualAndPost) copy(post, row.post + i, rest);
  const Row<T> padded{x, residual, post, nullptr, nullptr, sum};
  for (int k = 0; k < kStep; k += kLanes) {
    const V s = sum_at<V, T, kAddition, false>(padded, k);
    (s * s).store(squares + k);
  }
  if constexpr (kAddition != Addition::kNone) {
    copy(row.sum + i, sum, rest);
    copy(row.residual_out + i, sum, rest);
  }
}

template <class V, class T, Addition kAddition, bool kStream>
void statistics(const RowParams& p, const Row<T>* rows, int count, float* rstd) {
  const int64_t hidden = p.hidden;
  for (int r = 0; r < count; ++r) {
    const Row<T> row = rows[r];
    V sums[kSums] = {V::broadcast(0), V::broadcast(0)};
    int64_t i = 0;
    while (i + kStep <= hidden) {  // sums of sums: one long chain of additions would drift
      V part[kSums] = {V::broadcast(0), V::broadcast(0)};
      const int64_t end = hidden - i < kChunk ? hidden : i + kChunk;
      for (; i + kStep <= end; i += kStep) {
        for (int k = 0; k < kSums; ++k) {
          const V s = sum_at<V, T, kAddition, kStream>(row, i + k * kLanes);
          part[k] = part[k] + s * s;
        }
      }
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + part[k];
    }
    if (i < hidden) {
      float squares[kStep];
      rest_squares<V, T, kAddition>(row, i, hidden - i, squares);
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + V::load(squares + k * kLanes);
    }
    const float mean = (sums[0] + sums[1]).sum() * p.inv_hidden;
    rstd[r] = 1.0f / __builtin_sqrtf(mean + p.eps);
  }
}

// --- The second pass

// Brings in what V will want soon of a row, if there is one.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* row, int64_t i) {
  if (!row) return;
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, 2);
}

// Where a row goes alone, the memory of the next one is brought in meanwhile; it would idle while the processor computes. 1024
// rows of 4096 bfloat16, in the L3 cache, took a quarter more without.
template <class V, class T, class Factors, int kRows, bool kStream>
void normalize(const RowParams& p, Factors factors, const Row<T>* rows, const float* rstd, Row<T> next) {
  const int64_t hidden = p.hidden;
  const T* s[kRows];
  T* out[kRows];
  V scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    s[r] = p.residual ? rows[r].sum : rows[r].x;
    out[r] = rows[r].out;
    scale[r] = V::broadcast(rstd[r]);
  }

  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    if constexpr (kRows == 1) {
      prefetch(next.x, i);
      prefetch(next.residual, i);
      prefetch(next.out, i);
      prefetch(next.residual_out, i);
    }
    const V w = factors.template at<V>(i);
    for (int r = 0; r < kRows; ++r) {
      const V y = V::load(s[r] + i) * scale[r] * w;
      if constexpr (kStream)
        y.stream(out[r] + i);
      else
        y.store(out[r] + i);
    }
  }
  if (const int64_t rest = hidden - i) {
    const V w = factors.template rest_at<V>(i, rest);
    for (int r = 0; r < kRows; ++r) {
      T y[kLanes] = {};
      copy(y, s[r] + i, rest);
      (V::load(y) * scale[r] * w).store(y);
      copy(out[r] + i, y, rest);
    }
  }
}

// --- Both

// Whether to write an output around the caches: it is large, none of it is in them as an input, and it is made of whole lines.
template <class T>
bool streams(const RowParams& p, const void* out, const int64_t* strides) {
  constexpr int64_t kItem = sizeof(T);
  if (p.rows * p.hidden * kItem < kStreamBytes) return false;
  if (out == p.x || out == p.residual || out == p.post_residual_addition) return false;
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && strides[d] * kItem % kCacheLine == 0;
  return aligned;
}

template <class T>
struct Buffers {
  alignas(kCacheLine) T sums[kBufferElements];
  alignas(kCacheLine) float factors[kBufferElements];
};

template <class V, class T, bool kStream>
auto choose_statistics(const RowParams& p) {
  return !p.residual                 ? &statistics<V, T, Addition::kNone, false>
         : !p.post_residual_addition ? &statistics<V, T, Addition::kResidual, kStream>
                                     : &statistics<V, T, Addition::kResidualAndPost, kStream>;
}

template <class V, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end, Buffers<T>* buffers) {
  const int block = p.hidden * static_cast<int64_t>(sizeof(T)) <= kShortBytes ? kBlock : 1;
  const bool use_prepared = buffers && block == 1 && p.hidden <= kBufferElements;
  const bool stream_out = streams<T>(p, p.out, p.out_strides);
  const bool stream_sum =
      buffers && p.residual && block * p.hidden <= kBufferElements && streams<T>(p, p.residual_out, p.residual_out_strides);

  const auto first_pass = stream_sum ? choose_statistics<V, T, true>(p) : choose_statistics<V, T, false>(p);
  const auto block_pass =
      stream_out ? &normalize<V, T, Weights<T, W>, kBlock, true> : &normalize<V, T, Weights<T, W>, kBlock, false>;
  const auto row_pass = stream_out ? &normalize<V, T, Weights<T, W>, 1, true> : &normalize<V, T, Weights<T, W>, 1, false>;
  const auto prepared_pass = stream_out ? &normalize<V, T, PreparedWeights, 1, true> : &normalize<V, T, PreparedWeights, 1, false>;
  const Weights<T, W> weights{static_cast<const W*>(p.weight), p.weight_offset};
  const PreparedWeights prepared = use_prepared ? prepare<V>(weights, p.hidden, buffers->factors) : PreparedWeights{};

  RowCursor<T> cursor(p, begin), ahead(p, begin + 1);
  while (begin < end) {
    const int count = end - begin < block ? 1 : block;
    begin += count;
    Row<T> rows[kBlock], next = {};
    for (int r = 0; r < count; ++r) {
      rows[r] = cursor.next();
      if (stream_sum) rows[r].sum = buffers->sums + r * p.hidden;
    }
    if (block == 1 && begin < end) {
      next = ahead.next();
      if (stream_out || p.out == p.x) next.out = nullptr;
      if (stream_sum || p.residual_out == p.residual) next.residual_out = nullptr;
    }
    float rstd[kBlock];
    first_pass(p, rows, count, rstd);
    if (count == kBlock)
      block_pass(p, weights, rows, rstd, next);
    else if (use_prepared)
      prepared_pass(p, prepared, rows, rstd, next);
    else
      row_pass(p, weights, rows, rstd, next);
  }
  V::fence();
}

// Large buffers have a stack frame of their own: not even touched for few rows.
template <class V, class T, class W>
[[gnu::noinline]] void run_buffered(const RowParams& p, int64_t begin, int64_t end) {
  Buffers<T> buffers;
  run<V, T, W>(p, begin, end, &buffers);
}

template <class V, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (end - begin < kManyRows)
    run<V, T, W>(p, begin, end, nullptr);
  else
    run_buffered<V, T, W>(p, begin, end);
}

template <class V, class T>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (p.weight_dtype == DType::kFloat32)
    run<V, T, float>(p, begin, end);
  else
    run<V, T, T>(p, begin, end);
}

template <class V>
void run(const RowParams& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  switch (p.dtype) {
    case DType::kFloat32: return run<V, float, float>(p, begin, end);
    case DType::kFloat16: return run<V, Float16>(p, begin, end);
    case DType::kBFloat16: return run<V, BFloat16>(p, begin, end);
    case DType::kOther: return;  // check() refuses it
  }
}

}  // namespace
}  // namespace gemma_norm
