// Checks a call of a backward operator, and launches the kernel that computes dx, then the one that adds up dweight.
#pragma once

#include <cstdio>
#include <utility>

#include "../core/check.h"
#include "../ops/rms_norm_backward.h"
#include "backward_kernel.cuh"
#include "backward_plan.h"
#include "entry.h"
#include "plan.h"

namespace gemma_norm::gpu {
namespace {  // unnamed, because the tests link the CUDA and the emulated versions into one program

using BackwardKernel = void (*)(RowParams, Launch, Partials);

template <class X, class Y, bool kAligned, size_t kRow>
constexpr BackwardKernel make_backward_kernel() {
  constexpr BackwardTuning kTuning = kBackwardKernels[kRow];
  if constexpr (kTuning.scope == Scope::kTwoPasses)
    return &backpropagate_in_two_passes<X, Y, kTuning.max_block_threads, kAligned>;
  else if constexpr (kTuning.scope == Scope::kWave || kAligned)
    return &backpropagate_rows<X, Y, kTuning.scope, kTuning.vectors, kTuning.rows, kTuning.max_block_threads,
                               kTuning.resident_threads, kAligned>;
  else
    return nullptr;  // no plan has it
}

template <class X, class Y, bool kAligned, size_t... kRows>
BackwardKernel backward_kernel(int kernel, std::index_sequence<kRows...>) {
  static constexpr BackwardKernel kTable[] = {make_backward_kernel<X, Y, kAligned, kRows>()...};
  return kTable[kernel];
}

// The kernel of entry `kernel` of kBackwardKernels for the dtypes of x and dout, which check() has let through.
BackwardKernel find_backward_kernel(const RowParams& p, int kernel, bool aligned) {
  const auto find = [&](auto x, auto dout) {
    using X = decltype(x);
    using Y = decltype(dout);
    constexpr auto kRows = std::make_index_sequence<kBackwardKernelCount>();
    return aligned ? backward_kernel<X, Y, true>(kernel, kRows) : backward_kernel<X, Y, false>(kernel, kRows);
  };
  if (p.dtypes[kX] == DType::kFloat16) return find(float16(), float16());
  if (p.dtypes[kX] == DType::kBFloat16) return find(bfloat16(), bfloat16());
  if (p.dtypes[kDOut] == DType::kFloat16) return find(float(), float16());
  if (p.dtypes[kDOut] == DType::kBFloat16) return find(float(), bfloat16());
  return find(float(), float());
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

}  // namespace

// Every slice of the rows is a launch with chunks of its own.
template <>
Status launch_op<RmsNormBackward>(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0 && !params.data[kDWeight]) return Status::kOk;
  DeviceFacts facts;
  device::Error error = device::facts(&facts, reinterpret_cast<const void*>(&sum_chunks));
  const auto slice = [&](int64_t i) {
    return two_dimensions(slices.count == 1 ? params : select_slice(params, slices, i));
  };
  const auto plan_of = [&](const RowParams& p) {
    const bool whole_vectors = p.hidden % (kVectorBytes / size_of(p.dtypes[kX])) == 0;
    return make_backward_plan(p, is_aligned(p, whole_vectors, p.dtypes[kX]), facts.wave_width);
  };
  int64_t chunks = 0;
  for (int64_t i = 0; i < slices.count; ++i) chunks += plan_of(slice(i)).chunks;
  Partials partials{nullptr, params.hidden, 0, 0};
  if (params.data[kDWeight])
    partials.sums = static_cast<float*>(call.scratch(call.context, chunks * params.hidden * int64_t{sizeof(float)}));
  for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i) {
    const RowParams p = slice(i);
    const BackwardPlan plan = plan_of(p);
    const bool aligned = is_aligned(p, plan.whole_vectors, p.dtypes[kX]);
    const Launch launch{plan.slots, plan.log2_slots, plan.vectors, plan.whole_vectors};
    partials.chunks = plan.chunks;
    error = device::launch(find_backward_kernel(p, plan.kernel, aligned), {plan.chunks, plan.block_threads, 1}, stream,
                           facts, p, launch, partials);
    partials.first_chunk += plan.chunks;
  }
  if (params.data[kDWeight] && error == device::kSuccess) {
    int32_t parts = 1;
    while (parts < kMaxSumParts && 2 * parts * kChunksOfPart <= chunks) parts *= 2;
    const Grid grid{(params.hidden + kSumColumns - 1) / kSumColumns, kSumColumns * parts, 1};
    error = device::launch(&sum_chunks, grid, stream, facts, params, partials, chunks, parts);
  }
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
