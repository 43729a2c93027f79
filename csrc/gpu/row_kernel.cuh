// The kernels. Each is load -> statistics -> store:
//
//   s = x, or round(x + residual), which is stored;   rstd = 1 / sqrt(mean(s^2) + eps);   y = round(s * rstd * (weight + offset))
//
// The sum of squares has one order for all of them, a function of hidden and dtype alone: each of a slot's vectors adds to as many
// running sums as it has elements, these are added pairwise, then the slots as a binary tree.
#pragma once

#include "reduce.cuh"
#include "row.cuh"

namespace gemma_norm::kernels {

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

// Threads of rms_norm_rows that a multiprocessor should hold: as many registers as NVIDIA's have, 65536, are shared out among them.
// The row's data in flight is 48 to 128 KB then (docs/performance.md).
constexpr int resident_threads(int vectors, int threads, bool add, bool wide_weights, bool aligned) {
  if (!aligned) return threads;
  const bool lean = !add && !wide_weights;
  if (vectors == 2) return lean ? 1536 : 1024;
  if (vectors == 4) return add ? 512 : 1024;
  if (threads == 192) return lean ? 768 : add ? 384 : 576;
  if (threads == 256) return lean ? 768 : 512;
  return threads <= 512 ? 512 : 1024;
}
template <class X, class W, bool kAdd, int kVectors, int kThreads, bool kAligned>
constexpr int kResidentThreads = resident_threads(kVectors, kThreads, kAdd, sizeof(W) != sizeof(X), kAligned);

// Rows of up to kVectors * slots vectors, read once and held in registers. kScope is kWave (several rows a block, each by
// a power of two of lanes of one wave), kBlock (one row a block) or kCluster (one row a cluster of blocks). A block has kThreads
// threads at most.
template <class X, class W, bool kAdd, Scope kScope, int kVectors, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kResidentThreads<X, W, kAdd, kVectors, kThreads, kAligned> / kThreads))
rms_norm_rows(RowParams p, Layout layout) {
  int slot = device::thread_index();
  int64_t r = p.first_row + device::block_index();
  if constexpr (kScope == Scope::kWave) {
    const int log2 = layout.log2_group_threads;
    r = p.first_row + device::block_index() * (device::block_threads() >> log2) + (slot >> log2);
    slot &= (1 << log2) - 1;
  }
  if constexpr (kScope == Scope::kCluster) {
    device::open_inbox(cluster_inbox());
    slot += device::cluster_rank() * device::block_threads();
    r = p.first_row + device::cluster_index();
  }
  // Threads without a part of a row still take part in the exchanges.
  const bool active = (kScope != Scope::kWave || r < p.rows) && slot < layout.slots;
  const int step = item_step(layout);
  const int start = kAligned ? first_item<kAligned, X, int>(layout, slot, 0) : 0;  // all that follows is relative to it
  const auto first = [&](int k) { return first_item<kAligned, X, int>(layout, kAligned ? 0 : slot, k); };
  const int end = active ? static_cast<int>(p.hidden) - start : 0;
  const Row<X, kAdd> row(p, kScope != Scope::kWave || active ? r : 0, start);  // a block's row is uniform
  const W* weight = static_cast<const W*>(p.data[kWeight]) + start;
  // What there are registers for is asked for at once, also the weights, which then arrive while the sum is worked out.
  constexpr bool kWholeResidual = kThreads < 1024,
                 kEarlyWeights = kVectors == 2 || (kThreads < 1024 && Weights<X, W>::kVectors == 1);
  constexpr bool kWeightsAfterResidual = kAdd && kVectors == 8;
  // A block of 1024 threads has registers for s in 16 bits, not for s in 32 bits too: it is unpacked twice.
  constexpr bool kKeepPacked = kThreads == 1024 && sizeof(X) == 2;
  // The sums are worked out and the weights awaited before any sum is stored.
  constexpr bool kSumsBeforeStores = kAdd && kWholeResidual && device::kLoadsBeforeStores;
  // With a branch around each store, a vector is stored before the next is computed; else compilers compute all of them first.
  constexpr bool kStoreOneByOne = kAligned && kVectors > 2 && kEarlyWeights;
  Words s[kVectors], residual[kVectors];
  Weights<X, W> w[kVectors];
  const auto load_weights = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) w[k].template load<kAligned>(weight, first(k), step, end);
  };
  const auto load = [&](auto end) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) s[k] = load_items<kAligned>(row.x, first(k), step, end, true);
    if constexpr (kAdd && kWholeResidual) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) residual[k] = load_items<kAligned>(row.residual, first(k), step, end, true);
    }
    if constexpr (kEarlyWeights && !kWeightsAfterResidual) load_weights(end);
  };
  // What needs no memory is done by now.
  device::wait_for_previous_kernel(row.x, row.out, weight);
  // The next kernel may come up to its own wait. Where it would fill but a part of the GPU, its blocks would lie unevenly later:
  // it is allowed after the sum then.
  if (layout.room_for_next) device::allow_next_kernel();
  if (kAligned && device::in_all_lanes(first(kVectors - 1) < end)) {
    load(NoEnd{});  // no conditions: the loads go out back to back
  } else {
    load(end);
  }
  if constexpr (kAdd) {
    if constexpr (kWholeResidual) {
      if (p.data[kPost]) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          residual[k] = add_rounded<X>(residual[k], load_items<kAligned>(row.post, first(k), step, end, true));
      }
    }
    if constexpr (kSumsBeforeStores) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) s[k] = add_rounded<X>(s[k], residual[k]);
      if constexpr (kEarlyWeights) {
        if constexpr (kWeightsAfterResidual) load_weights(end);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) w[k].wait_for_load();
      }
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (kStoreOneByOne && !(first(k) < end)) break;
      if constexpr (!kWholeResidual) {
        constexpr int kBatch = kVectors / 4;
        if (k % kBatch == 0) {
          for (int i = k; i < k + kBatch; ++i) {
            residual[i] = load_items<kAligned>(row.residual, first(i), step, end, true);
            if (p.data[kPost]) residual[i] = add_rounded<X>(residual[i], load_items<kAligned>(row.post, first(i), step, end, true));
          }
          for (int i = k; i < k + kBatch; ++i) {
            device::wait_for_load(residual[i]);
            if constexpr (kKeepPacked) device::keep_packed(&residual[i]);
          }
        }
      }
      if constexpr (!kSumsBeforeStores) s[k] = add_rounded<X>(s[k], residual[k]);
      if constexpr (kKeepPacked) device::keep_packed(&s[k]);
      store_items<kAligned>(row.residual_out, first(k), step, end, s[k]);
    }
  }

  if constexpr (kEarlyWeights && kWeightsAfterResidual && !kSumsBeforeStores) load_weights(end);

  SquareSums<X> squares;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    squares.add(s[k]);
    if constexpr (kKeepPacked) device::keep_packed(&s[k]);
  }
  float sum = squares.total();
  if constexpr (kScope == Scope::kWave) {
    sum = device::sum_over_lanes(sum, 1 << layout.log2_group_threads);
  } else {
    sum = sum_over_block<kThreads>(sum);
    if constexpr (kScope == Scope::kCluster) sum = sum_over_cluster(sum);
  }
  device::allow_next_kernel();
  const float rstd = reciprocal_std<(kVectors <= 4)>(sum, p);

#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (kStoreOneByOne && !(first(k) < end)) break;
    if constexpr (!kEarlyWeights) {
      constexpr int kBatch = 4 / Weights<X, W>::kVectors;  // a load cannot move up before a store
      if (k % kBatch == 0)
        for (int i = k; i < k + kBatch; ++i) w[i].template load<kAligned>(weight, first(i), step, end);
    }
    store_items<kAligned>(row.out, first(k), step, end, w[k].apply(s[k], rstd, p.weight_offset));
  }
}

// Rows that no block can hold, or whose elements must be picked one by one: read for the sum, then again, from the cache as far
// as it reaches, for the output. By a block, or (kScope is kCluster) by a cluster of them.
template <class X, class W, bool kAdd, Scope kScope, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, 1)
rms_norm_stream(RowParams p, Layout layout) {
  int slot = device::thread_index();
  int64_t r = p.first_row + device::block_index();
  if constexpr (kScope == Scope::kCluster) {
    device::open_inbox(cluster_inbox());
    slot += device::cluster_rank() * device::block_threads();
    r = p.first_row + device::cluster_index();
  }
  const int step = item_step(layout);
  const int64_t end = slot < layout.slots ? p.hidden : 0;
  const Row<X, kAdd> row(p, r, 0);
  device::wait_for_previous_kernel(row.x, row.out, p.data[kWeight]);

  SquareSums<X> squares;
  for (int k = 0; k < layout.vectors; ++k) {
    const int64_t first = first_item<kAligned, X, int64_t>(layout, slot, k);
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
  for (int k = 0; k < layout.vectors; ++k) {
    const int64_t first = first_item<kAligned, X, int64_t>(layout, slot, k);
    Weights<X, W> w;
    w.template load<kAligned>(static_cast<const W*>(p.data[kWeight]), first, step, end);
    const Words s = load_items<kAligned>(again, first, step, end, true);
    store_items<kAligned>(row.out, first, step, end, w.apply(s, rstd, p.weight_offset));
  }
}

}  // namespace gemma_norm::kernels
