// Runs a checked call of a backward operator: the memory, the chunks, and the threads.
#include "backward.h"

#include "isa.h"

namespace gemma_norm {
namespace {

// A chunk has at least this many elements, so that a thread that starts for one has enough to do; and so many rows that
// its partial sums, 8 bytes of traffic for each column, cost little beside them. More chunks than the last number would
// hardly keep more threads busy.
constexpr int64_t kLeastRows = 8, kMostChunks = 128;

int64_t chunks_of(int64_t rows, int64_t hidden) {
  const int64_t by_elements = rows * hidden / kGrain, by_rows = rows / kLeastRows;
  const int64_t chunks = by_elements < by_rows ? by_elements : by_rows;
  return chunks < 1 ? 1 : chunks < kMostChunks ? chunks : kMostChunks;
}

struct Range {
  BackwardFunction function;
  const BackwardWork& work;

  static void run(void* context, int64_t begin, int64_t end) {
    const Range& range = *static_cast<const Range*>(context);
    range.function(range.work, begin, end);
  }
};

// Runs `function` for [0, count), of which each has so many elements.
void run(BackwardFunction function, const BackwardWork& work, int64_t count, int64_t elements,
         ParallelFor parallel_for) {
  const int64_t grain = elements < kGrain ? kGrain / elements : 1;
  Range range{function, work};
  if (!parallel_for || count <= grain)
    Range::run(&range, 0, count);
  else
    parallel_for(count, grain, &Range::run, &range);
}

}  // namespace

void run_backward(const BackwardKernels& kernels, const Call& call, const RowParams& params, const RowSlices& slices,
                  ParallelFor parallel_for) {
  // With groups, a row of `params` is a group. A chunk's partial sums are those of all groups.
  const int64_t sections = params.strides[kWeight][1] ? params.sizes[1] : 1;
  const int64_t chunks = slices.count ? chunks_of(params.rows / sections, params.hidden * sections) : 0;
  const bool has_dweight = params.data[kDWeight] != nullptr;
  if (chunks == 0 && !has_dweight) return;

  const int64_t columns = (params.hidden + kColumnStep - 1) / kColumnStep * kColumnStep;
  const int64_t factors = sections * columns, floats = factors * (1 + (has_dweight ? chunks : 0));
  const bool gated = call.op->has(kDGate);
  const int64_t buffers = gated ? chunks * kBufferRows * columns : 0;
  float* const memory = static_cast<float*>(call.scratch(call.context, (floats + buffers) * int64_t{sizeof(float)}));
  BackwardWork work{
      params,   memory, has_dweight ? memory + factors : nullptr, gated ? memory + floats : nullptr, columns,
      sections, chunks};
  kernels.factors(work, 0, sections);
  // All slices add to the same partial sums. `params.rows` is that of a slice.
  if (has_dweight)
    for (int64_t i = factors; i < floats; ++i) memory[i] = 0;
  for (int64_t i = 0; i < slices.count; ++i) {
    work.params = select_slice(params, slices, i);
    run(gated ? kernels.gated_chunks : kernels.chunks, work, chunks, params.rows * params.hidden / chunks,
        parallel_for);
  }
  if (has_dweight) run(kernels.column_steps, work, factors / kColumnStep, (chunks + 1) * kColumnStep, parallel_for);
}

}  // namespace gemma_norm
