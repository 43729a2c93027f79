// From the C interface to an operator's kernels. The kernels of each operator are compiled in a source of their own, so
// this header instantiates none.
#pragma once

#include "../device/platform.h"
#include "../ops/ops.h"

namespace gemma_norm::gpu {

// Checks the call and launches the kernels of `Op`. Defined in launch.cuh.
template <class Op>
Status launch_op(const Call& call, device::Stream stream, Message* message);

// Finds the operator of the call and launches its kernels.
inline Status dispatch(const Call& call, device::Stream stream, Message* message) {
  if (Ops::index(call.op) < 0) return no_such_operator(call, message);
  Status status = Status::kOk;
  Ops::visit(call.op, [&](auto op) { status = launch_op<decltype(op)>(call, stream, message); });
  return status;
}

}  // namespace gemma_norm::gpu
