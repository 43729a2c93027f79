// The CPU's function of the C interface: it checks the call, chooses the instruction set, and splits the rows over
// threads.
#include <cstdint>

#include "../core/check.h"
#include "isa.h"

namespace gemma_norm {
namespace {

// The least number of elements for which another thread is worth its start: about 4 us of work, a few times as long as
// waking a thread takes. PyTorch itself uses the same number.
constexpr int64_t kGrain = 32768;

struct Work {
  RowsFunction rows;
  RowParams params;
};

void run_rows(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  work.rows(work.params, begin, end);
}

}  // namespace
}  // namespace gemma_norm

gemma_norm::Status gemma_norm_cpu(const gemma_norm::Call* call, gemma_norm::ParallelFor parallel_for,
                                  gemma_norm::Message* message) {
  using namespace gemma_norm;
  if (Ops::index(call->op) < 0) return no_such_operator(*call, message);
  RowParams params;
  RowSlices slices;
  const Status status = check(*call, &params, &slices, message);
  if (status != Status::kOk) return status;

  static const Isa isa = best_isa();
  const RowsFunction rows = cpu_rows(isa, call->op);
  const int64_t grain = (kGrain + params.hidden - 1) / params.hidden;
  for (int64_t i = 0; i < slices.count; ++i) {
    Work work{rows, select_slice(params, slices, i)};
    if (!parallel_for || params.rows <= grain)
      run_rows(&work, 0, params.rows);
    else
      parallel_for(params.rows, grain, &run_rows, &work);
  }
  return Status::kOk;
}
