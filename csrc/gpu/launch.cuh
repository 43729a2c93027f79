// Checks a call, chooses the one kernel that serves it and launches that, in the same way on every device.
#pragma once

#include <cstdio>
#include <type_traits>
#include <utility>

#include "../core/check.h"
#include "../ops/variants.h"
#include "plan.h"
#include "row_kernel.cuh"

namespace gemma_norm::gpu {
namespace {  // unnamed, because the tests link the CUDA and the emulated versions into one program

struct Kernel {
  void (*function)(RowParams, Launch);
  int32_t resident_threads;  // at least this many fit on a multiprocessor
};

// The kernel of entry `kRow` of kKernels (tuning.h), or none if no plan can choose that entry. Accessing single
// elements takes registers, and a kernel that holds many vectors as well would spill some. Unaligned rows that need
// more than a wave are therefore read in two passes, in the same shape and hence with the same result. Where x has a
// norm of its own, so are those that need four vectors of a wave, and the longest rows, for which a thread has only 64
// registers. Rows that are quantised are held only if they are aligned and a thread has more registers than that.
template <class V, bool kAligned, size_t kRow>
constexpr Kernel make_kernel() {
  constexpr KernelTuning kTuning = kKernels[kRow];
  constexpr Scope kScope = kTuning.scope;
  constexpr int kVectors = kTuning.vectors, kThreads = kTuning.max_block_threads;
  constexpr bool kSpreadOnly = kTuning.row_vectors == 0;  // only aligned rows are spread
  constexpr bool kHolds = kAligned ? kScope != Scope::kTwoPasses && !(V::Form::kNormsX && kThreads == kMaxBlockThreads)
                                   : kScope == Scope::kWave && !(V::Form::kNormsX && kVectors > 2);
  if constexpr (((kScope == Scope::kCluster || kSpreadOnly) && !device::kHasClusters) ||
                kResidentThreads<V, kRow> == 0 || (kSpreadOnly && !kAligned)) {
    return {};
  } else if constexpr (V::Form::kQuantizes &&
                       (!kAligned || kScope == Scope::kTwoPasses || kThreads == kMaxBlockThreads)) {
    return {&normalize_in_two_passes<V, Scope::kTwoPasses, kMaxBlockThreads, false>, kMaxBlockThreads};
  } else if constexpr (kHolds) {
    return {&normalize_rows<V, kScope, kVectors, kThreads, kAligned>, kAligned ? kResidentThreads<V, kRow> : kThreads};
  } else if constexpr (kScope == Scope::kWave) {
    return {&normalize_in_two_passes<V, kScope, kThreads, kAligned>, kThreads};
  } else {
    constexpr Scope kTwoPassScope = kScope == Scope::kCluster ? kScope : Scope::kTwoPasses;
    constexpr int kTwoPassThreads = kScope == Scope::kCluster || kThreads > 512 ? 1024 : 512;
    return {&normalize_in_two_passes<V, kTwoPassScope, kTwoPassThreads, kAligned>, kTwoPassThreads};
  }
}

// The kernels of a variant, one for each entry of kKernels, and what a plan depends on.
struct VariantKernels {
  const Kernel* by_alignment[2];  // [is_aligned], each an array of kKernelCount
  DType row_dtype;                // of s
  Held held;
};

template <class V, bool kAligned, size_t... kRows>
const Kernel* kernel_table(std::index_sequence<kRows...>) {
  static constexpr Kernel kTable[] = {make_kernel<V, kAligned, kRows>()...};
  return kTable;
}

template <class Op>
VariantKernels find_kernels(const RowParams& p) {
  VariantKernels found{};
  with_variant<Op, float16, bfloat16>(p, [&](auto variant) {
    using V = decltype(variant);
    constexpr auto kRows = std::make_index_sequence<kKernelCount>();
    found = {{kernel_table<V, false>(kRows), kernel_table<V, true>(kRows)},
             V::Form::kFloat32Rows ? DType::kFloat32 : p.dtypes[kX],
             kHeld<V>};
  });
  return found;
}

device::Error launch_rows(const OpInfo& info, const VariantKernels& kernels, const RowParams& p, LaunchPlan plan,
                          const DeviceFacts& facts, device::Stream stream) {
  bool aligned = is_aligned(p, plan.whole_vectors, kernels.row_dtype);
  GroupPlan groups_of_row{true, 0, 1};
  if (info.quantizes()) {
    groups_of_row = plan_groups(plan, p, kernels.row_dtype);
    aligned = aligned && groups_of_row.held;
    if (!aligned) plan = one_row_a_block(plan, facts);
  }
  int64_t row_bytes = 0;
  for (int o = 0; o < kOperands; ++o)
    if (p.data[o] && o != kScale && o != kGlobalScale && o != kScaleOut) row_bytes += p.hidden * size_of(p.dtypes[o]);
  // Unaligned rows keep their plan: they are read in two passes, and spreading those was never measured.
  // Neither is a row whose groups meet in the shared memory of one block.
  if (aligned && groups_of_row.lanes == 1 << groups_of_row.log2_vectors) plan = spread(plan, p.rows, row_bytes, facts);
  if (prints_plans()) print_plan(info, p, kernels.row_dtype, plan, aligned);
  const Kernel kernel = kernels.by_alignment[aligned][plan.kernel];
  return each_launch(p, max_blocks(plan, facts) * plan.rows_per_block(), [&](const RowParams& part) {
    const int64_t groups = (part.rows + plan.rows_per_block() - 1) / plan.rows_per_block();
    const bool room =
        2 * groups * plan.cluster * plan.block_threads <= int64_t{facts.processors} * kernel.resident_threads;
    const Launch launch{plan.slots,
                        __builtin_ctz(plan.group_threads / plan.slot_threads),
                        plan.block_threads,
                        plan.vectors,
                        plan.whole_vectors,
                        room,
                        groups_of_row.log2_vectors,
                        groups_of_row.lanes,
                        Divider(part.sizes[1])};
    return device::launch(kernel.function, {groups, plan.block_threads, plan.cluster}, stream, facts, part, launch);
  });
}

}  // namespace

// An operator's source, such as csrc/cuda/rms_norm.cu, instantiates this function, and with it all kernels of the
// operator.
template <class Op>
Status launch_op(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0) return Status::kOk;
  DeviceFacts facts;
  const auto any_kernel = &normalize_rows<Variant<Op, float, float, false>, Scope::kBlock, 4, 256, true>;
  device::Error error = device::facts(&facts, reinterpret_cast<const void*>(any_kernel));
  if (error == device::kSuccess) {
    const VariantKernels kernels = find_kernels<Op>(params);
    LaunchPlan plan = make_plan(params.hidden, kernels.row_dtype, facts, kernels.held);
    if (call.op->quantizes() && plan.scope == Scope::kCluster) {
      // Rows beyond the shapes of a block get the same bits whatever their groups are.
      DeviceFacts alone = facts;
      alone.max_cluster = 1;
      if (const LaunchPlan block = make_plan(params.hidden, kernels.row_dtype, alone, kernels.held);
          block.scope == Scope::kTwoPasses || !plan_groups(plan, params, kernels.row_dtype).held)
        plan = block;
    }
    for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i)
      error = launch_rows(*call.op, kernels, slices.count == 1 ? params : select_slice(params, slices, i), plan, facts,
                          stream);
  }
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
