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
#pragma unroll
    for (int step = 1; step < kItems<X>; step *= 2)
#pragma unroll
      for (int i = 0; i < kItems<X>; i += 2 * step) sum[i] += sum[i + step];
    return sum[0];
  }
};

GEMMA_NORM_DEVICE float reciprocal_std(float square_sum, const RowParams& p) {
  return 1.0f / device::sqrt(device::fma(square_sum, p.inv_hidden, p.eps));
}

// Rows of up to kVectors * slots vectors, read once and held in registers. kScope is kWave (several rows a block, each by
// group_threads lanes of one wave) or kBlock (one row a block).
template <class X, class W, bool kAdd, Scope kScope, int kVectors, bool kAligned>
GEMMA_NORM_KERNEL(kScope == Scope::kWave ? kWaveBlockThreads : kMaxBlockThreads)
rms_norm_rows(RowParams p, Layout layout) {
  GEMMA_NORM_SHARED Partials partials;
  const int slot = kScope == Scope::kWave ? device::thread_index() % layout.group_threads : device::thread_index();
  const int group = kScope == Scope::kWave ? device::thread_index() / layout.group_threads : 0;
  const int rows_per_block = kScope == Scope::kWave ? device::block_threads() / layout.group_threads : 1;
  const int hidden = static_cast<int>(p.hidden), step = item_step(layout);
  const W* weight = static_cast<const W*>(p.weight);
  int turn = 0;
  device::wait_for_previous_kernel();
  device::allow_next_kernel();

  // All threads of a block go round together, so that every lane takes part in the exchanges.
  const int64_t stride = device::grid_blocks() * rows_per_block;
  for (int64_t block_row = device::block_index() * rows_per_block; block_row < p.rows; block_row += stride) {
    const bool active = block_row + group < p.rows && slot < layout.slots;
    const Row<X, kAdd> row(p, active ? block_row + group : 0);
    const int end = active ? hidden : 0;

    Words s[kVectors];
    Weights<X, W> w[kVectors];
    int first[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      first[k] = first_item<X, int>(layout, slot, k);
      s[k] = load_items<kAligned>(row.x, first[k], step, end, true);
    }
    if constexpr (kAdd) {
      Words r[kVectors];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) r[k] = load_items<kAligned>(row.residual, first[k], step, end, true);
      if (row.post) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          r[k] = add_rounded<X>(r[k], load_items<kAligned>(row.post, first[k], step, end, true));
      }
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        s[k] = add_rounded<X>(s[k], r[k]);
        store_items<kAligned>(row.residual_out, first[k], step, end, s[k]);
      }
    }
    // Weights are asked for before the sum is known, so that they arrive meanwhile; with many vectors registers are too dear.
    constexpr bool kEarlyWeights = kVectors <= 4;
    if constexpr (kEarlyWeights) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) w[k].template load<kAligned>(weight, first[k], step, end);
    }

    SquareSums<X> squares;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) squares.add(s[k]);
    const float sum = kScope == Scope::kWave ? device::sum_over_lanes(squares.total(), layout.group_threads)
                                             : sum_over_block(squares.total(), partials, turn);
    turn ^= 1;
    const float rstd = reciprocal_std(sum, p);

#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if constexpr (!kEarlyWeights) w[k].template load<kAligned>(weight, first[k], step, end);
      store_items<kAligned>(row.out, first[k], step, end, w[k].apply(s[k], rstd, p.weight_offset));
    }
  }
}

// Rows that no block can hold: read for the sum, then again, from the cache as far as it reaches, for the output.
template <class X, class W, bool kAdd, bool kAligned>
GEMMA_NORM_KERNEL(kMaxBlockThreads)
rms_norm_stream(RowParams p, Layout layout) {
  GEMMA_NORM_SHARED Partials partials;
  const int slot = device::thread_index(), step = item_step(layout);
  int turn = 0;
  device::wait_for_previous_kernel();
  device::allow_next_kernel();

  for (int64_t r = device::block_index(); r < p.rows; r += device::grid_blocks()) {
    const Row<X, kAdd> row(p, r);
    SquareSums<X> squares;
    for (int k = 0; k < layout.vectors; ++k) {
      const int64_t first = first_item<X, int64_t>(layout, slot, k);
      Words s = load_items<kAligned>(row.x, first, step, p.hidden, kAdd);
      if constexpr (kAdd) {
        Words r = load_items<kAligned>(row.residual, first, step, p.hidden, true);
        if (row.post) r = add_rounded<X>(r, load_items<kAligned>(row.post, first, step, p.hidden, true));
        s = add_rounded<X>(s, r);
        store_items<kAligned>(row.residual_out, first, step, p.hidden, s);
      }
      squares.add(s);
    }
    const float rstd = reciprocal_std(sum_over_block(squares.total(), partials, turn), p);
    turn ^= 1;
    const X* again = kAdd ? row.residual_out : row.x;  // each thread reads back what it wrote itself
    for (int k = 0; k < layout.vectors; ++k) {
      const int64_t first = first_item<X, int64_t>(layout, slot, k);
      Weights<X, W> w;
      w.template load<kAligned>(static_cast<const W*>(p.weight), first, step, p.hidden);
      const Words s = load_items<kAligned>(again, first, step, p.hidden, true);
      store_items<kAligned>(row.out, first, step, p.hidden, w.apply(s, rstd, p.weight_offset));
    }
  }
}

}  // namespace gemma_norm::kernels
