// The C interface of gemma_norm: RMSNorm, plain or fused with the residual addition, one function a device.
//
//   s = x                                         without residual
//   s = round(x + residual)                       with residual
//   s = round(x + round(residual + post))         with residual and post_residual_addition
//   y = round(s * rstd * (gemma ? 1 + weight : weight)),   rstd = 1 / sqrt(mean(s^2) + eps)
//
// round() is to x's dtype, nearest even; everything else is float32. y goes to `out`, s to `residual_out`.
// A function checks its arguments before anything is written, and neither throws (but see NormArgs::before_write), prints, exits
// nor synchronises.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_norm {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kOther };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

enum class Status : int32_t {
  kOk,
  kInvalidArgument,  // the message names op, argument, expected and got
  kDeviceError,      // the message is the runtime's
};

// A view of strided memory; strides count elements. The last dimension is the one that is normalised.
struct Tensor {
  void* data;
  const int64_t* sizes;    // [dims]
  const int64_t* strides;  // [dims]
  int32_t dims;
  DType dtype;
  const char* dtype_name;  // for messages; names the dtype also when it is kOther
};

struct NormArgs {
  const char* op;                        // for messages: "rms_norm", "fused_add_rms_norm", "add_rms_norm"
  Tensor x;                              // [..., hidden]
  Tensor weight;                         // [hidden], contiguous, x's dtype or float32
  Tensor out;                            // [..., hidden]; exactly x's memory (in place) or disjoint from every input
  const Tensor* residual;                // [..., hidden] or null
  const Tensor* post_residual_addition;  // [..., hidden] or null; needs residual
  const Tensor* residual_out;            // [..., hidden], null exactly when residual is; exactly residual's memory or disjoint
  double eps;                            // finite, >= 0
  bool gemma;                            // multiply by 1 + weight
  // Called once, after the last check and before the first write; null: not called. What it throws passes through: nothing has
  // been written then.
  void (*before_write)(const void* context) = nullptr;
  const void* context = nullptr;
};

// The message of a status that is not kOk, always terminated.
struct Message {
  char text[512];
};

// Splits [0, count) into ranges of at least `grain` and calls body(context, begin, end) for each, on any thread; returns when
// all are done.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);

}  // namespace gemma_norm

#pragma GCC visibility push(default)
extern "C" {

// Runs on the calling thread and on whatever threads `parallel_for` brings (null: the calling thread alone).
gemma_norm::Status gemma_norm_cpu(const gemma_norm::NormArgs* args, gemma_norm::ParallelFor parallel_for,
                                  gemma_norm::Message* message);

// Enqueue on `stream` (a cudaStream_t or hipStream_t of the current device) and return; pointers are device pointers.
gemma_norm::Status gemma_norm_cuda(const gemma_norm::NormArgs* args, void* stream, gemma_norm::Message* message);
gemma_norm::Status gemma_norm_hip(const gemma_norm::NormArgs* args, void* stream, gemma_norm::Message* message);
}
#pragma GCC visibility pop
