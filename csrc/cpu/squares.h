// The first pass over a row: the sum of the inputs and its squares. Part of row_kernel.h: the anonymous namespace is the same.
#pragma once

#include <cstdint>

#include "../core/row_params.h"
#include "rows.h"

namespace gemma_norm {
namespace {

constexpr int kStep = 2 * kLanes;       // an addition takes some cycles: have more than one under way
constexpr int64_t kChunk = 64 * kStep;  // what one chain of additions adds up

// What ops/parts.h's sources add up: ResidualSource adds post where the call has one.
enum class Addition { kNone, kResidual, kResidualAndPost };

template <class V, class T>
V rounded(V value) {
  T elements[kLanes];
  value.store(elements);
  return V::load(elements);
}

// s of kLanes elements from i on, written down.
template <class V, class T, Addition kAddition, bool kStream>
[[gnu::always_inline]] inline void store_sum(const Row<T>& row, int64_t i) {
  V r = V::load(row[kResidual] + i);
  if constexpr (kAddition == Addition::kResidualAndPost) r = rounded<V, T>(r + V::load(row[kPost] + i));
  const V s = V::load(row[kX] + i) + r;
  s.store(row.sum + i);
  if constexpr (kStream) s.stream(row[kResidualOut] + i);
}

// s of the last, incomplete step; the rest of `sum` stays or becomes zero.
template <class V, class T, Addition kAddition>
[[gnu::noinline]] void rest_of_sum(Row<T> row, int64_t i, int64_t rest, T (&sum)[kStep]) {
  if constexpr (kAddition == Addition::kNone) {
    copy(sum, row[kX] + i, rest);
  } else {
    T x[kStep] = {}, residual[kStep] = {}, post[kStep] = {};
    copy(x, row[kX] + i, rest);
    copy(residual, row[kResidual] + i, rest);
    if constexpr (kAddition == Addition::kResidualAndPost) copy(post, row[kPost] + i, rest);
    Row<T> padded;
    padded.of[kX] = x, padded.of[kResidual] = residual, padded.of[kPost] = post, padded.sum = sum;
    for (int k = 0; k < kStep; k += kLanes) store_sum<V, T, kAddition, false>(padded, k);
    copy(row.sum + i, sum, rest);
    copy(row[kResidualOut] + i, sum, rest);
  }
}

// How the lanes of a V add up squares: how many elements each takes of a step, and the number that its sum starts from. A 16-bit
// number's square is exact in float32, underflow aside, so that one operation does for two.
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

// AVX-512's operation for pairs of bfloat16 takes subnormal inputs and sums as zero. Each lane's sum therefore starts at the least
// normal number, which end_chunk() takes away again: so it is never subnormal, and the square of a subnormal bfloat16, below
// 2^-252, could not change it anyway.
template <>
struct LaneSum<BFloat16> {
  static constexpr int kElements = 2;
  static constexpr float kStart = 0x1p-126f;

  template <class V>
  [[gnu::always_inline]] static V add_squares(const V& sum, const BFloat16* s) {
    return V::add_squares_of_pairs(sum, s);
  }
};

// A row's squares, added up: sums of sums, as one long chain of additions would drift.
template <class V, class T, Addition kAddition, bool kStream>
class Squares {
 public:
  explicit Squares(const Row<T>& row) : row_(row) {
    for (int k = 0; k < kSums; ++k) {
      sums_[k] = V::broadcast(0);
      part_[k] = V::broadcast(LaneSum<T>::kStart);
    }
  }

  [[gnu::always_inline]] void add_step(int64_t i) {
    if constexpr (kAddition == Addition::kNone) {
      add(row_[kX] + i);
    } else {
      for (int k = 0; k < kStep; k += kLanes) store_sum<V, T, kAddition, kStream>(row_, i + k);
      add(row_.sum + i);
    }
  }
  [[gnu::always_inline]] void end_chunk() {
    for (int k = 0; k < kSums; ++k) {
      sums_[k] = sums_[k] + (part_[k] + V::broadcast(-LaneSum<T>::kStart));
      part_[k] = V::broadcast(LaneSum<T>::kStart);
    }
  }
  [[gnu::always_inline]] void add_rest(int64_t i, int64_t rest) {
    T sum[kStep] = {};
    rest_of_sum<V, T, kAddition>(row_, i, rest, sum);
    add(sum);
    end_chunk();
  }
  [[gnu::always_inline]] float rstd(const RowParams& p) const {
    V sum = sums_[0];
    for (int k = 1; k < kSums; ++k) sum = sum + sums_[k];
    return 1.0f / __builtin_sqrtf(sum.sum() * p.inv_hidden + p.eps);
  }

 private:
  static constexpr int kWidth = kLanes * LaneSum<T>::kElements;
  static constexpr int kSums = kStep / kWidth;

  [[gnu::always_inline]] void add(const T* s) {
    for (int k = 0; k < kSums; ++k) part_[k] = LaneSum<T>::add_squares(part_[k], s + k * kWidth);
  }

  const Row<T> row_;
  V sums_[kSums];
  V part_[kSums];
};

}  // namespace
}  // namespace gemma_norm
