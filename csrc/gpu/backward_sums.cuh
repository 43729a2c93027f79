// The sums that make up dweight. Each block has a sum for each column over its chunk of rows. If the block has all
// rows, that is dweight; else it is a partial sum, and a second kernel adds up those of all chunks. If the rows are
// few, the second kernel reads them anew instead, and needs nothing of the first but each row's rstd. Either adds in a
// fixed order and without atomic operations, so dweight has the same bits each time.
#pragma once

#include "../device/platform.h"
#include "backward_rows.cuh"
#include "backward_tuning.h"
#include "row.cuh"

namespace gemma_norm::gpu {

// Where the sums of a block go.
enum class SumsTo : int32_t {
  kNowhere,  // no dweight is wanted
  kDWeight,  // the block's rows are all rows, or all rows of their group
  kMemory,   // for sum_chunks()
  kRows,     // nowhere either, but each row's rstd goes to memory, for sum_rows()
};

// The partial sums of dweight: a row of `columns` floats for each chunk.
struct Partials {
  float* sums;  // kMemory, and kRows: each row's rstd
  int64_t columns;
  int64_t first_chunk;  // of this launch, in `sums`
  int64_t chunks;       // of this launch: the number of its blocks
  SumsTo to;

  GEMMA_NORM_DEVICE float* row(int64_t chunk) const { return sums + (first_chunk + chunk) * columns; }
};

// Calls visit() with an element of dweight's dtype.
template <class Visit>
GEMMA_NORM_DEVICE void visit_dweight(const RowParams& p, const Visit& visit) {
  switch (p.dtypes[kDWeight]) {
    case DType::kFloat32: return visit(float());
    case DType::kFloat16: return visit(float16());
    default: return visit(bfloat16());
  }
}

template <class W>
GEMMA_NORM_DEVICE void store_dweight(const RowParams& p, int64_t column, float sum) {
  W* const to = static_cast<W*>(p.data[kDWeight]) + column;
  if constexpr (sizeof(W) == 4) {
    *to = sum;
  } else {
    const float f[2] = {device::keep_nan(sum), 0.0f};
    to->bits = static_cast<uint16_t>(device::pack<W>(f));
  }
}

// Hands over the sums of a block: calls visit(put), which calls put(column, step, end, sums) for the columns that this
// thread has: `column` and those at multiples of `step` from it. There are none from `end` on.
template <bool kAligned, class Visit>
GEMMA_NORM_DEVICE void put_sums(const RowParams& p, const Partials& partials, int chunk, const Visit& visit) {
  switch (partials.to) {
    case SumsTo::kNowhere:
    case SumsTo::kRows: return;
    case SumsTo::kDWeight:
      return visit_dweight(p, [&](auto item) {
        using W = decltype(item);
        const int64_t first = chunk * p.hidden;
        visit([&](int column, int step, int end, const auto& sums) {
          constexpr int kCount = sizeof sums / sizeof(float);
          // A vector, or half of one, has all its columns or none. dweight is aligned, see launch_op().
          if constexpr (kAligned && kCount > 1) {
            float f[kCount];
            for (int i = 0; i < kCount; ++i) f[i] = sizeof(W) == 4 ? sums[i] : device::keep_nan(sums[i]);
            store_items<true, kCount>(static_cast<W*>(p.data[kDWeight]) + first, column, 1, end, pack_items<W>(f));
          } else {
            for (int i = 0; i < kCount; ++i)
              if (column + i * step < end) store_dweight<W>(p, first + column + i * step, sums[i]);
          }
        });
      });
    case SumsTo::kMemory:
      float* const row = partials.row(chunk);
      return visit([&](int column, int step, int end, const auto& sums) {
        constexpr int kCount = sizeof sums / sizeof(float);
        if constexpr (kCount == kItems<float>)
          store_items<kAligned, kCount>(row, column, step, end, pack_items<float>(sums));
        else
          row[column] = sums[0];
      });
  }
}

namespace {  // unnamed, since several operators have a copy

// Adds up the partial sums of `chunks` chunks. A block has kSumColumns columns and 2^log2_parts threads for each, at
// most kMaxSumParts. Thread i of a column adds up chunks i, i + parts, ...; the sums of these threads are then added as
// a tree.
GEMMA_NORM_KERNEL(kSumColumns* kMaxSumParts, 1)
sum_chunks(RowParams p, Partials partials, int32_t chunks, int32_t log2_parts) {
  struct Sums {
    float of_columns[kSumColumns][kMaxSumParts + 1];  // one more, so that a wave's accesses go to different banks
  };
  constexpr int kAtOnce = 8;  // loads in flight
  auto& sums = device::shared_memory<Sums>().of_columns;
  const int thread = device::thread_index(), parts = 1 << log2_parts;
  const int64_t first = int64_t{device::block_index()} * kSumColumns, own = first + thread % kSumColumns;
  const float* from = partials.sums + thread / kSumColumns * partials.columns + own;
  const int64_t step = partials.columns << log2_parts;
  device::wait_for_previous_kernel(from, p.data[kDWeight]);
  device::allow_next_kernel();
  float sum = 0.0f;
  if (own < partials.columns) {
    for (int chunk = thread / kSumColumns; chunk < chunks; chunk += kAtOnce * parts) {
      float f[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, from += step)
        if (chunk + i * parts < chunks) f[i] = *from;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (chunk + i * parts < chunks) sum += f[i];
    }
  }
  sums[thread % kSumColumns][thread / kSumColumns] = sum;
  device::block_barrier();
  const int part = thread & (parts - 1), column = thread >> log2_parts;
  sum = device::sum_over_lanes(sums[column][part], parts);
  if (part == 0 && first + column < partials.columns)
    visit_dweight(p, [&](auto item) { store_dweight<decltype(item)>(p, first + column, sum); });
}

}  // namespace

// Computes dweight of rows whose rstd is in `partials`. A block has kSumColumns columns of one group, and `parts`
// threads for each vector of them; thread i of a vector has rows i, i + parts, ... of the group, at most kRowsOfPart.
// It loads aligned rows while the kernel before still computes dx.
template <class Terms, bool kAligned>
GEMMA_NORM_KERNEL(kSumColumns / Terms::kCount * kMaxSumParts, 1)
sum_rows(RowParams p, Partials partials, int32_t groups, int32_t parts) {
  constexpr int kCount = Terms::kCount, kVectors = kSumColumns / kCount;
  struct Sums {
    float of_parts[kMaxSumParts][kSumColumns];
  };
  auto& sums = device::shared_memory<Sums>().of_parts;
  const int thread = device::thread_index(), part = thread / kVectors, hidden = static_cast<int>(p.hidden);
  const int block = static_cast<int>(device::block_index()), blocks = (hidden + kSumColumns - 1) / kSumColumns;
  const int group = groups == 1 ? 0 : block / blocks, first_column = (block - group * blocks) * kSumColumns;
  const int first = first_column + thread % kVectors * kCount, last_row = static_cast<int>(p.rows) - 1;
  const auto has_row = [&](int r) { return group + (part + r * parts) * groups <= last_row; };
  const auto row = [&](int r) { return has_row(r) ? group + (part + r * parts) * groups : last_row; };
  ShortRowSteps at[kRowsOfPart];
#pragma unroll
  for (int r = 0; r < kRowsOfPart; ++r) at[r] = ShortRowSteps(p, row(r));
  typename Terms::Loaded loaded[kRowsOfPart];
  if constexpr (kAligned) {
    // What does not exist is loaded from where something is, and left out of the sum. So the loads have no conditions,
    // and go out back to back.
    const int from = first < hidden ? first : 0;
#pragma unroll
    for (int r = 0; r < kRowsOfPart; ++r)
      Terms::template load<true, Reuse::kEarly>(p, at[r], from, 1, NoEnd(), loaded[r]);
  }
  device::wait_for_previous_kernel(partials.sums, p.data[kDWeight]);
  device::allow_next_kernel();
  if constexpr (!kAligned) {
#pragma unroll
    for (int r = 0; r < kRowsOfPart; ++r)
      Terms::template load<false, Reuse::kSome>(p, at[r], first, 1, hidden, loaded[r]);
  }
  float rstd[kRowsOfPart], sum[kCount] = {};
#pragma unroll
  for (int r = 0; r < kRowsOfPart; ++r) rstd[r] = partials.sums[row(r)];
  // Else compilers would move the loads of a gated norm behind the branch below.
#pragma unroll
  for (int r = 0; r < kRowsOfPart; ++r) Terms::wait_for(loaded[r]);
#pragma unroll
  for (int r = 0; r < kRowsOfPart; ++r) {
    // Computing the gate's activation takes long, so it is left out where no thread has such a row. Without a gate, the
    // branch would take longer.
    if (Terms::kGated && group + r * parts * groups > last_row) break;
    float s[kCount], u[kCount];
    Terms::values(p, loaded[r], s, u);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = has_row(r) ? device::fma(u[i], s[i] * rstd[r], sum[i]) : sum[i];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[part][thread % kVectors * kCount + i] = sum[i];
  device::block_barrier();
  if (thread >= kSumColumns || first_column + thread >= hidden) return;
  float total = 0.0f;
  for (int i = 0; i < parts; ++i) total += sums[i][thread];
  visit_dweight(p,
                [&](auto item) { store_dweight<decltype(item)>(p, group * p.hidden + first_column + thread, total); });
}

}  // namespace gemma_norm::gpu
