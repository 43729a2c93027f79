// What kernels need to know, beside RowParams, of an operator whose rows are the heads of tokens and are rotated. A
// "row" of RowParams is then a token, and `data` and `strides` lead to its first head.
#pragma once

#include <cstdint>

#include "../device/anywhere.h"
#include "row_params.h"

namespace gemma_norm {

// See QkNormRope::kCopies.
constexpr Operand kValue = kResidual, kValueOut = kResidualOut, kGateOut = kDGate;

// Heads that are copied beside q and k: those of the gate and of v.
struct CopiedHeads {
  static constexpr Operand kFrom[] = {kGate, kValue}, kTo[] = {kGateOut, kValueOut};

  int64_t heads[2];  // 0 of what is not given
  int64_t strides[2], out_strides[2];
};

// How a head is rotated, and whether its norm is rounded before: what a kernel takes as it is.
struct Rotation {
  int32_t rotary;                      // elements of a head that are rotated
  int32_t interleaved;                 // the elements of a pair are neighbours; otherwise rotary / 2 apart
  int32_t round_norm, round_rotation;  // Options::round_each_step and round_rotation; 0 if x is float32

  // With a cache.
  int64_t cache_rows, cache_stride;  // cache_rows is 0 if cos and sin are given
  int64_t axis_stride;               // from one of a token's positions to the next; 0 if it has one
  int32_t mrope_interleaved;
  // Pairs begin to end - 1 take the position of the height, axis 1, and that of the width, axis 2; with
  // mrope_interleaved, those of them with pair % 3 == axis.
  int32_t begin[2], end[2];

  // Which of a token's positions the pair takes.
  GEMMA_NORM_ANYWHERE int axis(int pair) const {
    if (!axis_stride) return 0;
    const auto takes = [&](int axis) {
      return pair >= begin[axis - 1] && pair < end[axis - 1] && (!mrope_interleaved || pair % 3 == axis);
    };
    return takes(2) ? 2 : takes(1) ? 1 : 0;
  }
  GEMMA_NORM_ANYWHERE int pair_of(int i) const {
    const int half = rotary / 2;
    return interleaved ? i / 2 : i < half ? i : i - half;
  }
  GEMMA_NORM_ANYWHERE bool is_first(int i) const { return interleaved ? i % 2 == 0 : i < rotary / 2; }
  GEMMA_NORM_ANYWHERE int partner(int i) const {
    const int half = rotary / 2;
    return interleaved ? i ^ 1 : i < half ? i + half : i - half;
  }
};

struct HeadParams : Rotation {
  int64_t heads[2];        // of q and of k
  int64_t strides[2];      // from head to head of q and of k
  int64_t out_strides[2];  // and of their results
};

// A stride along which there is one head, or one row, counts as 0.
inline int64_t stride_of(const Tensor& t, int d) { return t.sizes[d] > 1 ? t.strides[d] : 0; }

// These are of a call that check() has let through.
inline CopiedHeads copied_heads(const Call& call) {
  CopiedHeads c{};
  for (int i = 0; i < 2; ++i) {
    const Tensor* const from = call.tensors[CopiedHeads::kFrom[i]];
    if (!from) continue;
    const int d = from->dims - 2;
    c.heads[i] = from->sizes[d];
    c.strides[i] = stride_of(*from, d);
    c.out_strides[i] = stride_of(*call.tensors[CopiedHeads::kTo[i]], d);
  }
  return c;
}

inline HeadParams head_params(const Call& call) {
  HeadParams h{};
  const Tensor &q = *call.tensors[kX], &k = *call.tensors[kKey];
  const int d = q.dims - 2;
  h.heads[0] = q.sizes[d], h.heads[1] = k.sizes[d];
  h.strides[0] = stride_of(q, d), h.strides[1] = stride_of(k, d);
  h.out_strides[0] = stride_of(*call.tensors[kOut], d), h.out_strides[1] = stride_of(*call.tensors[kKeyOut], d);
  const Options& options = call.options;
  h.interleaved = options.interleaved;
  h.round_norm = options.round_each_step && q.dtype != DType::kFloat32;
  h.round_rotation = options.round_rotation && q.dtype != DType::kFloat32;
  if (const Tensor* const cache = call.tensors[kCosSinCache]) {
    h.rotary = static_cast<int32_t>(cache->sizes[1]);
    h.cache_rows = cache->sizes[0];
    h.cache_stride = stride_of(*cache, 0);
  } else {
    h.rotary = static_cast<int32_t>(call.tensors[kCos]->sizes[call.tensors[kCos]->dims - 1]);
  }
  if (options.mrope_section.count) {
    h.axis_stride = call.tensors[kPositions]->strides[0];
    h.mrope_interleaved = options.mrope_interleaved;
    const auto size = [&](int axis) { return static_cast<int32_t>(options.mrope_section.sizes[axis]); };
    const int32_t begin[2] = {size(0), size(0) + size(1)};
    for (int i = 0; i < 2; ++i) {
      h.begin[i] = h.mrope_interleaved ? 0 : begin[i];
      h.end[i] = h.mrope_interleaved ? 3 * size(i + 1) : begin[i] + size(i + 1);
    }
  }
  return h;
}

}  // namespace gemma_norm
