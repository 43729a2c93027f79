// From a checked call to the one kernel that serves it, the same way on every device.
#pragma once

#include <cstdio>
#include <type_traits>
#include <utility>

#include "../core/check.h"
#include "plan.h"
#include "row_kernel.cuh"

namespace gemma_norm::gpu {
namespace {  // the tests link CUDA's and the emulated device's into one program

template <class T>
struct Type {
  using type = T;
};

template <class Call>
auto with_dtypes(DType x, DType weight, Call&& call) {
  switch (x) {
    case DType::kFloat32: return call(Type<float>{}, Type<float>{});
    case DType::kFloat16: return weight == x ? call(Type<float16>{}, Type<float16>{}) : call(Type<float16>{}, Type<float>{});
    default:  // check() lets nothing else through
      return weight == x ? call(Type<bfloat16>{}, Type<bfloat16>{}) : call(Type<bfloat16>{}, Type<float>{});
  }
}

// Can every access be a whole, aligned vector? A property of this call's memory: it picks the instructions, never the shape.
bool is_aligned(const RowParams& p, const LaunchPlan& plan) {
  uint64_t bits = 0;
  for (int o = 0; o < kOperands; ++o) {
    bits |= reinterpret_cast<uintptr_t>(p.data[o]);
    for (const int64_t stride : p.strides[o]) bits |= stride * size_of(p.dtypes[o]);
  }
  return plan.whole_vectors && bits % kVectorBytes == 0;
}

struct Kernel {
  void (*function)(RowParams, Launch);
  int32_t resident_threads;  // that a multiprocessor holds at least
};

// The kernel of row `kRow` of tuning.h. Picking single elements for many vectors would spill registers: such rows are streamed, in
// the same shape, hence with the same result.
template <class Op, class X, class W, bool kAligned, size_t kRow>
constexpr Kernel make_kernel() {
  constexpr KernelTuning kTuning = kKernels[kRow];
  constexpr Scope kScope = kTuning.scope;
  constexpr int kVectors = kTuning.vectors, kThreads = kTuning.max_block_threads;
  constexpr bool kSpreadOnly = kTuning.row_vectors == 0;  // and such rows are aligned
  if constexpr ((kScope == Scope::kCluster && !device::kHasClusters) || kResidentThreads<Op, X, W, kRow> == 0 ||
                (kSpreadOnly && !kAligned)) {
    return {};  // of no plan
  } else if constexpr (kScope == Scope::kWave || (kAligned && kScope != Scope::kStream)) {
    return {&normalize_rows<Op, X, W, kScope, kVectors, kThreads, kAligned>,
            kAligned ? kResidentThreads<Op, X, W, kRow> : kThreads};
  } else {
    constexpr Scope kStreamScope = kScope == Scope::kCluster ? kScope : Scope::kStream;
    constexpr int kStreamThreads = kScope == Scope::kCluster || kThreads > 512 ? 1024 : 512;
    return {&normalize_stream<Op, X, W, kStreamScope, kStreamThreads, kAligned>, kStreamThreads};
  }
}

template <class Op, class X, class W, bool kAligned, size_t... kRows>
Kernel choose_kernel(int32_t kernel, std::index_sequence<kRows...>) {
  static constexpr Kernel kTable[] = {make_kernel<Op, X, W, kAligned, kRows>()...};
  return kTable[kernel];
}

template <class Op>
Kernel choose_kernel(DType x, DType weight, bool aligned, const LaunchPlan& plan) {
  return with_dtypes(x, weight, [&](auto x, auto w) {
    using X = typename decltype(x)::type;
    using W = typename decltype(w)::type;
    constexpr auto kRows = std::make_index_sequence<kKernelCount>();
    return aligned ? choose_kernel<Op, X, W, true>(plan.kernel, kRows) : choose_kernel<Op, X, W, false>(plan.kernel, kRows);
  });
}

template <class Op>
device::Error launch_rows(const OpInfo& info, RowParams p, LaunchPlan plan, const DeviceFacts& facts, device::Stream stream) {
  const bool aligned = is_aligned(p, plan);
  int64_t row_bytes = 0;
  for (int o = 0; o < kOperands; ++o) row_bytes += p.data[o] ? p.hidden * size_of(p.dtypes[o]) : 0;
  // Rows that are picked element by element keep their plan: they are streamed, for which spreading was never measured.
  if (aligned) plan = spread(plan, p.rows, row_bytes, facts);
  if (prints_plans()) print_plan(info, p, plan, aligned);
  const Kernel kernel = choose_kernel<Op>(p.dtypes[kX], p.dtypes[kWeight], aligned, plan);
  const int64_t most = max_blocks(plan, facts);
  device::Error error = device::kSuccess;
  for (p.first_row = 0; p.first_row < p.rows && error == device::kSuccess; p.first_row += most * plan.rows_per_block()) {
    const int64_t all = (p.rows - p.first_row + plan.rows_per_block() - 1) / plan.rows_per_block(),
                  groups = all < most ? all : most;
    const bool room = 2 * groups * plan.cluster * plan.block_threads <= int64_t{facts.processors} * kernel.resident_threads;
    const Launch launch{plan.slots, __builtin_ctz(plan.group_threads), plan.vectors, plan.whole_vectors, room};
    error = device::launch(kernel.function, {groups, plan.block_threads, plan.cluster}, stream, facts, p, launch);
  }
  return error;
}

}  // namespace

// Each operator's source instantiates it (csrc/cuda/rms_norm.cu), and with it all of the operator's kernels.
template <class Op>
Status run(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0) return Status::kOk;
  DeviceFacts facts;
  const auto any_kernel = &normalize_rows<Op, float, float, Scope::kBlock, 4, 256, true>;
  device::Error error = device::facts(&facts, reinterpret_cast<const void*>(any_kernel));
  if (error == device::kSuccess) {
    const LaunchPlan plan = make_plan(params.hidden, params.dtypes[kX], facts, Op::Source::kTwoRows);
    for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i)
      error = launch_rows<Op>(*call.op, slices.count == 1 ? params : select_slice(params, slices, i), plan, facts, stream);
  }
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace gemma_norm::gpu
