// The kernels. Each is load -> statistics -> store:
//
//   s = x, or round(x + residual), which is stored;   rstd = 1 / sqrt(mean(s^2) + eps);   y = round(s * rstd * (weight + offset))
//
// The sum of squares has one order for all of them, a function of hidden and dtype alone: each of a slot's vectors adds to as many
// running sums as it has elements, these are added pairwise, then the slots as a binary tree.
#pragma once

#include "reduce.cuh"
#include "row.cuh"
#include "tuning.h"

namespace gemma_norm::gpu {

template <class X>
struct SquareSums {
  float sum[kItems<X>] = {};

  GEMMA_NORM_DEVICE void add(Words s) {
    float f[kItems<X>];
    unpack_items<X>(s, f);
#pragma unroll
    for (int i = 0; i < kItems<X>; ++i) sum[i] = device::fma(f[i], f[i], sum[i]);
  }
  GEMMA_NORM_DEVICE float total() {
    if constexpr (kItems<X> == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);  // neighbours last: CDNA computes them as pairs
  }
};

template <bool kQuick>
GEMMA_NORM_DEVICE float reciprocal_std(float square_sum, const RowParams& p) {
  return device::reciprocal_root<kQuick>(device::fma(square_sum, p.inv_hidden, p.eps));
}

template <class Op, class X, class W>
constexpr Held kHeld = Op::kTwoRows             ? Held::kTwoRows
                       : sizeof(W) != sizeof(X) ? Held::kRowWideWeights
                                                : Held::kRow;
template <class Op, class X, class W, int kRow>
constexpr int kResidentThreads = kKernels[kRow].resident_threads[static_cast<int>(kHeld<Op, X, W>)];

// Rows of up to kVectors * slots vectors, read once and held in registers. kScope is kWave (several rows a block, each by
// a power of two of lanes of one wave), kBlock (one row a block) or kCluster (one row a cluster of blocks). A block has kThreads
// threads at most.
template <class Op, class X, class W, Scope kScope, int kVectors, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kAligned ? kResidentThreads<Op, X, W, find_kernel(kScope, kVectors, kThreads)> / kThreads : 1))
normalize_rows(RowParams p, Launch launch) {
  if constexpr (kScope == Scope::kCluster && !device::kTargetHasClusters) return;  // such GPUs have no plan with clusters
  constexpr bool kAdd = Op::kTwoRows;
  int slot = device::thread_index();
  int64_t r = p.first_row + device::block_index();
  if constexpr (kScope == Scope::kWave) {
    const int log2 = launch.log2_group_threads;
    r = p.first_row + device::block_index() * (device::block_threads() >> log2) + (slot >> log2);
    slot &= (1 << log2) - 1;
  }
  if constexpr (kScope == Scope::kCluster) {
    device::open_inbox(cluster_inbox());
    slot += device::cluster_rank() * device::block_threads();
    r = p.first_row + device::cluster_index();
  }
  // Threads without a part of a row still take part in the exchanges.
  const bool active = (kScope != Scope::kWave || r < p.rows) && slot < launch.slots;
  const int step = item_step(launch);
  const int start = kAligned ? first_item<kAligned, X, int>(launch, slot, 0) : 0;  // all that follows is relative to it
  const auto first = [&](int k) { return first_item<kAligned, X, int>(launch, kAligned ? 0 : slot, k); };
  const int end = active ? static_cast<int>(p.hidden) - start : 0;
  const Row<X, kAdd> row(p, kScope != Scope::kWave || active ? r : 0, start);  // a block's row is uniform
  const W* weight = static_cast<const W*>(p.data[kWeight]) + start;
  using Order = LoadOrder<kVectors, kThreads, kHeld<Op, X, W>, sizeof(W) != sizeof(X), kAligned>;
  Words s[kVectors], residual[kVectors];
  Weights<X, W> w[kVectors];
  const auto load_weights = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) w[k].template load<kAligned>(weight, first(k), step, end);
  };
  const auto load = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned>(row.x, first(k), step, end, true);
    if constexpr (kAdd && Order::kWholeRows) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) residual[k] = load_items<kAligned>(row.residual, first(k), step, end, true);
    }
    if constexpr (Order::kEarlyWeights && !Order::kWeightsAfterRows) load_weights(end);
  };
  // What needs no memory is done by now.
  device::wait_for_previous_kernel(row.x, row.out, weight);
  // The next kernel may come up to its own wait. Where it would fill but a part of the GPU, its blocks would lie unevenly later:
  // it is allowed after the sum then.
  if (launch.room_for_next) device::allow_next_kernel();
  if (kAligned && device::in_all_lanes(first(kVectors - 1) < end)) {
    load(NoEnd{});  // no conditions: the loads go out back to back
  } else {
    load(end);
  }
  if constexpr (kAdd) {
    if constexpr (Order::kWholeRows) {
      if (p.data[kPost]) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          residual[k] = add_rounded<X>(residual[k], load_items<kAligned>(row.post, first(k), step, end, true));
      }
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (Order::kStoreOneByOne && !(first(k) < end)) break;
      if constexpr (!Order::kWholeRows) {
        constexpr int kBatch = kVectors / 4;
        if (k % kBatch == 0)
          for (int i = k; i < k + kBatch; ++i) {
            residual[i] = load_items<kAligned>(row.residual, first(i), step, end, true);
            if (p.data[kPost]) residual[i] = add_rounded<X>(residual[i], load_items<kAligned>(row.post, first(i), step, end, true));
          }
      }
      s[k] = add_rounded<X>(s[k], residual[k]);
      store_items<kAligned>(row.residual_out, first(k), step, end, s[k]);
    }
  }

  if constexpr (Order::kEarlyWeights && Order::kWeightsAfterRows) load_weights(end);

  SquareSums<X> squares;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) squares.add(s[k]);
  float sum = squares.total();
  if constexpr (kScope == Scope::kWave) {
    sum = device::sum_over_lanes(sum, 1 << launch.log2_group_threads);
  } else {
    sum = sum_over_block<kThreads>(sum);
    if constexpr (kScope == Scope::kCluster) sum = sum_over_cluster(sum);
  }
  device::allow_next_kernel();
  const float rstd = reciprocal_std<Order::kQuickRoot>(sum, p);

#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (Order::kStoreOneByOne && !(first(k) < end)) break;
    if constexpr (!Order::kEarlyWeights) {
      constexpr int kBatch = 4 / Weights<X, W>::kVectors;  // a load cannot move up before a store
      if (k % kBatch == 0)
        for (int i = k; i < k + kBatch; ++i) w[i].template load<kAligned>(weight, first(i), step, end);
    }
    store_items<kAligned>(row.out, first(k), step, end, w[k].apply(s[k], rstd, p.weight_offset));
  }
}

// Rows that no block can hold, or whose elements must be picked one by one: read for the sum, then again, from the cache as far
// as it reaches, for the output. By a block, or (kScope is kCluster) by a cluster of them.
template <class Op, class X, class W, Scope kScope, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, 1)
normalize_stream(RowParams p, Launch launch) {
  if constexpr (kScope == Scope::kCluster && !device::kTargetHasClusters) return;
  constexpr bool kAdd = Op::kTwoRows;
  int slot = device::thread_index();
  int64_t r = p.first_row + device::block_index();
  if constexpr (kScope == Scope::kCluster) {
    device::open_inbox(cluster_inbox());
    slot += device::cluster_rank() * device::block_threads();
    r = p.first_row + device::cluster_index();
  }
  const int step = item_step(launch);
  const int64_t end = slot < launch.slots ? p.hidden : 0;
  const Row<X, kAdd> row(p, r, 0);
  device::wait_for_previous_kernel(row.x, row.out, p.data[kWeight]);

  SquareSums<X> squares;
  for (int k = 0; k < launch.vectors; ++k) {
    const int64_t first = first_item<kAligned, X, int64_t>(launch, slot, k);
    Words s = load_items<kAligned>(row.x, first, step, end, kAdd);
    if constexpr (kAdd) {
      Words residual = load_items<kAligned>(row.residual, first, step, end, true);
      if (p.data[kPost]) residual = add_rounded<X>(residual, load_items<kAligned>(row.post, first, step, end, true));
      s = add_rounded<X>(s, residual);
      store_items<kAligned>(row.residual_out, first, step, end, s);
    }
    squares.add(s);
  }
  float sum = sum_over_block<kThreads>(squares.total());
  if constexpr (kScope == Scope::kCluster) sum = sum_over_cluster(sum);
  device::allow_next_kernel();
  const float rstd = reciprocal_std<false>(sum, p);

  const X* again = kAdd ? row.residual_out : row.x;  // each thread reads back what it wrote itself
  for (int k = 0; k < launch.vectors; ++k) {
    const int64_t first = first_item<kAligned, X, int64_t>(launch, slot, k);
    Weights<X, W> w;
    w.template load<kAligned>(static_cast<const W*>(p.data[kWeight]), first, step, end);
    const Words s = load_items<kAligned>(again, first, step, end, true);
    store_items<kAligned>(row.out, first, step, end, w.apply(s, rstd, p.weight_offset));
  }
}

}  // namespace gemma_norm::gpu
