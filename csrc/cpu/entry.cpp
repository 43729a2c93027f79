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

void run_rows(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  work.rows(work.params, begin, end);
}

}  // namespace

Status run_cpu(Isa isa, const Call& call, ParallelFor parallel_for, Message* message) {
  if (Ops::index(call.op) < 0) return no_such_operator(call, message);
  RowParams params;
  RowSlices slices;
  const Status status = check(call, &params, &slices, message);
  if (status != Status::kOk) return status;

  const CpuKernels& kernels = kernels_of(isa);
  const int index = ForwardOps::index(call.op);
  if (index < 0) {
    run_backward(kernels.backward, call, params, slices, parallel_for);
    return Status::kOk;
  }
  const int64_t grain = (kGrain + params.hidden - 1) / params.hidden;
  for (int64_t i = 0; i < slices.count; ++i) {
    Work work{kernels.rows[index], select_slice(params, slices, i)};
    if (!parallel_for || params.rows <= grain)
      run_rows(&work, 0, params.rows);
    else
      parallel_for(params.rows, grain, &run_rows, &work);
  }
  return Status::kOk;
}

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_cpu(const gemma_norm::Call* call, gemma_norm::ParallelFor parallel_for,
                                  gemma_norm::Message* message) {
  static const gemma_norm::Isa isa = gemma_norm::best_isa();
  return gemma_norm::run_cpu(isa, *call, parallel_for, message);
}
