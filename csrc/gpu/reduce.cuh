// Exchanges: every thread of a row contributes some numbers and gets the sum of each over all threads of the row. The
// sum is one balanced binary tree over the threads' indices, so its bits depend neither on the wave width nor on the
// number of blocks that share the threads.
//
// A kernel may exchange several numbers at once, and may do so several times. It then numbers its exchanges 0, 1, 2,
// ... (`use`, the same in all threads) and sets kUses to 2. There are then two copies of the shared memory, and
// exchange n uses copy n % 2. Two copies are enough: a thread writes for exchange n + 2 only after the barrier of
// exchange n + 1, and before that barrier all threads have read the results of exchange n. The same holds between the
// blocks of a cluster: a block sends its numbers of exchange n + 2 only after it has received those of exchange n + 1
// from all blocks, and each block sends those only after its own threads have met at a barrier, hence have read the
// results of exchange n.
#pragma once

#include "../device/platform.h"
#include "row.cuh"
#include "tuning.h"

namespace gemma_norm::gpu {

constexpr int kMaxWaves = kMaxBlockThreads / 32;
static_assert(kMaxWaves <= 32 && kMaxCluster == 8, "the functions below add exactly so many terms");

template <int kNumbers, int kUses>
struct BlockSums {
  Vector16 of_waves[kUses][kNumbers][kMaxWaves / 4];
};

// The numbers that a block receives from each block of its cluster.
template <int kNumbers, int kUses>
struct alignas(16) ClusterSums {
  float of_blocks[kUses][kNumbers][kMaxCluster];
  device::Inbox inbox;
};

// Sums over the threads of a block, of which there are at most kThreads.
template <int kThreads, int kUses, int kNumbers>
GEMMA_NORM_DEVICE void sum_over_block(float (&v)[kNumbers], const Launch& launch, int use) {
  const int width = device::wave_width(), waves = launch.block_threads / width;
  const int lane = device::thread_index() % width, wave = device::thread_index() / width;
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) v[n] = device::sum_over_lanes(v[n], width);
  if (waves == 1) return;
  auto& sums = device::shared_memory<BlockSums<kNumbers, kUses>>().of_waves[use % kUses];
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) reinterpret_cast<float*>(sums[n])[wave] = v[n];
  }
  device::block_barrier();
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    if constexpr (kThreads > 512) {
      const int i = lane % kMaxWaves;
      v[n] = device::sum_over_lanes(i < waves ? reinterpret_cast<const float*>(sums[n])[i] : 0.0f, kMaxWaves);
    } else {
      // Every thread reads the sums of all waves. This is a broadcast, which is faster than another exchange between
      // lanes. There are at least two waves here, so the first two sums need no check.
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < (kThreads / width + 3) / 4; ++i) {
        if (i >= 2 && waves <= 8) break;
        const Vector16 four = sums[n][i];
        float f[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) f[j] = 4 * i + j < 2 || 4 * i + j < waves ? device::as_float(four.word[j]) : 0.0f;
        sum[i] = (f[0] + f[1]) + (f[2] + f[3]);
      }
      v[n] = kThreads <= 4 * width ? sum[0] : (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }
}

// Gives every block of a cluster the numbers of all its blocks. Before, each block has its own in all its threads.
template <int kUses, int kNumbers>
GEMMA_NORM_DEVICE const float (&exchange_in_cluster(const float (&v)[kNumbers], int use))[kNumbers][kMaxCluster] {
  auto& sums = device::shared_memory<ClusterSums<kNumbers, kUses>>();
  auto& of_blocks = sums.of_blocks[use % kUses];
  const int blocks = device::cluster_blocks(), thread = device::thread_index();
  if (use == 0) device::wait_for_inboxes();
  if (thread < blocks) {
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) device::send(&of_blocks[n][device::cluster_rank()], &sums.inbox, thread, v[n]);
  }
  device::wait_for_numbers(&sums.inbox, use);
  if constexpr (kUses > 1) device::expect_numbers(&sums.inbox, kNumbers);
  return of_blocks;
}

template <int kUses, int kNumbers>
GEMMA_NORM_DEVICE void sum_over_cluster(float (&v)[kNumbers], int use) {
  const int blocks = device::cluster_blocks();
  const auto& of_blocks = exchange_in_cluster<kUses>(v, use);
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    float sum[kMaxCluster];
#pragma unroll
    for (int i = 0; i < kMaxCluster; ++i) sum[i] = i < blocks ? of_blocks[n][i] : 0.0f;
    v[n] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
}

// Every thread of a kernel that exchanges kNumbers numbers calls this before anything else.
template <Scope kScope, int kNumbers, int kUses = 1>
GEMMA_NORM_DEVICE void open_exchanges() {
  if constexpr (kScope == Scope::kCluster)
    device::open_inbox(&device::shared_memory<ClusterSums<kNumbers, kUses>>().inbox, kNumbers);
}

// Sums over the threads of a row.
template <Scope kScope, int kThreads, int kUses = 1, int kNumbers>
GEMMA_NORM_DEVICE void sum_over_row(float (&v)[kNumbers], const Launch& launch, int use = 0) {
  if constexpr (kScope == Scope::kWave) {
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) v[n] = device::sum_over_lanes(v[n], 1 << launch.log2_slots);
  } else {
    sum_over_block<kThreads, kUses>(v, launch, use);
    if constexpr (kScope == Scope::kCluster) sum_over_cluster<kUses>(v, use);
  }
}

}  // namespace gemma_norm::gpu
