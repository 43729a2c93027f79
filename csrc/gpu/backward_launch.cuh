// Checks a call of a backward operator, and launches the kernel that computes its gradients by rows, then, unless
// each block has all rows, the one that adds up dweight.
#pragma once

#include <cstdio>
#include <utility>

#include "../core/check.h"
#include "backward_kernel.cuh"
#include "backward_plan.h"
#include "plan.h"

namespace gemma_norm::gpu {
namespace {  // unnamed, because the tests link the CUDA and the emulated versions into one program

using BackwardKernel = void (*)(RowParams, Launch, Partials);

template <class Terms, bool kAligned, size_t kRow>
constexpr BackwardKernel make_backward_kernel() {
  constexpr BackwardTuning kTuning = kBackwardKernels[kRow];
  constexpr BackwardThreads kThreads = kTuning.of[Terms::kGated];
  if constexpr (kTuning.scope == Scope::kTwoPasses)
    return &backpropagate_in_two_passes<Terms, kTuning.max_block_threads, kAligned>;
  else if constexpr (kTuning.scope == Scope::kWave || kAligned)
    return &backpropagate_rows<Terms, kTuning.scope, kTuning.vectors, kThreads.rows, kTuning.max_block_threads,
                               kThreads.resident, kAligned>;
  else
    return nullptr;  // no plan has it
}

template <class Terms, bool kAligned, size_t... kRows>
BackwardKernel kernel_of(int kernel, std::index_sequence<kRows...>) {
  static constexpr BackwardKernel kTable[] = {make_backward_kernel<Terms, kAligned, kRows>()...};
  return kTable[kernel];
}

// The kernel of entry `kernel` of kBackwardKernels for a call that check() has let through.
template <class Op>
BackwardKernel find_backward_kernel(const RowParams& p, int kernel, bool aligned) {
  const auto find = [&](auto terms) {
    using Terms = decltype(terms);
    constexpr auto kRows = std::make_index_sequence<kBackwardKernelCount>();
    return aligned ? kernel_of<Terms, true>(kernel, kRows) : kernel_of<Terms, false>(kernel, kRows);
  };
  if constexpr (Op::kGated) {
    if (p.dtypes[kX] == DType::kFloat16) return find(GatedTerms<float16>());
    if (p.dtypes[kX] == DType::kBFloat16) return find(GatedTerms<bfloat16>());
    return find(GatedTerms<float>());
  } else {
    if (p.dtypes[kX] == DType::kFloat16) return find(PlainTerms<float16, float16>());
    if (p.dtypes[kX] == DType::kBFloat16) return find(PlainTerms<bfloat16, bfloat16>());
    if (p.dtypes[kDOut] == DType::kFloat16) return find(PlainTerms<float, float16>());
    if (p.dtypes[kDOut] == DType::kBFloat16) return find(PlainTerms<float, bfloat16>());
    return find(PlainTerms<float, float>());
  }
}

// The same rows with two dimensions.
RowParams two_dimensions(RowParams p) {
  if (p.row_dims == 2) return p;
  p.row_dims = 2;
  p.sizes[1] = p.sizes[0];
  p.sizes[0] = 1;
  for (auto& strides : p.strides) {
    strides[1] = strides[0];
    strides[0] = 0;
  }
  return p;
}

device::Error sum_partials(const RowParams& params, Partials partials, int64_t chunks, const DeviceFacts& facts,
                           device::Stream stream) {
  // The chunks of the groups of a row lie one after another, and are one row of dweight's columns.
  const int64_t groups = groups_of(params);
  partials.columns *= groups;
  chunks /= groups;
  int32_t parts = kMinSumParts;
  while (parts < kMaxSumParts && 2 * parts * kChunksOfPart <= chunks) parts *= 2;
  const Grid grid{(partials.columns + kSumColumns - 1) / kSumColumns, kSumColumns * parts, 1};
  return device::launch(&sum_chunks, grid, stream, facts, params, partials, chunks, parts);
}

}  // namespace

// An operator's source, such as csrc/cuda/rms_norm_backward.cu, instantiates this function, and with it all kernels of
// the operator. Every slice of the rows is a launch with chunks of its own.
template <class Op>
Status launch_op(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0 && !params.data[kDWeight]) return Status::kOk;
  params = two_dimensions(params);
  DeviceFacts facts;
  device::Error error = device::facts(&facts, reinterpret_cast<const void*>(&sum_chunks));
  const auto slice = [&](int64_t i) { return slices.count == 1 ? params : select_slice(params, slices, i); };
  const auto aligned = [](const RowParams& p) {
    return is_aligned(p, p.hidden % (kVectorBytes / size_of(p.dtypes[kX])) == 0, p.dtypes[kX]);
  };
  const auto plan_of = [&](const RowParams& p) { return make_backward_plan(p, aligned(p), facts.wave_width); };
  int64_t chunks = 0;
  for (int64_t i = 0; i < slices.count; ++i) chunks += plan_of(slice(i)).chunks;
  Partials partials{nullptr, params.hidden, 0, 0, SumsTo::kNowhere};
  if (params.data[kDWeight]) {
    const BackwardPlan plan = plan_of(params);
    const bool alone = slices.count == 1 && plan.chunks == groups_of(params) && plan.scope != Scope::kTwoPasses;
    partials.to = alone ? SumsTo::kDWeight : SumsTo::kMemory;
  }
  if (partials.to == SumsTo::kMemory)
    partials.sums = static_cast<float*>(call.scratch(call.context, chunks * params.hidden * int64_t{sizeof(float)}));
  for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i) {
    const RowParams p = slice(i);
    const BackwardPlan plan = plan_of(p);
    const Launch launch{plan.slots, plan.log2_slots, plan.block_threads, plan.vectors, plan.whole_vectors};
    partials.chunks = plan.chunks;
    error = device::launch(find_backward_kernel<Op>(p, plan.kernel, aligned(p)), {plan.chunks, plan.block_threads, 1},
                           stream, facts, p, launch, partials);
    partials.first_chunk += plan.chunks;
  }
  if (partials.to == SumsTo::kMemory && error == device::kSuccess)
    error = sum_partials(params, partials, chunks, facts, stream);
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
