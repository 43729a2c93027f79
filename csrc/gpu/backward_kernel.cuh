// The kernels that compute dx; ops/rms_norm_backward.h has the formulas.
//
// Block number c of a launch has the rows c, c + chunks, c + 2 chunks, ..., so blocks that run at the same time work on
// rows that are neighbours in memory. Each thread keeps the sum of dout * n over its rows in registers;
// backward_sums.cuh makes dweight of them.
//
// A row needs one exchange between its threads, of two sums: of x^2, and of g * x. mean(g * n) is the latter times
// rstd / hidden.
#pragma once

#include "backward_rows.cuh"
#include "backward_sums.cuh"
#include "backward_terms.cuh"
#include "reduce.cuh"

namespace gemma_norm::gpu {

// The sums that a row needs: of x^2, and of g * x.
template <int kCount>
GEMMA_NORM_DEVICE void add_products(const float (&x)[kCount], const float (&dout)[kCount], const float (&w)[kCount],
                                    float* sums) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[0] = device::fma(x[i], x[i], sums[0]);
    sums[1] = device::fma(dout[i] * w[i], x[i], sums[1]);
  }
}

// What all elements of a row need: rstd, and mean(g * n).
struct RowStatistics {
  float rstd, mean;

  RowStatistics() = default;
  GEMMA_NORM_DEVICE RowStatistics(const RowParams& p, const float* sums, bool has_row) {
    rstd = has_row ? reciprocal_std<true>(sums[0], p) : 0.0f;
    mean = sums[1] * p.inv_hidden * rstd;
  }
  // The sum of g * x can be beyond float32 though that of g * n is not. It is then computed anew, from n.
  GEMMA_NORM_DEVICE bool overflowed() const { return !(mean - mean == 0.0f); }
  template <int kCount>
  GEMMA_NORM_DEVICE void add_products(const float (&x)[kCount], const float (&dout)[kCount], const float (&w)[kCount],
                                      float* sum) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) *sum = device::fma(dout[i] * w[i], x[i] * rstd, *sum);
  }
  GEMMA_NORM_DEVICE void replace_mean(const RowParams& p, float sum) {
    if (overflowed()) mean = sum * p.inv_hidden;
  }

  GEMMA_NORM_DEVICE float ds(float n, float g) const { return rstd * device::fma(-n, mean, g); }
};

// Computes dx of rows that are held in registers, and partial sums of dweight. kWave: each row has a power of two of
// lanes of one wave, and a block works on several groups of rows at a time. kBlock: a row has all threads of the block.
// Each group works on kRows rows at a time, and loads or prefetches the next ones meanwhile.
template <class Terms, Scope kScope, int kVectors, int kRows, int kThreads, int kResident, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kAligned ? kResident / kThreads : 1))
backpropagate_rows(RowParams p, Launch launch, Partials partials) {
  using X = typename Terms::X;
  constexpr int kCount = Terms::kCount, kUses = 2;
  using Loaded = typename Terms::Loaded[kVectors];
  // The next rows are loaded into registers if these, what is held of the present rows and the sums take at most half
  // of a thread's. Otherwise registers would be spilled, and the next rows are only brought closer (T112).
  constexpr int kHeldBytes =
      kRows * (2 * sizeof(Loaded) + kVectors * sizeof(typename Terms::Held)) + kVectors * kCount * sizeof(float);
  constexpr bool kAhead = !kAligned || !device::kPrefetches || 2 * kHeldBytes <= kRegisterBytes / kResident;
  const int thread = device::thread_index(), threads = launch.block_threads;
  const int group = kScope == Scope::kWave ? thread >> launch.log2_slots : 0;
  const int groups = kScope == Scope::kWave ? threads >> launch.log2_slots : 1;
  const int slot = kScope == Scope::kWave ? thread & ((1 << launch.log2_slots) - 1) : thread;
  const int step = item_step(launch);
  const int hidden = static_cast<int>(p.hidden), end_of_slot = slot < launch.slots ? hidden : 0;
  const auto first = [&](int k) { return first_item<kAligned, X, int>(launch, slot, k); };
  const int rows = static_cast<int>(p.rows), chunk = static_cast<int>(device::block_index());
  const int stride = static_cast<int>(partials.chunks) * groups;
  const auto end_of = [&](const ShortRowSteps& at) { return at.row < rows ? end_of_slot : 0; };

  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  Loaded next[kAhead ? kRows : 1];
  const ShortRowSteps row_step(p, stride);
  ShortRowSteps row(p, chunk + static_cast<int>(partials.chunks) * group);  // the first of those that come next
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
    const auto each_vector = [&](int r, const auto& visit) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        float s[kCount], u[kCount], w[kCount];
        Terms::values(p, now[r][k], held[r][k], s, u);
        factors.load(k, w);
        visit(k, s, u, w);
      }
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        Terms::template hold<kAligned>(p, at[r], first(k), step, end_of(at[r]), now[r][k], held[r][k]);

    float sums[2 * kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      each_vector(r, [&](int, auto& s, auto& u, auto& w) { add_products(s, u, w, &sums[2 * r]); });
    sum_over_row<kScope, kThreads, kUses>(sums, launch, use++);
    RowStatistics statistics[kRows];
    bool overflowed = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      statistics[r] = RowStatistics(p, &sums[2 * r], at[r].row < rows);
      overflowed = overflowed || statistics[r].overflowed();
    }
    if (device::any_lane(overflowed)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[2 * r] = sums[2 * r + 1] = 0.0f;
        each_vector(r, [&](int, auto& s, auto& u, auto& w) { statistics[r].add_products(s, u, w, &sums[2 * r]); });
      }
      sum_over_row<kScope, kThreads, kUses>(sums, launch, use++);
#pragma unroll
      for (int r = 0; r < kRows; ++r) statistics[r].replace_mean(p, sums[2 * r]);
    }

    wait_for_next();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      each_vector(r, [&](int k, auto& s, auto& u, auto& w) {
        float ds[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          s[i] *= statistics[r].rstd;
          dweight[k][i] = device::fma(u[i], s[i], dweight[k][i]);
          ds[i] = statistics[r].ds(s[i], u[i] * w[i]);
        }
        Terms::template store<kAligned>(p, at[r], first(k), step, end_of(at[r]), now[r][k], held[r][k], s, w, ds);
      });
  }

  struct Sums {
    float of_groups[kThreads * kVectors * kCount];
  };
  put_sums<kAligned>(p, partials, chunk, [&](const auto& put) {
    if constexpr (kScope == Scope::kWave) {
      // Adds up the groups of the block, in order.
      float* const all = device::shared_memory<Sums>().of_groups;
      const int lanes = 1 << launch.log2_slots, count = kVectors * lanes * kCount;
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int i = 0; i < kCount; ++i) all[group * count + (i * kVectors + k) * lanes + slot] = dweight[k][i];
      device::block_barrier();
      for (int column = thread; column < hidden; column += threads) {
        // Where in a group's sums the column is: its item i of vector k of its slot.
        const int vector = column / kCount;
        const int k = launch.whole_vectors ? vector / launch.slots : column / (launch.slots * kCount);
        const int i = launch.whole_vectors ? column % kCount : column % (launch.slots * kCount) / launch.slots;
        const int of = launch.whole_vectors ? vector % launch.slots : column % launch.slots;
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += all[g * count + (i * kVectors + k) * lanes + of];
        const float one[1] = {sum};
        put(column, 1, hidden, one);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; i += kItems<float>)
          put(first(k) + i * step, step, end_of_slot, reinterpret_cast<const float(&)[kItems<float>]>(dweight[k][i]));
      }
    }
  });
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
  for (LongRowSteps row(p, chunk, partials.chunks); row.has_row(); row.next()) {
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
        load_factors<X, kAligned>(p, weights, first, step, end, w);
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
    each_vector([&](int64_t first, auto& s, auto& u, auto& w, auto& loaded, auto& held) {
      float ds[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        s[i] *= statistics.rstd;
        ds[i] = statistics.ds(s[i], u[i] * w[i]);
      }
      Terms::template store<kAligned>(p, row, first, step, end, loaded, held, s, w, ds);
      if (partials.to == SumsTo::kNowhere) return;
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
