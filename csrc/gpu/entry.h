// From the C interface to an operator's kernels, which each have a source of their own: this one instantiates none.
#pragma once

#include "../device/platform.h"
#include "../ops/ops.h"

namespace gemma_norm::gpu {

// In launch.cuh.
template <class Op>
Status run(const Call& call, device::Stream stream, Message* message);

// Of the operator that the call names.
inline Status run(const Call& call, device::Stream stream, Message* message) {
  if (Ops::index(call.op) < 0) return no_such_operator(call, message);
  Status status = Status::kOk;
  Ops::visit(call.op, [&](auto op) { status = run<decltype(op)>(call, stream, message); });
  return status;
}

}  // namespace gemma_norm::gpu
