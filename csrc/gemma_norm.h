// The C interface of gemma_norm: one function a device runs any operator of the library. What an operator computes is in its file
// in ops/; what it takes is in its OpInfo (core/op_info.h).
// A function checks its arguments before anything is written, and neither throws (but see Call::before_write), prints (but see
// GEMMA_NORM_PRINT_PLAN in gpu/plan.h), exits nor synchronises.
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

// Every tensor that an operator may take or give: an index into the arrays of a call and of its checked parameters.
enum Operand : int32_t {
  kX,            // [..., hidden]
  kWeight,       // [hidden]
  kResidual,     // [..., hidden]
  kPost,         // [..., hidden]; Python's post_residual_addition
  kGate,         // [..., hidden]
  kOut,          // [..., hidden]
  kResidualOut,  // [..., hidden]
  kOperands,
  kNoOperand = -1
};
constexpr const char* kOperandNames[kOperands] = {"x",    "weight", "residual",    "post_residual_addition",
                                                  "gate", "out",    "residual_out"};

constexpr int64_t kWholeRow = INT64_MAX;

// Every option of an operator, under its name in the schema. Operators that have no such option leave it as it is here.
struct Options {
  double eps = 1e-6;               // finite, >= 0
  bool gemma = false;              // multiply by 1 + weight
  bool round_each_step = false;    // to x's dtype, as a model in plain PyTorch does; else once, at the end
  bool sigmoid = false;            // the gate's activation, else silu
  bool norm_before_gate = true;    // the norm's result is gated, else what is normalised
  int64_t group_size = kWholeRow;  // elements of a row that are normalised together
};

struct OpInfo;

// One call of an operator. An output may be an input itself (in place: same pointer, shape and strides); otherwise it must not
// overlap any input.
struct Call {
  const OpInfo* op;
  const Tensor* tensors[kOperands];  // null for what the operator has not, and for an optional operand that is left out
  Options options;
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

// The operator whose torch name is `name` ("rms_norm", "add_rms_norm", ...), or null.
const gemma_norm::OpInfo* gemma_norm_op(const char* name);

// Runs on the calling thread and on whatever threads `parallel_for` brings (null: the calling thread alone).
gemma_norm::Status gemma_norm_cpu(const gemma_norm::Call* call, gemma_norm::ParallelFor parallel_for, gemma_norm::Message* message);

// Enqueue on `stream` (a cudaStream_t or hipStream_t of the current device) and return; pointers are device pointers.
gemma_norm::Status gemma_norm_cuda(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message);
gemma_norm::Status gemma_norm_hip(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message);
}
#pragma GCC visibility pop
