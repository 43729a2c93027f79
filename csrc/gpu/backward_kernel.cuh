// The kernels that compute dx; ops/rms_norm_backward.h has the formulas.
//
// Block number c of a launch has the rows c, c + chunks, c + 2 chunks, ..., so blocks that run at the same time work on
// rows that are neighbours in memory. Each thread keeps the sum of dout * n over its rows in registers;
// backward_sums.cuh makes dweight of them.
#pragma once

#include "backward_step.cuh"

namespace gemma_norm::gpu {

// Computes dx of rows that are held in registers, and partial sums of dweight. kWave: each row has a power of two of
// lanes of one wave, and a block works on several groups of rows at a time. kBlock: a row has all threads of the block.
// Each group works on kRows rows at a time, and loads or prefetches the next ones meanwhile.
template <class Terms, Scope kScope, int kVectors, int kRows, int kThreads, int kResident, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kAligned ? kResident / kThreads : 1))
backpropagate_rows(RowParams p, Launch launch, Partials partials) {
  using X = typename Terms::X;
  constexpr int kCount = Terms::kCount;
  using Loaded = typename Terms::Loaded[kVectors];
  // The next rows are loaded into registers if these, what is held of the present rows and the sums take at most half
  // of a thread's. Otherwise registers would be spilled, and the next rows are only brought closer (T112).
  constexpr int kHeldBytes =
      kRows * (2 * sizeof(Loaded) + kVectors * sizeof(typename Terms::Held)) + kVectors * kCount * sizeof(float);
  constexpr bool kAhead = !kAligned || !device::kPrefetches || 2 * kHeldBytes <= kRegisterBytes / kResident;
  const BlockPlace<kScope> place(launch);
  const int step = item_step(launch);
  const int end_of_slot = place.slot < launch.slots ? static_cast<int>(p.hidden) : 0;
  const auto first = [&](int k) { return first_item<kAligned, X, int>(launch, place.slot, k); };
  const int rows = static_cast<int>(p.rows), chunk = static_cast<int>(device::block_index());
  const int stride = static_cast<int>(partials.chunks) * place.groups;
  const auto end_of = [&](const ShortRowSteps& at) { return at.row < rows ? end_of_slot : 0; };

  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  Loaded next[kAhead ? kRows : 1];
  const ShortRowSteps row_step(p, stride);
  ShortRowSteps row(p, chunk + static_cast<int>(partials.chunks) * place.group);  // the first of those that come next
  const auto load = [&](Loaded(&to)[kRows]) {
    ShortRowSteps at = row;
#pragma unroll
    for (int r = 0; r < kRows; ++r, at.move(p, row_step))
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        Terms::template load<kAligned, Reuse::kNone>(p, at, first(k), step, end_of(at), to[r][k]);
  };
  if constexpr (kAhead) load(next);
  float dweight[kVectors][kCount] = {};
  const HeldFactors<X, kVectors, kThreads, kAligned, decltype(first)> factors(p, weights_of(p, chunk), first, step,
                                                                              end_of_slot);

  // Where a load waits for the stores before it, the next rows are waited for before this step's stores, which then
  // have a whole step to finish. Compilers would wait for them after these stores, and for the rows after the next as
  // well (T123). With four vectors a thread reads the weights anew in each step, so it waits for all loads anyway.
  const auto wait_for_next = [&] {
    if constexpr (kAhead && device::kLoadsBeforeStores && kVectors < 4) {
#pragma unroll
      for (Loaded& row : next)
#pragma unroll
        for (int k = 0; k < kVectors; ++k) Terms::wait_for(row[k]);
    }
  };
  wait_for_next();
  int use = 0;
  // All groups of a block take as many steps, since they exchange together. For a row that does not exist, they have
  // zeros.
  for (int base = chunk; base < rows; base += kRows * stride) {
    Loaded now[kRows];
    typename Terms::Held held[kRows][kVectors];
    ShortRowSteps at[kRows];
    if constexpr (!kAhead) load(now);
#pragma unroll
    for (int r = 0; r < kRows; ++r, row.move(p, row_step)) {
      at[r] = row;
      if constexpr (kAhead) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) now[r][k] = next[r][k];
      }
    }
    if constexpr (kAhead) {
      load(next);
    } else {
      ShortRowSteps ahead = row;
#pragma unroll
      for (int r = 0; r < kRows; ++r, ahead.move(p, row_step))
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
          if (first(k) < end_of(ahead)) Terms::prefetch(p, ahead, first(k));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        Terms::template hold<kAligned>(p, at[r], first(k), step, end_of(at[r]), now[r][k], held[r][k]);
    backpropagate_step<Terms, kScope, kThreads, kAligned>(p, launch, at, now, held, factors, first, step, end_of, use,
                                                          dweight, [&](const auto& statistics) {
                                                            wait_for_next();
                                                            // Aligned rows whose rstd is wanted have the kernel below;
                                                            // see has_few_rows().
                                                            if constexpr (!kAligned)
                                                              store_rstd(p, partials, place, at, statistics);
                                                          });
  }
  put_dweight<kScope, kThreads, kAligned>(p, launch, partials, chunk, place, first, dweight);
}

// The same for a block each of whose groups has one row: without a loop, and with nothing between the launch and the
// loads but what they need.
template <class Terms, Scope kScope, int kVectors, int kThreads>
GEMMA_NORM_KERNEL(kThreads, 1)
backpropagate_one_row(RowParams p, Launch launch, Partials partials) {
  using X = typename Terms::X;
  const BlockPlace<kScope> place(launch);
  const auto first = [&](int k) { return first_item<true, X, int>(launch, place.slot, k); };
  const int chunk = static_cast<int>(device::block_index());
  const ShortRowSteps at[1] = {{p, chunk + static_cast<int>(partials.chunks) * place.group}};
  const int end_of_slot = place.slot < launch.slots ? static_cast<int>(p.hidden) : 0;
  const int end = at[0].row < p.rows ? end_of_slot : 0;
  const char* const weights = weights_of(p, chunk);

  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  typename Terms::Loaded now[1][kVectors];
  typename Terms::Held held[1][kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) Terms::template load<true, Reuse::kNone>(p, at[0], first(k), 1, end, now[0][k]);
  Factors<X> weight[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) weight[k].template load<true>(p, weights, first(k), 1, end_of_slot);
#pragma unroll
  for (int k = 0; k < kVectors; ++k) Terms::template hold<true>(p, at[0], first(k), 1, end, now[0][k], held[0][k]);
  RegisterFactors<X, kVectors> factors;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) weight[k].unpack(p, factors.w[k]);
  int use = 0;
  float dweight[kVectors][Terms::kCount] = {};
  const auto end_of = [&](const ShortRowSteps&) { return end; };
  backpropagate_step<Terms, kScope, kThreads, true>(
      p, launch, at, now, held, factors, first, 1, end_of, use, dweight,
      [&](const auto& statistics) { store_rstd(p, partials, place, at, statistics); });
  put_dweight<kScope, kThreads, true>(p, launch, partials, chunk, place, first, dweight);
}

// The same for rows that are too large for the registers of a block, and for unaligned rows of more than a wave. Each
// row is read twice, the second time from the caches. The partial sums are in memory, where each thread has columns of
// its own.
template <class Terms, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, 1)
backpropagate_in_two_passes(RowParams p, Launch launch, Partials partials) {
  using X = typename Terms::X;
  constexpr int kCount = Terms::kCount;
  const int slot = device::thread_index(), step = item_step(launch);
  const int64_t end = slot < launch.slots ? p.hidden : 0, chunk = device::block_index();
  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  const char* const weights = weights_of(p, chunk);
  int use = 0;
  for (LongRowSteps row(p, device::block_index(), static_cast<uint32_t>(partials.chunks)); row.has_row(); row.next()) {
    const bool is_first = use == 0;
    const auto each_vector = [&](const auto& visit) {
      for (int k = 0; k < launch.vectors; ++k) {
        const int64_t first = first_item<kAligned, X, int64_t>(launch, slot, k);
        float s[kCount], u[kCount], w[kCount];
        typename Terms::Loaded loaded;
        typename Terms::Held held;
        Terms::template load<kAligned, Reuse::kSome>(p, row, first, step, end, loaded);
        Terms::template hold<kAligned>(p, row, first, step, end, loaded, held);
        Terms::values(p, loaded, held, s, u);
        Factors<X>().template read<kAligned>(p, weights, first, step, end, w);
        visit(first, s, u, w, loaded, held);
      }
    };
    float sums[2] = {};
    each_vector([&](int64_t, auto& s, auto& u, auto& w, auto&, auto&) { add_products(s, u, w, sums); });
    sum_over_row<Scope::kBlock, kThreads, 2>(sums, launch, use++);
    RowStatistics statistics(p, sums, true);
    if (device::any_lane(statistics.overflowed())) {
      sums[0] = sums[1] = 0.0f;
      each_vector([&](int64_t, auto& s, auto& u, auto& w, auto&, auto&) { statistics.add_products(s, u, w, sums); });
      sum_over_row<Scope::kBlock, kThreads, 2>(sums, launch, use++);
      statistics.replace_mean(p, sums[0]);
    }
    if (!kAligned && partials.to == SumsTo::kRows && slot == 0) partials.sums[row.index()] = statistics.rstd;
    each_vector([&](int64_t first, auto& s, auto& u, auto& w, auto& loaded, auto& held) {
      float ds[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        s[i] *= statistics.rstd;
        ds[i] = statistics.ds(s[i], u[i] * w[i]);
      }
      Terms::template store<kAligned>(p, row, first, step, end, loaded, held, s, w, ds);
      if (partials.to != SumsTo::kMemory) return;
      float* const to = partials.row(chunk);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t column = first + static_cast<int64_t>(i) * step;
        if (column < end) to[column] = is_first ? u[i] * s[i] : device::fma(u[i], s[i], to[column]);
      }
    });
  }
}

}  // namespace gemma_norm::gpu
