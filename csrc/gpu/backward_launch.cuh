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

enum class RowsAre {
  kUnaligned,
  kAligned,
  kAlignedAndOne
};  // one: of each group of a block, see BackwardPlan::one_row

template <class Terms, RowsAre kAre, size_t kRow>
constexpr BackwardKernel make_backward_kernel() {
  constexpr BackwardTuning kTuning = kBackwardKernels[kRow];
  constexpr BackwardThreads kThreads = kTuning.of[Terms::kGated];
  constexpr bool kAligned = kAre != RowsAre::kUnaligned;
  if constexpr (kTuning.scope == Scope::kTwoPasses)
    return &backpropagate_in_two_passes<Terms, kTuning.max_block_threads, kAligned>;
  else if constexpr (kAre == RowsAre::kAlignedAndOne && has_one_row_kernel(kTuning))
    return &backpropagate_one_row<Terms, kTuning.scope, kTuning.vectors, kTuning.max_block_threads>;
  else if constexpr (kTuning.scope == Scope::kWave || kAligned)
    return &backpropagate_rows<Terms, kTuning.scope, kTuning.vectors, kThreads.rows, kTuning.max_block_threads,
                               kThreads.resident, kAligned>;
  else
    return nullptr;  // no plan has it
}

template <class Terms, RowsAre kAre, size_t... kRows>
BackwardKernel kernel_of(int kernel, std::index_sequence<kRows...>) {
  static constexpr BackwardKernel kTable[] = {make_backward_kernel<Terms, kAre, kRows>()...};
  return kTable[kernel];
}

// Calls visit() with the terms of a call that check() has let through.
template <class Op, class Visit>
auto visit_terms(const RowParams& p, const Visit& visit) {
  if constexpr (Op::kGated) {
    if (p.dtypes[kX] == DType::kFloat16) return visit(GatedTerms<float16>());
    if (p.dtypes[kX] == DType::kBFloat16) return visit(GatedTerms<bfloat16>());
    return visit(GatedTerms<float>());
  } else {
    if (p.dtypes[kX] == DType::kFloat16) return visit(PlainTerms<float16, float16>());
    if (p.dtypes[kX] == DType::kBFloat16) return visit(PlainTerms<bfloat16, bfloat16>());
    if (p.dtypes[kDOut] == DType::kFloat16) return visit(PlainTerms<float, float16>());
    if (p.dtypes[kDOut] == DType::kBFloat16) return visit(PlainTerms<float, bfloat16>());
    return visit(PlainTerms<float, float>());
  }
}

template <class Op>
BackwardKernel find_backward_kernel(const RowParams& p, const BackwardPlan& plan, bool aligned) {
  return visit_terms<Op>(p, [&](auto terms) {
    using Terms = decltype(terms);
    constexpr auto kRows = std::make_index_sequence<kBackwardKernelCount>();
    if (plan.one_row) return kernel_of<Terms, RowsAre::kAlignedAndOne>(plan.kernel, kRows);
    if (aligned) return kernel_of<Terms, RowsAre::kAligned>(plan.kernel, kRows);
    return kernel_of<Terms, RowsAre::kUnaligned>(plan.kernel, kRows);
  });
}

// Whether sum_rows() can compute dweight: it has threads for all rows, counts in 32 bits, and finds the rows as they
// were. Aligned rows must be so few and short that they have a kernel that leaves their rstd; others are treated alike,
// so that the sum over the rows has the same order.
bool has_few_rows(const RowParams& p) {
  const int64_t most = groups_of(p) * kMaxSumParts * kRowsOfPart;
  bool kept = make_backward_plan(p, true, 32).one_row;
  for (const Operand out : {kDX, kDGate})
    for (const Operand in : {kX, kDOut, kGate}) kept = kept && !(p.data[out] && p.data[out] == p.data[in]);
  return kept && p.rows <= most && most < INT32_MAX;
}

device::Error sum_partials(const RowParams& params, Partials partials, int64_t chunks, const DeviceFacts& facts,
                           device::Stream stream) {
  // The chunks of the groups of a row lie one after another, and are one row of dweight's columns.
  const int64_t groups = groups_of(params);
  partials.columns *= groups;
  chunks /= groups;
  int32_t log2_parts = kLog2MinSumParts;
  while (log2_parts < kLog2MaxSumParts && int64_t{2 * kChunksOfPart} << log2_parts <= chunks) ++log2_parts;
  const Grid grid{(partials.columns + kSumColumns - 1) / kSumColumns, kSumColumns << log2_parts, 1};
  return device::launch(&sum_chunks, grid, stream, facts, params, partials, static_cast<int32_t>(chunks), log2_parts);
}

template <class Op>
device::Error sum_rows_of(const RowParams& params, bool aligned, Partials partials, const DeviceFacts& facts,
                          device::Stream stream) {
  const int64_t groups = groups_of(params), rows = params.rows / groups;
  int32_t parts = kMinRowParts;
  while (parts * kRowsOfPart < rows) parts *= 2;
  return visit_terms<Op>(params, [&](auto terms) {
    using Terms = decltype(terms);
    const auto kernel = aligned ? &sum_rows<Terms, true> : &sum_rows<Terms, false>;
    const Grid grid{groups * ((params.hidden + kSumColumns - 1) / kSumColumns), kSumColumns / Terms::kCount * parts, 1};
    return device::launch(kernel, grid, stream, facts, params, partials, static_cast<int32_t>(groups), parts);
  });
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
    const bool alone = slices.count == 1 && plan.chunks == groups_of(params) && plan.scope != Scope::kTwoPasses &&
                       reinterpret_cast<uintptr_t>(params.data[kDWeight]) % kVectorBytes == 0;
    const bool few = slices.count == 1 && has_few_rows(params);
    partials.to = alone ? SumsTo::kDWeight : few ? SumsTo::kRows : SumsTo::kMemory;
  }
  const int64_t floats = partials.to == SumsTo::kMemory ? chunks * params.hidden : params.rows;
  if (partials.to == SumsTo::kMemory || partials.to == SumsTo::kRows)
    partials.sums = static_cast<float*>(call.scratch(call.context, floats * int64_t{sizeof(float)}));
  for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i) {
    const RowParams p = slice(i);
    const BackwardPlan plan = plan_of(p);
    const Launch launch{plan.slots, plan.log2_slots, plan.block_threads, plan.vectors, plan.whole_vectors};
    partials.chunks = plan.chunks;
    error = device::launch(find_backward_kernel<Op>(p, plan, aligned(p)), {plan.chunks, plan.block_threads, 1}, stream,
                           facts, p, launch, partials);
    partials.first_chunk += plan.chunks;
  }
  if (partials.to == SumsTo::kMemory && error == device::kSuccess)
    error = sum_partials(params, partials, chunks, facts, stream);
  if (partials.to == SumsTo::kRows && error == device::kSuccess)
    error = sum_rows_of<Op>(params, aligned(params), partials, facts, stream);
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
