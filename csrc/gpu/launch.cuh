// From a checked call to the one kernel instantiation that serves it, the same way on every device.
#pragma once

#include <cstdio>
#include <type_traits>

#include "../core/check.h"
#include "row_kernel.cuh"

namespace gemma_norm::kernels {
namespace {  // the tests link CUDA's and the emulated device's into one program

template <class T>
struct Type {
  using type = T;
};

// Can every access be a whole, aligned vector? A property of this call's memory: it picks the instructions, never the layout.
bool is_aligned(const RowParams& p, const LaunchPlan& plan) {
  uint64_t bits = 0;
  for (int o = 0; o < kOperands; ++o) {
    bits |= reinterpret_cast<uintptr_t>(p.data[o]);
    for (const int64_t stride : p.strides[o]) bits |= stride * size_of(p.dtypes[o]);
  }
  return plan.whole_vectors && bits % kVectorBytes == 0;
}

template <class Call>
auto with_dtypes(DType x, DType weight, Call&& call) {
  switch (x) {
    case DType::kFloat32: return call(Type<float>{}, Type<float>{});
    case DType::kFloat16: return weight == x ? call(Type<float16>{}, Type<float16>{}) : call(Type<float16>{}, Type<float>{});
    default:  // check() lets nothing else through
      return weight == x ? call(Type<bfloat16>{}, Type<bfloat16>{}) : call(Type<bfloat16>{}, Type<float>{});
  }
}

template <class Call>
auto with_bool(bool value, Call&& call) {
  return value ? call(std::true_type{}) : call(std::false_type{});
}

struct Kernel {
  void (*function)(RowParams, Layout);
  int32_t resident_threads;  // that a multiprocessor holds at least
};

template <class X, class W, bool kAdd, Scope kScope, int kVectors, int kThreads, bool kAligned>
Kernel rows() {
  return {&rms_norm_rows<X, W, kAdd, kScope, kVectors, kThreads, kAligned>,
          kResidentThreads<X, W, kAdd, kVectors, kThreads, kAligned>};
}

// Exactly the shapes of the ladder in plan.cpp, those of one block also spread over a cluster. Picking single elements for many
// vectors would spill registers: streamed instead, in the same layout, hence with the same result.
template <class X, class W, bool kAdd, bool kAligned>
Kernel choose_kernel(const LaunchPlan& plan) {
  if (plan.scope == Scope::kWave)
    return plan.vectors == 2 ? rows<X, W, kAdd, Scope::kWave, 2, 128, kAligned>()
                             : rows<X, W, kAdd, Scope::kWave, 4, 64, kAligned>();
  if constexpr (kAligned) {
    if constexpr (device::kHasClusters) {
      if (plan.scope == Scope::kCluster) {
        if (plan.vectors == 2) return rows<X, W, kAdd, Scope::kCluster, 2, 256, true>();
        if (plan.vectors == 4) return rows<X, W, kAdd, Scope::kCluster, 4, 256, true>();
        return plan.most_threads == 256 ? rows<X, W, kAdd, Scope::kCluster, 8, 256, true>()
                                        : rows<X, W, kAdd, Scope::kCluster, 8, 1024, true>();
      }
    }
    if (plan.scope == Scope::kBlock) {
      if (plan.vectors == 2) return rows<X, W, kAdd, Scope::kBlock, 2, 256, true>();
      if (plan.vectors == 4) return rows<X, W, kAdd, Scope::kBlock, 4, 256, true>();
      if (plan.most_threads == 192) return rows<X, W, kAdd, Scope::kBlock, 8, 192, true>();
      if (plan.most_threads == 256) return rows<X, W, kAdd, Scope::kBlock, 8, 256, true>();
      if constexpr (kAdd) {  // two rows in the registers that the next kernel has would come in batches
        if (plan.block_threads <= 512) return rows<X, W, kAdd, Scope::kBlock, 8, 512, true>();
      }
      return rows<X, W, kAdd, Scope::kBlock, 8, 1024, true>();
    }
    return {&rms_norm_stream<X, W, kAdd, Scope::kStream, 512, true>, 512};
  }
  if constexpr (device::kHasClusters) {
    if (plan.scope == Scope::kCluster) return {&rms_norm_stream<X, W, kAdd, Scope::kCluster, 1024, false>, 1024};
  }
  return plan.most_threads <= 512 ? Kernel{&rms_norm_stream<X, W, kAdd, Scope::kStream, 512, false>, 512}
                                  : Kernel{&rms_norm_stream<X, W, kAdd, Scope::kStream, 1024, false>, 1024};
}

Kernel choose_kernel(DType x, DType weight, bool add, bool aligned, const LaunchPlan& plan) {
  return with_dtypes(x, weight, [&](auto x, auto w) {
    return with_bool(add, [&](auto add) {
      return with_bool(aligned, [&](auto aligned) {
        using X = typename decltype(x)::type;
        using W = typename decltype(w)::type;
        return choose_kernel<X, W, decltype(add)::value, decltype(aligned)::value>(plan);
      });
    });
  });
}

device::Error launch_rows(RowParams p, LaunchPlan plan, const DeviceFacts& facts, device::Stream stream) {
  const bool add = p.data[kResidual] != nullptr, aligned = is_aligned(p, plan);
  int64_t row_bytes = 0;
  for (int o = 0; o < kOperands; ++o) row_bytes += p.data[o] ? p.hidden * size_of(p.dtypes[o]) : 0;
  // Rows that are picked element by element keep their plan: they are streamed, for which spreading was never measured.
  if (aligned) plan = spread(plan, p.rows, row_bytes, facts);
  const Kernel kernel = choose_kernel(p.dtypes[kX], p.dtypes[kWeight], add, aligned, plan);
  const int64_t most = max_blocks(plan, facts);
  device::Error error = device::kSuccess;
  for (p.first_row = 0; p.first_row < p.rows && error == device::kSuccess; p.first_row += most * plan.rows_per_block()) {
    const int64_t all = (p.rows - p.first_row + plan.rows_per_block() - 1) / plan.rows_per_block(),
                  blocks = all < most ? all : most;
    const bool room = 2 * blocks * plan.cluster * plan.block_threads <= int64_t{facts.processors} * kernel.resident_threads;
    const Layout layout{plan.slots, __builtin_ctz(plan.group_threads), plan.vectors, plan.whole_vectors, room};
    error = device::launch(kernel.function, blocks, plan, stream, facts, p, layout);
  }
  return error;
}

Status run(const Call& call, device::Stream stream, Message* message) {
  RowParams params;
  RowSlices slices;
  if (const Status status = check(call, &params, &slices, message); status != Status::kOk) return status;
  if (slices.count == 0) return Status::kOk;
  DeviceFacts facts;
  device::Error error =
      device::facts(&facts, reinterpret_cast<const void*>(&rms_norm_rows<float, float, false, Scope::kBlock, 4, 256, true>));
  if (error == device::kSuccess) {
    const LaunchPlan plan = make_plan(params.hidden, params.dtypes[kX], facts);
    for (int64_t i = 0; i < slices.count && error == device::kSuccess; ++i)
      error = launch_rows(slices.count == 1 ? params : select_slice(params, slices, i), plan, facts, stream);
  }
  if (error == device::kSuccess) return Status::kOk;
  std::snprintf(message->text, sizeof message->text, "%s: launch failed: %s", call.op->name, device::error_text(error));
  return Status::kDeviceError;
}

}  // namespace
}  // namespace gemma_norm::kernels
