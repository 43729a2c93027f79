// The sums that make up dweight. Each block has a sum for each column over its chunk of rows. If the block has all
// rows, that is dweight; else it is a partial sum, and a second kernel adds up those of all chunks, in a fixed order
// and without atomic operations. So dweight has the same bits each time.
#pragma once

#include "../device/platform.h"
#include "backward_tuning.h"
#include "row.cuh"

namespace gemma_norm::gpu {

// Where the sums of a block go.
enum class SumsTo : int32_t {
  kNowhere,  // no dweight is wanted
  kDWeight,  // the block's rows are all rows, or all rows of their group
  kMemory,   // for sum_chunks()
};

// The partial sums of dweight: a row of `columns` floats for each chunk.
struct Partials {
  float* sums;  // kMemory
  int64_t columns;
  int64_t first_chunk;  // of this launch, in `sums`
  int64_t chunks;       // of this launch: the number of its blocks
  SumsTo to;

  GEMMA_NORM_DEVICE float* row(int64_t chunk) const { return sums + (first_chunk + chunk) * columns; }
};

GEMMA_NORM_DEVICE void store_dweight(const RowParams& p, int64_t column, float sum) {
  const auto store = [&](auto item) {
    using W = decltype(item);
    if constexpr (sizeof(W) == 4) {
      static_cast<float*>(p.data[kDWeight])[column] = sum;
    } else {
      const float f[2] = {device::keep_nan(sum), 0.0f};
      static_cast<W*>(p.data[kDWeight])[column].bits = static_cast<uint16_t>(device::pack<W>(f));
    }
  };
  switch (p.dtypes[kDWeight]) {
    case DType::kFloat32: return store(float());
    case DType::kFloat16: return store(float16());
    default: return store(bfloat16());
  }
}

// Hands over the sums of a block: calls visit(put), which calls put(column, step, sums) for the columns that this
// thread has: `column` and those at multiples of `step` from it. There are none from `end` on.
template <bool kAligned, class Visit>
GEMMA_NORM_DEVICE void put_sums(const RowParams& p, const Partials& partials, int chunk, const Visit& visit) {
  switch (partials.to) {
    case SumsTo::kNowhere: return;
    case SumsTo::kDWeight:
      return visit([&](int column, int step, int end, const auto& sums) {
        for (int i = 0; i < static_cast<int>(sizeof sums / sizeof(float)); ++i)
          if (column + i * step < end) store_dweight(p, chunk * p.hidden + column + i * step, sums[i]);
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

// Adds up the partial sums of `chunks` chunks. A block has kSumColumns columns and `parts` threads for each, a power of
// two from kMinSumParts to kMaxSumParts. Thread i of a column adds up chunks i, i + parts, ...; the sums of these
// threads are then added as a tree.
GEMMA_NORM_KERNEL(kSumColumns* kMaxSumParts, 1)
sum_chunks(RowParams p, Partials partials, int64_t chunks, int32_t parts) {
  struct Sums {
    float of_columns[kSumColumns][kMaxSumParts + 1];  // one more, so that a wave's accesses go to different banks
  };
  auto& sums = device::shared_memory<Sums>().of_columns;
  const int thread = device::thread_index();
  const int64_t first = device::block_index() * kSumColumns, column = first + thread / parts;
  device::wait_for_previous_kernel(partials.sums, p.data[kDWeight]);
  device::allow_next_kernel();
  const int64_t own = first + thread % kSumColumns;
  float sum = 0.0f;
  if (own < partials.columns) {
#pragma unroll 8
    for (int64_t chunk = thread / kSumColumns; chunk < chunks; chunk += parts)
      sum += partials.sums[chunk * partials.columns + own];
  }
  sums[thread % kSumColumns][thread / kSumColumns] = sum;
  device::block_barrier();
  sum = device::sum_over_lanes(sums[thread / parts][thread % parts], parts);
  if (thread % parts == 0 && column < partials.columns) store_dweight(p, column, sum);
}

}  // namespace
}  // namespace gemma_norm::gpu
