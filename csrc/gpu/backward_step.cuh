// What the kernels of the backward pass do with the rows that they have loaded; ops/rms_norm_backward.h has the
// formulas.
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

// Where a thread is in its block: it has slot `slot` of the rows of group `group`.
template <Scope kScope>
struct BlockPlace {
  int slot, group = 0, groups = 1;

  GEMMA_NORM_DEVICE explicit BlockPlace(const Launch& launch) : slot(device::thread_index()) {
    if constexpr (kScope == Scope::kWave) {
      group = slot >> launch.log2_slots;
      groups = launch.block_threads >> launch.log2_slots;
      slot &= (1 << launch.log2_slots) - 1;
    }
  }
};

// The rows of a step, kRows of each group: from what was loaded of them, computes dx and adds to dweight. All threads
// of a block call this together, since they exchange; `use` counts the exchanges. before_stores() gets the
// statistics.
template <class Terms, Scope kScope, int kThreads, bool kAligned, int kRows, int kVectors, class Factors, class First,
          class EndOf, class BeforeStores>
GEMMA_NORM_DEVICE void backpropagate_step(const RowParams& p, const Launch& launch, const ShortRowSteps (&at)[kRows],
                                          const typename Terms::Loaded (&now)[kRows][kVectors],
                                          typename Terms::Held (&held)[kRows][kVectors], const Factors& factors,
                                          const First& first, int step, const EndOf& end_of, int& use,
                                          float (&dweight)[kVectors][Terms::kCount],
                                          const BeforeStores& before_stores) {
  constexpr int kCount = Terms::kCount, kUses = 2;
  const auto each_vector = [&](int r, const auto& visit) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float s[kCount], u[kCount], w[kCount];
      Terms::values(p, now[r][k], held[r][k], s, u);
      factors.load(k, w);
      visit(k, s, u, w);
    }
  };
  float sums[2 * kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    each_vector(r, [&](int, auto& s, auto& u, auto& w) { add_products(s, u, w, &sums[2 * r]); });
  sum_over_row<kScope, kThreads, kUses>(sums, launch, use++);
  RowStatistics statistics[kRows];
  bool overflowed = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    statistics[r] = RowStatistics(p, &sums[2 * r], at[r].row < p.rows);
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

  before_stores(statistics);
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

// Leaves the rstd of each row for sum_rows().
template <Scope kScope, int kRows>
GEMMA_NORM_DEVICE void store_rstd(const RowParams& p, const Partials& partials, const BlockPlace<kScope>& place,
                                  const ShortRowSteps (&at)[kRows], const RowStatistics (&statistics)[kRows]) {
  if (partials.to != SumsTo::kRows || place.slot != 0) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (at[r].row < p.rows) partials.sums[at[r].row] = statistics[r].rstd;
}

// Hands over a block's sums of dweight, first adding up those of its groups, in order.
template <Scope kScope, int kThreads, bool kAligned, int kVectors, int kCount, class First>
GEMMA_NORM_DEVICE void put_dweight(const RowParams& p, const Launch& launch, const Partials& partials, int chunk,
                                   const BlockPlace<kScope>& place, const First& first,
                                   const float (&dweight)[kVectors][kCount]) {
  struct Sums {
    float of_groups[kThreads * kVectors * kCount];
  };
  const int hidden = static_cast<int>(p.hidden);
  put_sums<kAligned>(p, partials, chunk, [&](const auto& put) {
    if constexpr (kScope == Scope::kWave) {
      float* const all = device::shared_memory<Sums>().of_groups;
      const int lanes = 1 << launch.log2_slots, count = kVectors * lanes * kCount;
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          all[place.group * count + (i * kVectors + k) * lanes + place.slot] = dweight[k][i];
      device::block_barrier();
      for (int column = device::thread_index(); column < hidden; column += launch.block_threads) {
        // Where in a group's sums the column is: its item i of vector k of its slot.
        const bool whole = kAligned || launch.whole_vectors;
        const int vector = column / kCount, k = kVectors == 1 ? 0 : vector / launch.slots;
        const int i = whole ? column % kCount : (column - k * launch.slots * kCount) / launch.slots;
        const int of = whole ? vector - k * launch.slots : column % launch.slots;
        float sum = 0.0f;
        for (int g = 0; g < place.groups; ++g) sum += all[g * count + (i * kVectors + k) * lanes + of];
        const float one[1] = {sum};
        put(column, 1, hidden, one);
      }
    } else {
      const int step = kAligned ? 1 : item_step(launch), end = place.slot < launch.slots ? hidden : 0;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kCount; i += kItems<float>)
          put(first(k) + i * step, step, end, reinterpret_cast<const float(&)[kItems<float>]>(dweight[k][i]));
      }
    }
  });
}

}  // namespace gemma_norm::gpu
