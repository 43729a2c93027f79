// Checks a call of qk_norm_rope and launches its kernel.
#pragma once

#include <cstdio>

#include "../core/check.h"
#include "plan.h"
#include "rope_kernel.cuh"

namespace gemma_norm::gpu {
namespace {  // unnamed, because the tests link the CUDA and the emulated versions into one program

struct RopeKernel {
  void (*function)(RowParams, HeadParams, RopeLaunch);
  int32_t resident_threads;  // at least this many fit on a multiprocessor
};

// The kernel for a plan whose slots own so many vectors. Only float32 heads of more than 256 elements have four.
template <class X, class W, class A, int kVectors>
RopeKernel rope_kernel(bool aligned) {
  if (!aligned) return {&rotate_heads<X, W, A, kVectors, false>, kRopeThreads};
  return {&rotate_heads<X, W, A, kVectors, true>, rope_resident_threads<X, W, A>(kVectors)};
}
template <class X, class W, class A>
RopeKernel rope_kernel_of(int vectors, bool aligned) {
  if constexpr (sizeof(X) == sizeof(float))
    if (vectors == 4) return rope_kernel<X, W, A, 4>(aligned);
  return rope_kernel<X, W, A, 2>(aligned);
}

// Without a weight, the kernel for weights of x's dtype serves. `angles` is the dtype of the cosines and sines.
inline RopeKernel find_rope_kernel(DType x, DType weight, DType angles, int vectors, bool aligned) {
  const auto find = [&](auto element) -> RopeKernel {
    using X = decltype(element);
    const auto with_weight = [&](auto weight_element) -> RopeKernel {
      using W = decltype(weight_element);
      return angles == x ? rope_kernel_of<X, W, X>(vectors, aligned) : rope_kernel_of<X, W, float>(vectors, aligned);
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

// Whether the heads are whole, aligned vectors, and the weights too. The strides of the tokens are in `p`, those of the
// heads in `h`.
inline bool has_aligned_heads(const RowParams& p, const HeadParams& h) {
  const int64_t item = size_of(p.dtypes[kX]), items = kVectorBytes / item;
  bool aligned = p.hidden % items == 0 && h.rotary % items == 0 && (h.interleaved || h.rotary / 2 % items == 0);
  for (const Operand o : {kX, kKey, kOut, kKeyOut}) {
    aligned = aligned && is_multiple(p.data[o], kVectorBytes);
    for (const int64_t stride : p.strides[o]) aligned = aligned && stride % items == 0;
  }
  for (int i = 0; i < 2; ++i) aligned = aligned && h.strides[i] % items == 0 && h.out_strides[i] % items == 0;
  for (const Operand o : {kWeight, kKeyWeight}) {
    const int64_t bytes = items * size_of(p.dtypes[o]);
    aligned = aligned && is_multiple(p.data[o], bytes < kVectorBytes ? bytes : kVectorBytes);
  }
  return aligned;
}

// Whether the cosines and sines of each vector of a head are whole, aligned vectors.
inline bool has_aligned_angles(const RowParams& p, const HeadParams& h) {
  const int64_t items = kVectorBytes / size_of(p.dtypes[kX]);
  if (h.cache_rows) {
    const int64_t item = size_of(p.dtypes[kCosSinCache]);
    return !h.interleaved && !h.axis_stride && is_multiple(p.data[kCosSinCache], kVectorBytes) &&
           h.cache_stride * item % kVectorBytes == 0 && h.rotary / 2 % items == 0 &&
           h.rotary / 2 * item % kVectorBytes == 0;
  }
  bool aligned = true;
  for (const Operand o : {kCos, kSin}) {
    aligned = aligned && is_multiple(p.data[o], kVectorBytes);
    for (const int64_t stride : p.strides[o]) aligned = aligned && stride * size_of(p.dtypes[o]) % kVectorBytes == 0;
  }
  return aligned;
}

inline Partner partner_of(const LaunchPlan& plan, const HeadParams& h, int64_t items, bool aligned) {
  if (aligned && h.interleaved) return Partner::kInVector;
  return aligned && h.rotary == plan.slots * plan.vectors * items ? Partner::kInThread : Partner::kInOtherLane;
}

inline device::Error launch_heads(const RowParams& p, const HeadParams& h, const DeviceFacts& facts,
                                  device::Stream stream) {
  const int64_t items = kVectorBytes / size_of(p.dtypes[kX]);
  const LaunchPlan plan = make_plan(p.hidden, p.dtypes[kX], facts);
  const bool aligned = has_aligned_heads(p, h);
  const RopeKernel kernel = find_rope_kernel(p.dtypes[kX], p.dtypes[kWeight],
                                             p.dtypes[h.cache_rows ? kCosSinCache : kCos], plan.vectors, aligned);
  const int64_t heads_of_block = kRopeThreads / plan.group_threads;
  const int64_t limit = facts.max_threads / kRopeThreads, most = limit < INT32_MAX ? limit : INT32_MAX;  // blocks
  const int64_t all = p.rows * (h.heads[0] + h.heads[1]);
  RopeLaunch launch{{plan.slots, __builtin_ctz(plan.group_threads), kRopeThreads, plan.vectors, plan.whole_vectors},
                    partner_of(plan, h, items, aligned),
                    aligned && has_aligned_angles(p, h),
                    0,
                    0};
  device::Error error = device::kSuccess;
  for (; launch.first < all && error == device::kSuccess; launch.first += launch.count) {
    const int64_t left = all - launch.first;
    launch.count = left < most * heads_of_block ? left : most * heads_of_block;
    const int64_t blocks = (launch.count + heads_of_block - 1) / heads_of_block;
    launch.rows.room_for_next = 2 * blocks * kRopeThreads <= int64_t{facts.processors} * kernel.resident_threads;
    error = device::launch(kernel.function, {blocks, kRopeThreads, 1}, stream, facts, p, h, launch);
  }
  return error;
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
  DeviceFacts facts;
  device::Error error =
      device::facts(&facts, reinterpret_cast<const void*>(&rotate_heads<float, float, float, 2, true>));
  for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i)
    error = launch_heads(slices.count == 1 ? params : select_slice(params, slices, i), heads, facts, stream);
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
