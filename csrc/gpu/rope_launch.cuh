// Checks a call of qk_norm_rope and launches its kernel.
#pragma once

#include <algorithm>
#include <cstdio>

#include "../core/check.h"
#include "plan.h"
#include "rope_kernel.cuh"

namespace gemma_norm::gpu {
namespace {  // unnamed, because the tests link the CUDA and the emulated versions into one program

template <bool kNarrow>
struct RopeKernel {
  void (*function)(RopeParams<kNarrow>);
  int32_t resident_threads;  // at least this many fit on a multiprocessor
};

// The kernel for a plan whose slots own so many vectors. Only float32 heads of more than 256 elements have four.
template <class X, class W, class A, int kVectors, Partner kPartner>
constexpr RopeKernel<kForAlignedHeads<kPartner>> make_rope_kernel() {
  return {&rotate_heads<X, W, A, kVectors, kPartner>, rope_resident_threads<X, W, A>(kVectors, kPartner)};
}
template <class X, class W, class A, int kVectors, bool kNarrow>
RopeKernel<kNarrow> rope_kernel(Partner partner) {
  if constexpr (kNarrow) {
    switch (partner) {
      case Partner::kInVector: return make_rope_kernel<X, W, A, kVectors, Partner::kInVector>();
      case Partner::kInThread: return make_rope_kernel<X, W, A, kVectors, Partner::kInThread>();
      default: return make_rope_kernel<X, W, A, kVectors, Partner::kInOtherLane>();
    }
  } else {
    return make_rope_kernel<X, W, A, kVectors, Partner::kInMemory>();
  }
}
template <class X, class W, class A, bool kNarrow>
RopeKernel<kNarrow> rope_kernel_of(int vectors, Partner partner) {
  if constexpr (sizeof(X) == sizeof(float))
    if (vectors == 4) return rope_kernel<X, W, A, 4, kNarrow>(partner);
  return rope_kernel<X, W, A, 2, kNarrow>(partner);
}

// Without a weight, the kernel for weights of x's dtype serves. `angles` is the dtype of the cosines and sines. kNarrow
// says that the partner is not in memory.
template <bool kNarrow>
RopeKernel<kNarrow> find_rope_kernel(DType x, DType weight, DType angles, int vectors, Partner partner) {
  const auto find = [&](auto element) -> RopeKernel<kNarrow> {
    using X = decltype(element);
    const auto with_weight = [&](auto weight_element) -> RopeKernel<kNarrow> {
      using W = decltype(weight_element);
      return angles == x ? rope_kernel_of<X, W, X, kNarrow>(vectors, partner)
                         : rope_kernel_of<X, W, float, kNarrow>(vectors, partner);
    };
    if (weight == DType::kOther || weight == x) return with_weight(X());
    if constexpr (sizeof(X) == sizeof(float))
      return weight == DType::kFloat16 ? with_weight(float16()) : with_weight(bfloat16());
    else
      return with_weight(float());
  };
  switch (x) {
    case DType::kFloat16: return find(float16());
    case DType::kBFloat16: return find(bfloat16());
    default: return find(float());
  }
}

inline bool is_multiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether the heads, the weights and the angles of each vector of a head are whole, aligned vectors, and all strides of
// tokens and heads are less than 2^32 bytes, as the kernels for aligned heads have them in 32 bits. (The cosines and
// sines of neighbours that are a pair are half a vector in a cache.) The strides of the tokens are in `p`, those of the
// heads in `h`.
inline bool has_aligned_heads(const RowParams& p, const HeadParams& h, const CopiedHeads& copied) {
  const int64_t item = size_of(p.dtypes[kX]), items = kVectorBytes / item;
  bool aligned = p.hidden % items == 0 && h.rotary % items == 0 && (h.interleaved || h.rotary / 2 % items == 0);
  const auto check = [&](Operand o, int64_t bytes) {
    bytes = bytes < kVectorBytes ? bytes : kVectorBytes;
    aligned = aligned && is_multiple(p.data[o], bytes);
    for (const int64_t stride : p.strides[o]) {
      const int64_t step = stride * size_of(p.dtypes[o]);
      aligned = aligned && step % bytes == 0 && step >> 32 == 0;
    }
  };
  for (const Operand o : {kX, kKey, kOut, kKeyOut, kGate, kValue, kGateOut, kValueOut}) check(o, kVectorBytes);
  for (const Operand o : {kWeight, kKeyWeight}) check(o, items * size_of(p.dtypes[o]));
  for (int i = 0; i < 2; ++i)
    for (const int64_t stride : {h.strides[i], h.out_strides[i], copied.strides[i], copied.out_strides[i]})
      aligned = aligned && stride % items == 0 && stride * item >> 32 == 0;
  if (!h.cache_rows) {
    check(kCos, kVectorBytes);
    check(kSin, kVectorBytes);
  } else {
    const int64_t item = size_of(p.dtypes[kCosSinCache]), bytes = h.interleaved ? items * item / 2 : items * item;
    check(kCosSinCache, bytes);
    check(kPositions, 4);
    for (const int64_t offset : {h.cache_stride * item, h.rotary / 2 * item})
      aligned = aligned && offset % (bytes < kVectorBytes ? bytes : kVectorBytes) == 0;
  }
  return aligned;
}

inline Partner partner_of(const LaunchPlan& plan, const RowParams& p, const HeadParams& h, const CopiedHeads& copied) {
  if (!has_aligned_heads(p, h, copied)) return Partner::kInMemory;
  if (h.interleaved) return Partner::kInVector;
  const int64_t items = kVectorBytes / size_of(p.dtypes[kX]), vectors = h.rotary / items;
  if (vectors == plan.slots * plan.vectors) return Partner::kInThread;
  // A lane finds another by flipping one bit of its own number.
  return vectors <= plan.slots && (vectors & (vectors - 1)) == 0 ? Partner::kInOtherLane : Partner::kInMemory;
}

template <bool kNarrow>
RopeParams<kNarrow> rope_params(const RowParams& p, const HeadParams& h, const CopiedHeads& copied,
                                const LaunchPlan& plan) {
  using Bytes = Stride<kNarrow>;
  const int64_t item = size_of(p.dtypes[kX]);
  const auto of_tokens = [&](Operand o) -> OfTokens<kNarrow> {
    const int64_t bytes = size_of(p.dtypes[o]);
    return {p.data[o], {static_cast<Bytes>(p.strides[o][0] * bytes), static_cast<Bytes>(p.strides[o][1] * bytes)}};
  };
  const auto of_heads = [&](Operand o, int64_t stride) -> OfHeads<kNarrow> {
    return {of_tokens(o), static_cast<Bytes>(stride * item)};
  };
  RopeParams<kNarrow> r{};
  r.x[0] = of_heads(kX, h.strides[0]), r.x[1] = of_heads(kKey, h.strides[1]);
  r.out[0] = of_heads(kOut, h.out_strides[0]), r.out[1] = of_heads(kKeyOut, h.out_strides[1]);
  r.weights[0] = p.data[kWeight], r.weights[1] = p.data[kKeyWeight];
  if (h.cache_rows) {
    char* const cache = static_cast<char*>(p.data[kCosSinCache]);
    r.cos = {cache, {}};
    r.sin = {cache + h.rotary / 2 * size_of(p.dtypes[kCosSinCache]), {}};
    r.positions = of_tokens(kPositions);
  } else {
    r.cos = of_tokens(kCos), r.sin = of_tokens(kSin);
  }
  r.h = h;
  r.rows = {plan.slots, __builtin_ctz(plan.group_threads), kRopeThreads, plan.vectors, plan.whole_vectors};
  r.rows.inner_rows = Divider(p.sizes[1]);
  r.hidden = static_cast<int32_t>(p.hidden);
  r.fills_groups = plan.group_threads * plan.vectors * kVectorBytes == p.hidden * item;
  r.partner_distance = h.rotary / 2 * static_cast<int32_t>(item) / kVectorBytes;
  r.int32_positions = p.dtypes[kPositions] == DType::kInt32;
  r.heads_of_q = static_cast<uint32_t>(h.heads[0]), r.heads = static_cast<uint32_t>(h.heads[0] + h.heads[1]);
  for (int i = 0; i < 2; ++i) {
    r.copies.from[i] = of_heads(CopiedHeads::kFrom[i], copied.strides[i]);
    r.copies.to[i] = of_heads(CopiedHeads::kTo[i], copied.out_strides[i]);
  }
  r.copies.heads_of_gate = static_cast<uint32_t>(copied.heads[0]);
  r.eps = p.eps, r.inv_hidden = p.inv_hidden, r.weight_offset = p.data[kWeight] ? p.weight_offset : 1.0f;
  return r;
}

// How many heads of a token a group of lanes works on. As many threads as fit on the GPU are enough, and more than
// kMostHeads heads a group were no faster (T133).
constexpr int64_t kMostHeads = 5;
inline int64_t heads_of_group(int64_t threads, const DeviceFacts& facts, int32_t resident_threads) {
  const int64_t fit = int64_t{facts.processors} * resident_threads;
  return std::min(kMostHeads, fit ? (threads + fit - 1) / fit : kMostHeads);
}

template <bool kNarrow>
device::Error launch_heads(const RowParams& p, const HeadParams& h, const CopiedHeads& copied, const LaunchPlan& plan,
                           Partner partner, const DeviceFacts& facts, device::Stream stream) {
  const RopeKernel<kNarrow> kernel = find_rope_kernel<kNarrow>(
      p.dtypes[kX], p.dtypes[kWeight], p.dtypes[h.cache_rows ? kCosSinCache : kCos], plan.vectors, partner);
  const int64_t groups_of_block = kRopeThreads / plan.group_threads;
  const int64_t heads = h.heads[0] + h.heads[1], heads_copied = copied.heads[0] + copied.heads[1];
  // Of a launch with copies, each of the two kinds of blocks has half.
  const int64_t most_blocks =
      std::min<int64_t>(facts.max_threads / kRopeThreads, INT32_MAX / groups_of_block) / (heads_copied ? 2 : 1);
  const int64_t most_groups = most_blocks * groups_of_block;
  int64_t each = 1;
  if (kNarrow)
    each =
        std::max(heads_of_group(p.rows * (heads + heads_copied) * plan.group_threads, facts, kernel.resident_threads),
                 (heads + most_groups - 1) / most_groups);
  const int64_t groups_of_token = std::min((heads + each - 1) / each, most_groups);
  const int64_t copies_of_token = std::min((heads_copied + each - 1) / each, most_groups);
  int64_t most = most_groups / std::max(groups_of_token, copies_of_token);     // tokens of a launch
  if (heads_copied && most > groups_of_block) most -= most % groups_of_block;  // a part of a period has all its blocks

  return each_launch(p, most, [&](const RowParams& part) {
    const int64_t tokens = part.rows;
    RopeParams<kNarrow> from = rope_params<kNarrow>(part, h, copied, plan);
    from.groups_of_block = static_cast<int32_t>(groups_of_block);
    from.groups_of_token = Divider(groups_of_token);
    from.heads_of_group = static_cast<int32_t>(each);
    RopeCopies<kNarrow>& copies = from.copies;
    copies.groups_of_token = Divider(std::max<int64_t>(copies_of_token, 1));
    from.groups = static_cast<uint32_t>(tokens * groups_of_token);
    copies.groups = static_cast<uint32_t>(tokens * copies_of_token);
    from.heads_copied = static_cast<uint32_t>(heads_copied);
    // A period is as many tokens as fill its blocks.
    const int64_t of_period = std::min(tokens, groups_of_block);
    const auto blocks_of = [&](int64_t groups) { return (groups + groups_of_block - 1) / groups_of_block; };
    const int64_t rope = blocks_of(of_period * groups_of_token), period = rope + blocks_of(of_period * copies_of_token);
    device::Error error = device::kSuccess;
    for (int64_t head = 0; head < heads && error == device::kSuccess; head += groups_of_token * each) {
      from.first_head = static_cast<uint32_t>(head);
      int64_t blocks = blocks_of(from.groups);
      if (from.heads_copied) {
        copies.blocks_of_rope = static_cast<uint32_t>(rope), copies.period = Divider(period);
        blocks = (tokens + of_period - 1) / of_period * period;
      }
      from.rows.room_for_next = 2 * blocks * kRopeThreads <= int64_t{facts.processors} * kernel.resident_threads;
      error = device::launch(kernel.function, {blocks, kRopeThreads, 1}, stream, facts, from);
      from.heads_copied = 0;  // they are done
    }
    return error;
  });
}

inline device::Error launch_heads(const RowParams& p, const HeadParams& h, const CopiedHeads& copied,
                                  const DeviceFacts& facts, device::Stream stream) {
  const LaunchPlan plan = make_plan(p.hidden, p.dtypes[kX], facts);
  const Partner partner = partner_of(plan, p, h, copied);
  return partner != Partner::kInMemory ? launch_heads<true>(p, h, copied, plan, partner, facts, stream)
                                       : launch_heads<false>(p, h, copied, plan, partner, facts, stream);
}

}  // namespace

// The operator's source, such as csrc/cuda/qk_norm_rope.cu, instantiates this function, and with it the kernels.
template <class Op>
Status launch_op(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0) return Status::kOk;
  const HeadParams heads = head_params(call);
  const CopiedHeads copied = copied_heads(call);
  const auto too_many = [&](const char* names, const auto& of) {
    if (of[0] + of[1] <= INT32_MAX) return false;
    std::snprintf(message->text, sizeof message->text, "%s: %s must have less than 2^31 heads, got %lld and %lld",
                  call.op->name, names, static_cast<long long>(of[0]), static_cast<long long>(of[1]));
    return true;
  };
  if (too_many("q and k", heads.heads) || too_many("gate and v", copied.heads)) return Status::kInvalidArgument;
  DeviceFacts facts;
  device::Error error =
      device::facts(&facts, reinterpret_cast<const void*>(&rotate_heads<float, float, float, 2, Partner::kInThread>));
  for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i)
    error = launch_heads(slices.count == 1 ? params : select_slice(params, slices, i), heads, copied, facts, stream);
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
