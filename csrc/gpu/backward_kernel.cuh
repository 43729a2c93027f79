// The kernels of the backward pass; ops/rms_norm_backward.h has the formulas.
//
// The first kernel computes dx. Its block number c has the rows c, c + chunks, c + 2 chunks, ..., so blocks that run at
// the same time work on rows that are neighbours in memory. Each thread keeps the sum of dout * n over its rows in
// registers, and writes it to row c of `partials` at the end. The second kernel adds up the rows of `partials`. Both
// add in a fixed order and without atomic operations, so dweight has the same bits each time.
//
// A row needs one exchange between its threads, of two sums: of x^2, and of g * x. mean(g * n) is the latter times
// rstd / hidden.
#pragma once

#include "backward_tuning.h"
#include "policies.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace gemma_norm::gpu {

// The partial sums of dweight: a row of `columns` floats for each chunk.
struct Partials {
  float* sums;  // null: no dweight is wanted
  int64_t columns;
  int64_t first_chunk;  // of this launch, in `sums`
  int64_t chunks;       // of this launch: the number of its blocks

  GEMMA_NORM_DEVICE float* row(int64_t chunk) const { return sums + (first_chunk + chunk) * columns; }
};

// What an element of n and dout is multiplied with: weight, 1 + weight, or 1 if there is no weight. The dtype of the
// weight is known at run time only, since a block loads its weights once for all its rows.
template <class X, bool kAligned, class Index>
GEMMA_NORM_DEVICE void load_factors(const RowParams& p, Index first, int step, Index end, float (&w)[kItems<X>]) {
  const auto load = [&](auto item) {
    using W = decltype(item);
    constexpr int kLoads = kItems<X> > kItems<W> ? kItems<X> / kItems<W> : 1, kEach = kItems<X> / kLoads;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Index at = first + static_cast<Index>(i) * kEach * step;
      const Vector16 v =
          load_items<kAligned, Reuse::kSome, kEach>(static_cast<const W*>(p.data[kWeight]), at, step, end);
      unpack_items<W>(v, reinterpret_cast<float(&)[kEach]>(w[i * kEach]));
    }
    // A float32 NaN can have all its fraction bits below those of bfloat16; see device::keep_nan.
    if constexpr (sizeof(W) > sizeof(X))
      for (float& f : w) f = device::keep_nan(f);
#pragma unroll
    for (float& f : w) f += p.weight_offset;
  };
  switch (p.dtypes[kWeight]) {
    case DType::kFloat32: return load(float());
    case DType::kFloat16: return load(float16());
    case DType::kBFloat16: return load(bfloat16());
    case DType::kOther:
#pragma unroll
      for (float& f : w) f = 1.0f;
  }
}

// The rows `start`, `start + step`, ... Their coordinates are found by division once, and then by addition: a division
// in 64 bits is a call, around which a thread would spill its registers.
class RowSteps {
 public:
  GEMMA_NORM_DEVICE RowSteps(const RowParams& p, int64_t start, int64_t step)
      : p_(p), at_(p, start), step_(p, step), index_(start), rows_step_(step) {}

  GEMMA_NORM_DEVICE bool has_row() const { return index_ < p_.rows; }
  GEMMA_NORM_DEVICE void next() {
    index_ += rows_step_;
    at_.inner += step_.inner;
    at_.outer += step_.outer;
    if (p_.row_dims > 1 && at_.inner >= p_.sizes[1]) {
      at_.inner -= p_.sizes[1];
      ++at_.outer;
    }
  }
  // Points to the row, or to the first one if there is no such row.
  template <class T>
  GEMMA_NORM_DEVICE T* pointer(Operand operand) const {
    const auto& strides = p_.strides[operand];
    const int64_t offset = p_.row_dims == 1 ? at_.inner * strides[0] : at_.outer * strides[0] + at_.inner * strides[1];
    return static_cast<T*>(p_.data[operand]) + (has_row() ? offset : 0);
  }

 private:
  const RowParams& p_;
  RowIndex at_, step_;
  int64_t index_, rows_step_;
};

// The sums that a row needs: of x^2, and of g * x.
template <int kCount>
GEMMA_NORM_DEVICE void add_products(const float (&x)[kCount], const float (&dout)[kCount], const float (&w)[kCount],
                                    float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[0] = device::fma(x[i], x[i], sums[0]);
    sums[1] = device::fma(dout[i] * w[i], x[i], sums[1]);
  }
}

// What all elements of a row need: rstd, and mean(g * n).
struct RowStatistics {
  float rstd, mean;

  GEMMA_NORM_DEVICE RowStatistics(const RowParams& p, const float (&sums)[2]) {
    rstd = reciprocal_std<true>(sums[0], p);
    mean = sums[1] * p.inv_hidden * rstd;
  }
  // The sum of g * x can be beyond float32 though that of g * n is not. It is then computed anew, from n.
  GEMMA_NORM_DEVICE bool overflowed() const { return !(mean - mean == 0.0f); }

  GEMMA_NORM_DEVICE float dx(float n, float g) const { return rstd * device::fma(-n, mean, g); }
};

// Computes dx of rows that are held in registers, and partial sums of dweight. kWave: each row has a power of two of
// lanes of one wave, and a block works on several rows at a time. kBlock: a row has all threads of the block.
template <class X, class Y, Scope kScope, int kVectors, int kThreads, int kResident, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, (kAligned ? kResident / kThreads : 1))
backpropagate_rows(RowParams p, Launch launch, Partials partials) {
  constexpr int kCount = kItems<X>, kUses = 2;
  struct Loaded {
    Vector16 x[kVectors], dout[kVectors];
  };
  const int thread = device::thread_index(), threads = device::block_threads();
  const int group = kScope == Scope::kWave ? thread >> launch.log2_slots : 0;
  const int groups = kScope == Scope::kWave ? threads >> launch.log2_slots : 1;
  const int slot = kScope == Scope::kWave ? thread & ((1 << launch.log2_slots) - 1) : thread;
  const int step = item_step(launch);
  const int hidden = static_cast<int>(p.hidden), end_of_slot = slot < launch.slots ? hidden : 0;
  const auto first = [&](int k) { return first_item<kAligned, X, int>(launch, slot, k); };
  const int64_t chunk = device::block_index(), stride = partials.chunks * groups;
  const auto load = [&](Loaded& loaded, const RowSteps& row) {
    const int end = row.has_row() ? end_of_slot : 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      loaded.x[k] = load_items<kAligned, Reuse::kNone, kCount>(row.template pointer<X>(kX), first(k), step, end);
      loaded.dout[k] = load_items<kAligned, Reuse::kNone, kCount>(row.template pointer<Y>(kDOut), first(k), step, end);
    }
  };

  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  RowSteps row(p, chunk + partials.chunks * group, stride);
  Loaded next;
  load(next, row);
  float w[kVectors][kCount], dweight[kVectors][kCount] = {};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) load_factors<X, kAligned>(p, first(k), step, end_of_slot, w[k]);

  int use = 0;
  // All groups of a block take as many steps, since they exchange together. A group without a row has zeros.
  for (int64_t base = chunk; base < p.rows; base += stride) {
    const bool has_row = row.has_row();
    const int end = has_row ? end_of_slot : 0;
    const X* const dsum_row = row.template pointer<X>(kDSum);
    X* const dx = row.template pointer<X>(kDX);
    Loaded now = next;
    row.next();
    load(next, row);
    Vector16 dsum[kVectors];
    if (p.data[kDSum]) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        dsum[k] = load_items<kAligned, Reuse::kNone, kCount>(dsum_row, first(k), step, end);
    }

    float sums[2] = {};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kCount], dout[kCount];
      unpack_items<X>(now.x[k], x);
      unpack_items<Y>(now.dout[k], dout);
      add_products(x, dout, w[k], sums);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      device::pack_again(&now.x[k]);
      device::pack_again(&now.dout[k]);
    }
    sum_over_row<kScope, kThreads, kUses>(sums, launch, use++);
    RowStatistics statistics(p, sums);
    if (!has_row) statistics.rstd = 0.0f;
    if (device::any_lane(statistics.overflowed())) {
      float sum[2] = {};
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        float x[kCount], dout[kCount];
        unpack_items<X>(now.x[k], x);
        unpack_items<Y>(now.dout[k], dout);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[1] = device::fma(dout[i] * w[k][i], x[i] * statistics.rstd, sum[1]);
      }
      sum_over_row<kScope, kThreads, kUses>(sum, launch, use++);
      if (statistics.overflowed()) statistics.mean = sum[1] * p.inv_hidden;
    }

#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[kCount], dout[kCount], s[kCount];
      unpack_items<X>(now.x[k], x);
      unpack_items<Y>(now.dout[k], dout);
      if (p.data[kDSum]) unpack_items<X>(dsum[k], s);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float n = x[i] * statistics.rstd;
        dweight[k][i] = device::fma(dout[i], n, dweight[k][i]);
        x[i] = statistics.dx(n, dout[i] * w[k][i]);
        if (p.data[kDSum]) x[i] += s[i];
      }
      store_items<kAligned, kCount>(dx, first(k), step, end, pack_items<X>(x));
    }
  }

  if (!partials.sums) return;
  float* const to = partials.row(chunk);
  if constexpr (kScope == Scope::kWave) {
    // Adds up the groups of the block, in order.
    struct Sums {
      float of_groups[kThreads * kVectors * kCount];
    };
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
      to[column] = sum;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; i += kItems<float>)
        store_items<kAligned, kItems<float>>(
            to, first(k) + i * step, step, end_of_slot,
            pack_items<float>(reinterpret_cast<float(&)[kItems<float>]>(dweight[k][i])));
    }
  }
}

// The same for rows that are too large for the registers of a block, and for unaligned rows of more than a wave. Each
// row is read twice, the second time from the caches. The partial sums are in memory, where each thread has columns of
// its own.
template <class X, class Y, int kThreads, bool kAligned>
GEMMA_NORM_KERNEL(kThreads, 1)
backpropagate_in_two_passes(RowParams p, Launch launch, Partials partials) {
  constexpr int kCount = kItems<X>;
  const int slot = device::thread_index(), step = item_step(launch);
  const int64_t end = slot < launch.slots ? p.hidden : 0, chunk = device::block_index();
  float* const to = partials.sums ? partials.row(chunk) : nullptr;
  device::wait_for_previous_kernel(p.data[kX], p.data[kDOut], p.data[kDX], p.data[kWeight]);
  device::allow_next_kernel();
  int use = 0;
  for (RowSteps row(p, chunk, partials.chunks); row.has_row(); row.next()) {
    const bool is_first = use == 0;
    const auto each_vector = [&](const auto& visit) {
      for (int k = 0; k < launch.vectors; ++k) {
        const int64_t first = first_item<kAligned, X, int64_t>(launch, slot, k);
        float x[kCount], dout[kCount], w[kCount];
        unpack_items<X>(load_items<kAligned, Reuse::kSome, kCount>(row.template pointer<X>(kX), first, step, end), x);
        unpack_items<Y>(load_items<kAligned, Reuse::kSome, kCount>(row.template pointer<Y>(kDOut), first, step, end),
                        dout);
        load_factors<X, kAligned>(p, first, step, end, w);
        visit(first, x, dout, w);
      }
    };
    float sums[2] = {};
    each_vector([&](int64_t, auto& x, auto& dout, auto& w) { add_products(x, dout, w, sums); });
    sum_over_row<Scope::kBlock, kThreads, 2>(sums, launch, use++);
    RowStatistics statistics(p, sums);
    if (device::any_lane(statistics.overflowed())) {
      float sum[2] = {};
      each_vector([&](int64_t, auto& x, auto& dout, auto& w) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[1] = device::fma(dout[i] * w[i], x[i] * statistics.rstd, sum[1]);
      });
      sum_over_row<Scope::kBlock, kThreads, 2>(sum, launch, use++);
      statistics.mean = sum[1] * p.inv_hidden;
    }
    each_vector([&](int64_t first, auto& x, auto& dout, auto& w) {
      float n[kCount], s[kCount] = {};
      if (p.data[kDSum])
        unpack_items<X>(load_items<kAligned, Reuse::kNone, kCount>(row.template pointer<X>(kDSum), first, step, end),
                        s);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        n[i] = x[i] * statistics.rstd;
        x[i] = statistics.dx(n[i], dout[i] * w[i]);
        if (p.data[kDSum]) x[i] += s[i];
      }
      store_items<kAligned, kCount>(row.template pointer<X>(kDX), first, step, end, pack_items<X>(x));
      if (!to) return;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t column = first + static_cast<int64_t>(i) * step;
        if (column < end) to[column] = is_first ? dout[i] * n[i] : device::fma(dout[i], n[i], to[column]);
      }
    });
  }
}

// Adds up the partial sums of `chunks` chunks. A block has kSumColumns columns. Its threads each add up every
// (kSumThreads / kSumColumns)-th chunk of a column, and the sums of these are added in order.
GEMMA_NORM_KERNEL(kSumThreads, 1)
sum_chunks(RowParams p, Partials partials, int64_t chunks) {
  constexpr int kParts = kSumThreads / kSumColumns;
  struct Sums {
    float of_parts[kParts][kSumColumns];
  };
  auto& sums = device::shared_memory<Sums>().of_parts;
  const int place = device::thread_index() % kSumColumns, part = device::thread_index() / kSumColumns;
  const int64_t column = device::block_index() * kSumColumns + place;
  device::wait_for_previous_kernel(partials.sums, p.data[kDWeight]);
  device::allow_next_kernel();
  float sum = 0.0f;
  if (column < partials.columns) {
#pragma unroll 8
    for (int64_t chunk = part; chunk < chunks; chunk += kParts) sum += partials.sums[chunk * partials.columns + column];
  }
  sums[part][place] = sum;
  device::block_barrier();
  if (part > 0 || column >= partials.columns) return;
  for (int i = 1; i < kParts; ++i) sum += sums[i][place];
  const auto store = [&](auto item) {
    using W = decltype(item);
    const float f[2] = {sizeof(W) < sizeof(float) ? device::keep_nan(sum) : sum, 0.0f};
    if constexpr (sizeof(W) == 4)
      static_cast<float*>(p.data[kDWeight])[column] = f[0];
    else
      static_cast<W*>(p.data[kDWeight])[column].bits = static_cast<uint16_t>(device::pack<W>(f));
  };
  switch (p.dtypes[kDWeight]) {
    case DType::kFloat32: return store(float());
    case DType::kFloat16: return store(float16());
    default: return store(bfloat16());
  }
}

}  // namespace gemma_norm::gpu
