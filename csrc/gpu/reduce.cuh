// The sum over the threads of a row, as one balanced binary tree over their indices: the same bits at every wave width.
#pragma once

#include "../device/platform.h"
#include "tuning.h"

namespace gemma_norm::gpu {

constexpr int kMaxWaves = kMaxBlockThreads / 32;
static_assert(kMaxWaves <= 32 && kMaxCluster == 8 && sizeof(Inbox::number) == 8 * sizeof(float), "as many terms are added below");

// Every thread of the block, of at most kThreads, gets the sum.
template <int kThreads>
GEMMA_NORM_DEVICE float sum_over_block(float v) {
  GEMMA_NORM_SHARED Words partials[kMaxWaves / 4];
  const int width = device::wave_width(), waves = device::block_threads() / width;
  const int lane = device::thread_index() % width, wave = device::thread_index() / width;
  v = device::sum_over_lanes(v, width);
  if (waves == 1) return v;
  if (lane == 0) reinterpret_cast<float*>(partials)[wave] = v;
  device::block_barrier();
  if constexpr (kThreads > 512) {
    const int i = lane % kMaxWaves;
    return device::sum_over_lanes(i < waves ? reinterpret_cast<const float*>(partials)[i] : 0.0f, kMaxWaves);
  }
  // A few broadcast reads are quicker than exchanges between lanes. Two waves there are.
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < (kThreads / width + 3) / 4; ++i) {
    if (i >= 2 && waves <= 8) break;
    const Words four = partials[i];
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) f[j] = 4 * i + j < 2 || 4 * i + j < waves ? device::as_float(four.word[j]) : 0.0f;
    sum[i] = (f[0] + f[1]) + (f[2] + f[3]);
  }
  if (kThreads <= 4 * width) return sum[0];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

GEMMA_NORM_DEVICE Inbox* cluster_inbox() {
  GEMMA_NORM_SHARED Inbox inbox;
  return &inbox;
}

// Every thread of the cluster gets the sum of its blocks' sums. The block's inbox has been opened.
GEMMA_NORM_DEVICE float sum_over_cluster(float v) {
  Inbox* const inbox = cluster_inbox();
  const int blocks = device::cluster_blocks(), thread = device::thread_index();
  device::wait_for_inboxes();
  if (thread < blocks) device::send(inbox, thread, v);
  device::wait_for_numbers(inbox);
  float sum[kMaxCluster];
#pragma unroll
  for (int i = 0; i < kMaxCluster; ++i) sum[i] = i < blocks ? inbox->number[i] : 0.0f;
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

}  // namespace gemma_norm::gpu
