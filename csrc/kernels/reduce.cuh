// The sum over the threads of a row, as one balanced binary tree over their indices: the same bits at every wave width.
#pragma once

#include "../device/platform.h"

namespace gemma_norm::kernels {

constexpr int kMaxWaves = 32;

// Scratch of a block: two buffers in turn, so that a row needs one barrier only.
struct Partials {
  float sum[2][kMaxWaves];
};

// Every thread of the block gets the sum; `turn` alternates between 0 and 1 from one call to the next.
GEMMA_NORM_DEVICE float sum_over_block(float v, Partials& partials, int turn) {
  const int width = device::wave_width(), waves = device::block_threads() / width;
  const int lane = device::thread_index() % width, wave = device::thread_index() / width;
  v = device::sum_over_lanes(v, width);
  if (waves == 1) return v;
  float* sum = partials.sum[turn];
  if (lane == 0) sum[wave] = v;
  device::block_barrier();
  if (waves <= 8) {  // a few broadcast reads are quicker than exchanges between lanes
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = i < waves ? sum[i] : 0.0f;
    return ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
  }
  return device::sum_over_lanes(lane < waves ? sum[lane] : 0.0f, width);
}

}  // namespace gemma_norm::kernels
