// The row kernel, written once over a vector type V of 16 floats that each instruction set supplies (rms_norm_*.cpp).
//
// The bits are the same on every instruction set: each operation below is one IEEE operation a lane, in an order that depends on
// the hidden size alone. Element i belongs to lane i % 16 of sum i / 16 % 4, so a sum of squares is a chain of additions per
// lane and then one fixed tree; the last, incomplete step of a row is padded with zeros, which change no sum.
//
// Everything is in an anonymous namespace, and no std:: template is used: code compiled here for one instruction set must
// never be merged by the linker with that of another.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels/row_params.h"

// A fused multiply-add rounds once where the other instruction sets round twice.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
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

constexpr int kLanes = 16;
constexpr int kSums = 4;
constexpr int kStep = kLanes * kSums;
constexpr int kCacheLine = 64;

#ifndef GN_BLOCK
#define GN_BLOCK 4
#endif
#ifndef GN_STREAM
#define GN_STREAM (int64_t{16} << 20)
#endif
#ifndef GN_PF
#define GN_PF 3
#endif
// Rows that are normalised together: the weight is loaded once for all, and one row's chain of latencies (sum, root, division)
// hides behind the others' work.
constexpr int kBlock = GN_BLOCK;

enum class Addition { kNone, kResidual, kResidualAndPost };

template <class T>
struct Row {
  const T* x;
  const T* residual;
  const T* post;
  T* out;
  T* residual_out;
};

// Walks the rows in order.
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

  Row<T> next() {
    const Row<T> row = row_;
    for (int d = p_.row_dims - 1; d >= 0; --d) {
      move(d, 1);
      if (++at_[d] < p_.sizes[d]) break;
      move(d, -at_[d]);
      at_[d] = 0;
    }
    return row;
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

template <class T>
void copy(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class V, class T>
V rounded(V value) {
  T bits[kLanes];
  value.store(bits);
  return V::load(bits);
}

// One step of the first pass: s = the sum of the inputs, its squares added to `sums`.
template <class V, class T, Addition kAddition>
void add_squares(const Row<T>& row, int64_t i, V (&sums)[kSums]) {
  for (int k = 0; k < kSums; ++k, i += kLanes) {
    V s = V::load(row.x + i);
    if constexpr (kAddition != Addition::kNone) {
      V r = V::load(row.residual + i);
      if constexpr (kAddition == Addition::kResidualAndPost) r = rounded<V, T>(r + V::load(row.post + i));
      (s + r).store(row.residual_out + i);
      s = V::load(row.residual_out + i);
    }
    sums[k] = sums[k] + s * s;
  }
}

template <class V, class T, Addition kAddition>
float row_rstd(const RowParams& p, const Row<T>& row) {
  V sums[kSums] = {V::broadcast(0), V::broadcast(0), V::broadcast(0), V::broadcast(0)};
  int64_t i = 0;
  for (; i + kStep <= p.hidden; i += kStep) add_squares<V, T, kAddition>(row, i, sums);
  if (const int64_t rest = p.hidden - i) {
    T x[kStep] = {}, residual[kStep] = {}, post[kStep] = {}, sum[kStep];
    copy(x, row.x + i, rest);
    if constexpr (kAddition != Addition::kNone) copy(residual, row.residual + i, rest);
    if constexpr (kAddition == Addition::kResidualAndPost) copy(post, row.post + i, rest);
    add_squares<V, T, kAddition>({x, residual, post, nullptr, sum}, 0, sums);
    if constexpr (kAddition != Addition::kNone) copy(row.residual_out + i, sum, rest);
  }
  const float mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum() * p.inv_hidden;
  return 1.0f / __builtin_sqrtf(mean + p.eps);
}

// The first pass over `count` rows.
template <class V, class T, Addition kAddition>
void statistics(const RowParams& p, const Row<T>* rows, int count, float* rstd) {
  for (int r = 0; r < count; ++r) rstd[r] = row_rstd<V, T, kAddition>(p, rows[r]);
}

// The second pass over kRows rows: y = s * rstd * (weight + offset). Meanwhile brings in the rows that come next.
template <class V, class T, class W, int kRows, bool kStream>
void normalize(const RowParams& p, const Row<T>* rows, const float* rstd, const Row<T>* next) {
  const T* s[kRows];
  T* out[kRows];
  const T* next_x[kRows];
  const T* next_residual[kRows];
  V scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    s[r] = p.residual ? rows[r].residual_out : rows[r].x;
    out[r] = rows[r].out;
    next_x[r] = next[r].x;
    next_residual[r] = next[r].residual;
    scale[r] = V::broadcast(rstd[r]);
  }
  const W* weight = static_cast<const W*>(p.weight);
  const V offset = V::broadcast(p.weight_offset);

  int64_t i = 0;
  for (; i + kStep <= p.hidden; i += kStep) {
    if (GN_PF >= 0)
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kStep; j += kCacheLine / static_cast<int>(sizeof(T))) __builtin_prefetch(next_x[r] + i + j, 0, GN_PF<0?0:GN_PF);
      if (p.residual)
      for (int j = 0; j < kStep; j += kCacheLine / static_cast<int>(sizeof(T))) __builtin_prefetch(next_residual[r] + i + j, 0, GN_PF<0?0:GN_PF);
    }
    for (int k = 0; k < kStep; k += kLanes) {
      const V w = V::load(weight + i + k) + offset;
      for (int r = 0; r < kRows; ++r) {
        const V y = V::load(s[r] + i + k) * scale[r] * w;
        if constexpr (kStream)
          y.stream(out[r] + i + k);
        else
          y.store(out[r] + i + k);
      }
    }
  }
  if (const int64_t rest = p.hidden - i) {
    W w[kStep] = {};
    copy(w, weight + i, rest);
    for (int r = 0; r < kRows; ++r) {
      T y[kStep] = {};
      copy(y, s[r] + i, rest);
      for (int k = 0; k < kStep; k += kLanes) (V::load(y + k) * scale[r] * (V::load(w + k) + offset)).store(y + k);
      copy(out[r] + i, y, rest);
    }
  }
}

template <class V, class T, class W, bool kStream>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const auto first_pass = !p.residual                 ? &statistics<V, T, Addition::kNone>
                          : !p.post_residual_addition ? &statistics<V, T, Addition::kResidual>
                                                      : &statistics<V, T, Addition::kResidualAndPost>;
  RowCursor<T> cursor(p, begin);
  Row<T> rows[kBlock], next[kBlock];
  float rstd[kBlock];
  int64_t row = begin;
  if (row + kBlock <= end) {
    for (auto& r : next) r = cursor.next();
    for (; row + kBlock <= end; row += kBlock) {
      for (int r = 0; r < kBlock; ++r) rows[r] = next[r];
      if (row + 2 * kBlock <= end)
        for (auto& r : next) r = cursor.next();
      first_pass(p, rows, kBlock, rstd);
      normalize<V, T, W, kBlock, kStream>(p, rows, rstd, next);
    }
  }
  for (; row < end; ++row) {
    rows[0] = cursor.next();
    first_pass(p, rows, 1, rstd);
    normalize<V, T, W, 1, kStream>(p, rows, rstd, rows);
  }
  if constexpr (kStream) V::fence();
}

template <class V, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const int64_t item = static_cast<int64_t>(sizeof(T));
  bool stream = p.rows * p.hidden * item >= GN_STREAM && reinterpret_cast<uintptr_t>(p.out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) stream = stream && p.out_strides[d] * item % kCacheLine == 0;
  if (stream) run<V, T, W, true>(p, begin, end);
  else run<V, T, W, false>(p, begin, end);
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
  switch (p.dtype) {
    case DType::kFloat32: return run<V, float, float>(p, begin, end);
    case DType::kFloat16: return run<V, Float16>(p, begin, end);
    case DType::kBFloat16: return run<V, BFloat16>(p, begin, end);
    case DType::kOther: return;  // check() refuses it
  }
}

}  // namespace
}  // namespace gemma_norm
