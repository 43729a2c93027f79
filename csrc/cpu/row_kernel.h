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

#ifndef GN_SHORT
#define GN_SHORT 2048
#endif
#ifndef GN_STREAM
#define GN_STREAM (int64_t{32} << 20)
#endif
#ifndef GN_AHEAD
#define GN_AHEAD 15
#endif
#ifndef GN_LONG
#define GN_LONG 2
#endif
// Rows of a block. More share each weight that is loaded and converted, and hide each other's latencies (sum, root, division);
// fewer leave room in the L1 cache. Short rows are those of which four and their outputs fit well.
constexpr int64_t kShortBytes = GN_SHORT;
constexpr int kShortBlock = 4;
constexpr int kLongBlock = GN_LONG;

// Outputs from this size on do not stay in any cache: writing around it spares reading them from memory first.
constexpr int64_t kStreamBytes = GN_STREAM;
constexpr int64_t kScratchBytes = 65536;

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
  T* sum;  // where the second pass finds s, if something is added: residual_out or scratch memory
};

// Walks the rows in order; after the last one it is at the first again.
template <class T>
class RowCursor {
 public:
  RowCursor(const RowParams& p, int64_t row) : p_(p) {
    row_ = {static_cast<const T*>(p.x), static_cast<const T*>(p.residual), static_cast<const T*>(p.post_residual_addition),
            static_cast<T*>(p.out), static_cast<T*>(p.residual_out), nullptr};
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

// --- The first pass.

enum class Addition { kNone, kResidual, kResidualAndPost };

template <class V, class T>
V rounded(V value) {
  T elements[kLanes];
  value.store(elements);
  return V::load(elements);
}

// The vector of s at element i, stored where something is added.
template <class V, class T, Addition kAddition, bool kStream>
[[gnu::always_inline]] inline V sum_at(const Row<T>& row, int64_t i) {
  if constexpr (kAddition == Addition::kNone) {
    return V::load_for_sum(row.x + i);
  } else {
    V r = V::load(row.residual + i);
    if constexpr (kAddition == Addition::kResidualAndPost) r = rounded<V, T>(r + V::load(row.post + i));
    const V s = V::load(row.x + i) + r;
    T* const to = row.sum + i;
    s.store(to);
    const V sum = V::load_for_sum(to);
    if constexpr (kStream) s.stream(row.residual_out + i);
    return sum;
  }
}

// The same for the rest of a row that is no whole step, padded with zeros.
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
    const Row<T> row = rows[r];  // a copy: no store can change it
    V sums[kSums] = {V::broadcast(0), V::broadcast(0)};
    int64_t i = 0;
    for (; i + kStep <= hidden; i += kStep) {
      for (int k = 0; k < kSums; ++k) {
        const V s = sum_at<V, T, kAddition, kStream>(row, i + k * kLanes);
        sums[k] = sums[k] + s * s;
      }
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

// --- The second pass.

// Memory that the next block will want, one pointer a row of a tensor; brought in element by element with the pass over this
// block. Memory would else idle while the processor computes.
struct Ahead {
  const char* rows[4 * kLongBlock];
  int count = 0;

  void add(const void* row) { rows[count++] = static_cast<const char*>(row); }
  void prefetch(int64_t from, int64_t bytes) const {
    for (int r = 0; r < count; ++r)
      for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch(rows[r] + from + b, 0, 2);
  }
};

template <class V, class T, class W>
[[gnu::always_inline]] inline V weight_at(const W* weight, V offset) {
  return V::load(weight) + offset;
}

template <class V, class T, class W, int kRows, bool kStream>
void normalize(const RowParams& p, const Row<T>* rows, const float* rstd, const Ahead& ahead) {
  const T* s[kRows];
  T* out[kRows];
  V scale[kRows];
  for (int r = 0; r < kRows; ++r) {
    s[r] = p.residual ? rows[r].sum : rows[r].x;
    out[r] = rows[r].out;
    scale[r] = V::broadcast(rstd[r]);
  }
  const W* weight = static_cast<const W*>(p.weight);
  const V offset = V::broadcast(p.weight_offset);

  int64_t i = 0;
  for (; i + kLanes <= p.hidden; i += kLanes) {
    ahead.prefetch(i * sizeof(T), kLanes * sizeof(T));
    const V w = weight_at<V, T>(weight + i, offset);
    for (int r = 0; r < kRows; ++r) {
      const V y = V::load(s[r] + i) * scale[r] * w;
      if constexpr (kStream)
        y.stream(out[r] + i);
      else
        y.store(out[r] + i);
    }
  }
  if (const int64_t rest = p.hidden - i) {
    W w[kLanes] = {};
    copy(w, weight + i, rest);
    for (int r = 0; r < kRows; ++r) {
      T y[kLanes] = {};
      copy(y, s[r] + i, rest);
      (V::load(y) * scale[r] * weight_at<V, T>(w, offset)).store(y);
      copy(out[r] + i, y, rest);
    }
  }
}

// --- Both.

// Whether to write around the caches: the output is large, not in them already, and made of whole cache lines.
template <class T>
bool streams(const RowParams& p, const void* out, const int64_t* strides) {
  constexpr int64_t kItem = sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
  for (int d = 0; d < p.row_dims; ++d) aligned = aligned && strides[d] * kItem % kCacheLine == 0;
  return aligned && out != p.x && out != p.residual && p.rows * p.hidden * kItem >= kStreamBytes;
}

template <class V, class T, bool kStream>
auto choose_statistics(const RowParams& p) {
  return !p.residual                 ? &statistics<V, T, Addition::kNone, false>
         : !p.post_residual_addition ? &statistics<V, T, Addition::kResidual, kStream>
                                     : &statistics<V, T, Addition::kResidualAndPost, kStream>;
}

template <class V, class T, class W>
void run(const RowParams& p, int64_t begin, int64_t end) {
  const int64_t bytes = p.hidden * static_cast<int64_t>(sizeof(T));
  const bool is_short = bytes <= kShortBytes;
  const int block = is_short ? kShortBlock : kLongBlock;
  const bool stream_out = streams<T>(p, p.out, p.out_strides);
  const bool stream_sum = p.residual && block * bytes <= kScratchBytes && streams<T>(p, p.residual_out, p.residual_out_strides);

  const auto first_pass = stream_sum ? choose_statistics<V, T, true>(p) : choose_statistics<V, T, false>(p);
  const auto short_block = stream_out ? &normalize<V, T, W, kShortBlock, true> : &normalize<V, T, W, kShortBlock, false>;
  const auto long_block = stream_out ? &normalize<V, T, W, kLongBlock, true> : &normalize<V, T, W, kLongBlock, false>;
  const auto one_row = stream_out ? &normalize<V, T, W, 1, true> : &normalize<V, T, W, 1, false>;

  alignas(kCacheLine) char scratch[kScratchBytes];
  RowCursor<T> cursor(p, begin), next(p, begin + block);
  while (begin < end) {
    const int count = end - begin < block ? 1 : block;
    Row<T> rows[kShortBlock];
    float rstd[kShortBlock];
    Ahead ahead;
    for (int r = 0; r < count; ++r) {
      rows[r] = cursor.next();
      rows[r].sum = stream_sum ? reinterpret_cast<T*>(scratch) + r * p.hidden : rows[r].residual_out;
    }
    begin += count;
    if (!is_short && begin + block <= end) {
      for (int r = 0; r < count; ++r) {
        const Row<T> row = next.next();
        if(GN_AHEAD&1) ahead.add(row.x);
        if(GN_AHEAD&1)  if (p.residual) ahead.add(row.residual);
        if(GN_AHEAD&2)  if (!stream_out && p.out != p.x) ahead.add(row.out);
        if(GN_AHEAD&4)  if (p.residual && !stream_sum && p.residual_out != p.residual) ahead.add(row.residual_out);
      }
    }
    first_pass(p, rows, count, rstd);
    (count == 1 ? one_row : is_short ? short_block : long_block)(p, rows, rstd, ahead);
  }
  V::fence();
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
