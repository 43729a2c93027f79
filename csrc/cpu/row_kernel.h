// The row kernel, written once over a vector type V of 32 floats, which each instruction set supplies (rms_norm_*.cpp).
//
// A thread takes its rows in small blocks and passes over each block twice, the second time out of the cache:
//   statistics  s = the sum of the inputs, stored where there is something to add; rstd of every row
//   normalize   y = s * rstd * weight
//
// The bits are the same on every instruction set, NaN payloads aside. Every operation on V is one IEEE operation a lane, and the
// order of a sum of squares depends on hidden and dtype alone: lane j of sum k adds up the elements that V::load_for_sum puts
// there, in the order of their steps, and one fixed tree adds up the lanes. The last, incomplete step of a row is padded with
// zeros, which change no sum.
//
// All of it is in an anonymous namespace and uses no std:: template: the linker must never merge what is compiled here for one
// instruction set with that of another.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels/row_params.h"

// A fused multiply-add rounds once where an instruction set without it rounds twice.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace gemma_norm {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kLanes = 32;
constexpr int kSums = 2;  // additions take several cycles: two vectors, of two or more registers each, are under way at a time
constexpr int kStep = kLanes * kSums;
constexpr int64_t kCacheLine = 64;

#ifndef GN_BLOCKBYTES
#define GN_BLOCKBYTES 4096
#endif
#ifndef GN_STREAM
#define GN_STREAM (int64_t{32} << 20)
#endif
#ifndef GN_PF
#define GN_PF 2
#endif
// Rows of a block: as many as hide each other's latencies (sum, root, division) without pushing each other out of the L1 cache.
constexpr int64_t kBlockRows = 8;
constexpr int64_t kBlockBytes = GN_BLOCKBYTES;

// Outputs from this size on do not stay in any cache: writing around it spares reading them from memory first.
constexpr int64_t kStreamBytes = GN_STREAM;

// Weights converted at a time, to float32 with the offset added. Longer rows than this are rare.
constexpr int64_t kWeights = 16384;

template <class T>
void copy(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
struct Row {
  const T* x;
  const T* residual;
  const T* post;
  T* out;
  T* residual_out;
};

// Walks the rows in order; after the last one it is at the first again.
template <class T>
class RowCursor {
 public:
  RowCursor(const RowParams& p, int64_t row) : p_(p) {
    row_ = {static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<const T*>(p.post_residual_addition),
            static_cast<T*>(p.out), static_cast<T*>(p.residual_out)};
    for (int d = p.row_dims - 1; d >= 0; --d) {
      at_[d] = row % p.sizes[d];
      row /= p.sizes[d];
      move(d, at_[d]);
    }
  }

  const Row<T>& row() const { return row_; }

  void advance() {
    for (int d = p_.row_dims - 1; d >= 0; --d) {
      move(d, 1);
      if (++at_[d] < p_.sizes[d]) return;
      move(d, -at_[d]);
      at_[d] = 0;
    }
  }

 private:
  void move(int d, int64_t steps) {
    row_.x += steps * p_.x_strides[d];
    row_.residual += steps * p_.residual_strides[d];
    row_.post += steps * p_.post_strides[d];
    row_.out += steps * p_.out_strides[d];
    row_.residual_out += steps * p_.residual_out_strides[d];
  }

  const RowParams& p_;
  Row<T> row_;
  int64_t at_[kMaxRowDims];
};

// --- The first pass.

enum class Addition { kNone, kResidual, kResidualAndPost };

template <class V, class T>
V rounded(V value) {
  T elements[kLanes];
  value.store(elements);
  return V::load(elements);
}

template <class V, class T, Addition kAddition>
[[gnu::always_inline]] inline void statistics_step(const Row<T>& row, int64_t i, V (&sums)[kSums]) {
  for (int k = 0; k < kSums; ++k, i += kLanes) {
    const T* s = row.x;
    if constexpr (kAddition != Addition::kNone) {
      V r = V::load(row.residual + i);
      if constexpr (kAddition == Addition::kResidualAndPost) r = rounded<V, T>(r + V::load(row.post + i));
      (V::load(row.x + i) + r).store(row.residual_out + i);
      s = row.residual_out;
    }
    const V v = V::load_for_sum(s + i);
    sums[k] = sums[k] + v * v;
  }
}

template <class V, class T, Addition kAddition>
float statistics(const RowParams& p, const Row<T>& row) {
  V sums[kSums] = {V::broadcast(0), V::broadcast(0)};
  int64_t i = 0;
  for (; i + kStep <= p.hidden; i += kStep) statistics_step<V, T, kAddition>(row, i, sums);
  if (const int64_t rest = p.hidden - i) {
    T x[kStep] = {}, residual[kStep] = {}, post[kStep] = {}, sum[kStep];
    copy(x, row.x + i, rest);
    if constexpr (kAddition != Addition::kNone) copy(residual, row.residual + i, rest);
    if constexpr (kAddition == Addition::kResidualAndPost) copy(post, row.post + i, rest);
    statistics_step<V, T, kAddition>({x, residual, post, nullptr, sum}, 0, sums);
    if constexpr (kAddition != Addition::kNone) copy(row.residual_out + i, sum, rest);
  }
  const float mean = (sums[0] + sums[1]).sum() * p.inv_hidden;
  return 1.0f / __builtin_sqrtf(mean + p.eps);
}

// --- The second pass.

// Weights [from, from + count) as the second pass wants them.
template <class V, class W>
void convert_weights(const RowParams& p, int64_t from, int64_t count, float* to) {
  const W* weight = static_cast<const W*>(p.weight) + from;
  const V offset = V::broadcast(p.weight_offset);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) (V::load(weight + i) + offset).store(to + i);
  if (const int64_t rest = count - i) {
    W padded[kLanes] = {};
    copy(padded, weight + i, rest);
    (V::load(padded) + offset).store(to + i);
  }
  // The only NaN that can have bits set below those of a bfloat16 come from float32 weights. Without such bits, rounding by
  // adding to the bits leaves a NaN as it is, and V need not look for one.
  for (int64_t j = 0; j < count; ++j) to[j] = to[j] == to[j] ? to[j] : __builtin_nanf("");
}

template <class T>
void prefetch(const T* row, int64_t i) {
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  for (int64_t j = 0; j < kLanes; j += kLine) __builtin_prefetch(row + i + j, 0, GN_PF);
}

// `count` elements of one row. Meanwhile brings in the same elements of the row that comes next, if there is one: memory would
// else idle while the processor computes.
template <class V, class T, bool kStream>
void normalize(const T* s, float rstd, const float* weight, int64_t count, T* out, const T* next_x, const T* next_residual) {
  const V scale = V::broadcast(rstd);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (next_x) prefetch(next_x, i);
    if (next_residual) prefetch(next_residual, i);
    const V y = V::load(s + i) * scale * V::load(weight + i);
    if constexpr (kStream)
      y.stream(out + i);
    else
      y.store(out + i);
  }
  if (const int64_t rest = count - i) {
    T padded[kLanes] = {};
    float w[kLanes] = {};
    copy(padded, s + i, rest);
    copy(w, weight + i, rest);
    (V::load(padded) * scale * V::load(w)).store(padded);
    copy(out + i, padded, rest);
  }
}

// --- Both.

// Whether to write around the caches: `out` is large, not in them already, and made of whole cache lines.
template <class T>
bool streams(const RowParams& p) {
  constexpr int64_t kItem = sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(p.out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && p.out_strides[d] * kItem % kCacheLine == 0;
  return aligned && p.out != p.x && p.out != p.residual && p.rows * p.hidden * kItem >= kStreamBytes;
}

template <class V, class T>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const auto statistics_of = !p.residual                 ? &statistics<V, T, Addition::kNone>
                             : !p.post_residual_addition ? &statistics<V, T, Addition::kResidual>
                                                         : &statistics<V, T, Addition::kResidualAndPost>;
  const auto convert = p.weight_dtype == DType::kFloat32 ? &convert_weights<V, float> : &convert_weights<V, T>;
  const auto write = streams<T>(p) ? &normalize<V, T, true> : &normalize<V, T, false>;

  alignas(kCacheLine) float weight[kWeights];
  if (p.hidden <= kWeights) convert(p, 0, p.hidden, weight);

  const int64_t fitting = kBlockBytes / (p.hidden * static_cast<int64_t>(sizeof(T)));
  const int64_t block = fitting < 1 ? 1 : fitting < kBlockRows ? fitting : kBlockRows;
  Row<T> rows[kBlockRows];
  float rstd[kBlockRows];
  RowCursor<T> cursor(p, begin);
  while (begin < end) {
    const int64_t count = end - begin < block ? end - begin : block;
    for (int64_t r = 0; r < count; ++r, cursor.advance()) {
      rows[r] = cursor.row();
      rstd[r] = statistics_of(p, rows[r]);
    }
    begin += count;
    const Row<T> next = block == 1 && begin < end ? cursor.row() : Row<T>{};  // short rows need no help
    for (int64_t r = 0; r < count; ++r) {
      const T* s = p.residual ? rows[r].residual_out : rows[r].x;
      for (int64_t i = 0; i < p.hidden; i += kWeights) {
        const int64_t part = p.hidden - i < kWeights ? p.hidden - i : kWeights;
        if (p.hidden > kWeights) convert(p, i, part, weight);
        write(s + i, rstd[r], weight, part, rows[r].out + i, next.x ? next.x + i : nullptr,
              next.residual ? next.residual + i : nullptr);
      }
    }
  }
  V::fence();
}

template <class V>
void run(const RowParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32: return run<V, float>(p, begin, end);
    case DType::kFloat16: return run<V, Float16>(p, begin, end);
    case DType::kBFloat16: return run<V, BFloat16>(p, begin, end);
    case DType::kOther: return;  // check() refuses it
  }
}

}  // namespace
}  // namespace gemma_norm
