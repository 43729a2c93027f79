// The CPU's function of the C interface: it checks the call, chooses the instruction set, and splits the rows over
// threads.
#include <cstdint>

#include "../core/check.h"
#include "isa.h"

namespace gemma_norm {
namespace {

struct Work {
  RowsFunction rows;
  RowParams params;
};

struct HeadsWork {
  HeadsFunction compute;
  RowParams params;
  HeadParams heads;
  CopiedHeads copied;
};

void run_heads(void* context, int64_t begin, int64_t end) {
  const HeadsWork& work = *static_cast<const HeadsWork*>(context);
  work.compute(work.params, work.heads, work.copied, begin, end);
}

void run_rows(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  work.rows(work.params, begin, end);
}

}  // namespace

Status run_cpu(Isa isa, const Call& call, ParallelFor parallel_for, Message* message) {
  if (Ops::index(call.op) < 0) return no_such_operator(call, message);
  RowParams params;
  RowSlices slices;
  const Status status = check(call, &params, &slices, message, true);
  if (status != Status::kOk) return status;

  const CpuKernels& kernels = kernels_of(isa);
  const auto run = [&](void (*body)(void*, int64_t, int64_t), void* work, int64_t elements) {
    const int64_t grain = (kGrain + elements - 1) / elements;
    if (!parallel_for || params.rows <= grain)
      body(work, 0, params.rows);
    else
      parallel_for(params.rows, grain, body, work);
  };
  if (call.op->has_heads()) {
    HeadsWork work{kernels.heads, {}, head_params(call), copied_heads(call)};
    int64_t heads = 0;
    for (int i = 0; i < 2; ++i) heads += work.heads.heads[i] + work.copied.heads[i];
    for (int64_t i = 0; i < slices.count; ++i) {
      work.params = select_slice(params, slices, i);
      run(&run_heads, &work, params.hidden * heads);
    }
    return Status::kOk;
  }
  const int index = ForwardOps::index(call.op);
  if (index < 0) {
    run_backward(kernels.backward, call, params, slices, parallel_for);
    return Status::kOk;
  }
  for (int64_t i = 0; i < slices.count; ++i) {
    Work work{kernels.rows[index], select_slice(params, slices, i)};
    run(&run_rows, &work, params.hidden);
  }
  return Status::kOk;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_cpu(const gemma_norm::Call* call, gemma_norm::ParallelFor parallel_for,
                                  gemma_norm::Message* message) {
  static const gemma_norm::Isa isa = gemma_norm::best_isa();
  return gemma_norm::run_cpu(isa, *call, parallel_for, message);
}
