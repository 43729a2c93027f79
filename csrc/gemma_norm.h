// The C interface of gemma_norm. There is one function for each kind of device, and it runs any operator of the
// library. An operator's file in ops/ says what it computes; its OpInfo (core/op_info.h) says which tensors it takes.
//
// Each function checks all arguments before it writes anything. It does not throw (except what Call::before_write
// throws), print (except with GEMMA_NORM_PRINT_PLAN, see gpu/plan.h), exit or synchronise.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma_norm {

enum class DType : int32_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kOther,
  kInt32,
  kInt64,
  // What operators quantise to. The float8 formats are those of PyTorch's dtypes of the same names.
  kInt8,
  kFloat8E4M3FN,
  kFloat8E4M3FNUZ,
  kFloat8E5M2,
  kFloat4E2M1FNx2,  // two elements a byte, the first in the low bits
  kFloat8E8M0FNU,   // for scales alone: a power of two, by its exponent
};

constexpr bool is_float(DType dtype) { return dtype < DType::kOther; }
constexpr bool is_quantized(DType dtype) { return dtype >= DType::kInt8 && dtype <= DType::kFloat4E2M1FNx2; }
constexpr bool is_packed(DType dtype) { return dtype == DType::kFloat4E2M1FNx2; }
constexpr bool is_of_scales(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat8E4M3FN || dtype == DType::kFloat8E8M0FNU ||
         dtype == DType::kInt32;
}
constexpr int64_t size_of(DType dtype) {
  if (dtype >= DType::kInt8) return 1;
  return dtype == DType::kInt64 ? 8 : dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2;
}

enum class Status : int32_t {
  kOk,
  kInvalidArgument,  // the message names the operator, the argument, what was expected and what came
  kDeviceError,      // the message is that of the CUDA or HIP runtime
};

// A view of strided memory. Strides count elements. The last dimension is the one that is normalised.
struct Tensor {
  void* data;
  const int64_t* sizes;    // [dims]
  const int64_t* strides;  // [dims]
  int32_t dims;
  DType dtype;
  const char* dtype_name;  // for messages; it names the dtype even where `dtype` is kOther
};

// Every tensor that an operator can take or return. It indexes the arrays of Call and RowParams. An operator's rules
// may give one another name (op_info.h): qk_norm_rope's kX is q.
enum Operand : int32_t {
  kX,            // [..., hidden]
  kWeight,       // [hidden]
  kResidual,     // [..., hidden]
  kPost,         // [..., hidden]; post_residual_addition in Python
  kGate,         // [..., hidden]
  kPostWeight,   // [hidden]; the weight of x's own norm, which comes before the addition
  kKey,          // [..., k_heads, hidden]; k in Python
  kKeyWeight,    // [hidden]
  kCos,          // [..., rotary]
  kSin,          // [..., rotary]
  kCosSinCache,  // [max, rotary]
  kPositions,    // [...] or [3, ...], integers
  kScale,        // one number, by which a quantised result is to be multiplied; or scale_ub, an upper bound of |y|
  kGlobalScale,  // one number, by which the scales are to be multiplied
  kOut,          // [..., hidden]
  kResidualOut,  // [..., hidden]
  kKeyOut,       // [..., k_heads, hidden]
  kScaleOut,     // [..., groups], by which the elements of each group of a quantised result are to be multiplied
  kYOut,         // [..., hidden]; what was quantised, rounded to x's dtype
  // Gradients. d<operand> is the gradient of <operand>.
  kDOut,     // [..., hidden]
  kDSum,     // [..., hidden]; of residual_out
  kDX,       // [..., hidden]
  kDGate,    // [..., hidden]
  kDWeight,  // [hidden]
  kOperands,
  kNoOperand = -1
};
constexpr const char* kOperandNames[kOperands] = {"x",
                                                  "weight",
                                                  "residual",
                                                  "post_residual_addition",
                                                  "gate",
                                                  "post_weight",
                                                  "k",
                                                  "k_weight",
                                                  "cos",
                                                  "sin",
                                                  "cos_sin_cache",
                                                  "positions",
                                                  "scale",
                                                  "global_scale",
                                                  "out",
                                                  "residual_out",
                                                  "k_out",
                                                  "scale_out",
                                                  "y",
                                                  "dout",
                                                  "dsum",
                                                  "dx",
                                                  "dgate",
                                                  "dweight"};

constexpr int64_t kWholeRow = INT64_MAX;

// How many pairs of a head take each of a token's three positions.
struct Sections {
  static constexpr int kAxes = 3;
  int32_t count = 0;  // of sizes: kAxes, or 0 if a token has one position
  int64_t sizes[kAxes] = {};
};

// Every option of any operator, by its name in the schema. A call of an operator that lacks an option leaves its
// default.
struct Options {
  double eps = 1e-6;               // finite, >= 0
  bool gemma = false;              // multiply by 1 + weight
  bool round_each_step = false;    // round to x's dtype after each step, as a model in plain PyTorch does
  bool sigmoid = false;            // the gate's activation is the logistic function; otherwise silu
  bool norm_before_gate = true;    // gate the result of the norm; otherwise gate x, and normalise the product
  int64_t group_size = kWholeRow;  // this many elements of a row are normalised together
  // Of an operator that rotates heads.
  bool round_rotation = false;     // round the norm, both products and their sum to x's dtype
  bool interleaved = false;        // the elements of a pair are neighbours; otherwise half of the rotated ones apart
  bool mrope_interleaved = false;  // the pairs of the three sections take turns; otherwise they come one after another
  Sections mrope_section;
  // Of an operator that quantises.
  DType dtype = DType::kFloat8E4M3FN;    // of the result
  const char* dtype_name = "";           // for messages; it names the dtype even where `dtype` is kOther
  int64_t scale_group_size = kWholeRow;  // this many elements of a row have a scale of their own
  bool round_first = false;              // round y to x's dtype before it is quantised
  bool scale_ue8m0 = false;              // scales are powers of two
  bool column_major_scale = false;       // a new scale_out has its last dimension outermost in memory
  DType scale_dtype = DType::kFloat32;   // of scale_out; with kInt32, four exponents of powers of two are an element
  const char* scale_dtype_name = "";
};

struct OpInfo;

// One call of an operator. An output may be an input itself (in place: same pointer, shape and strides); otherwise it
// must not overlap any input.
struct Call {
  const OpInfo* op;
  const Tensor* tensors[kOperands];  // null for an operand that the operator lacks, or that is left out
  Options options;
  // Called once, after the last check and before the first write, unless it is null. If it throws, nothing has been
  // written, and the exception reaches the caller.
  void (*before_write)(void* context) = nullptr;
  // Returns memory of the call's device, aligned to 64 bytes, for the call alone: this function's work may use it until
  // the next call on the same stream. Needed by the backward operators, also by those without a dweight. Called at most
  // once.
  void* (*scratch)(void* context, int64_t bytes) = nullptr;
  void* context = nullptr;
};

// Describes a status other than kOk. Always terminated by a null character.
struct Message {
  char text[512];
};

// Splits [0, count) into ranges of at least `grain`, calls body(context, begin, end) for each of them on any thread,
// and returns when all calls have returned.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);

}  // namespace gemma_norm

#pragma GCC visibility push(default)
extern "C" {

// The operator that torch.ops.gemma_norm has as `name`, such as "rms_norm" or "rms_norm.out"; null if there is none.
const gemma_norm::OpInfo* gemma_norm_op(const char* name);

// Runs on the calling thread and on the threads of `parallel_for`; if that is null, on the calling thread alone.
gemma_norm::Status gemma_norm_cpu(const gemma_norm::Call* call, gemma_norm::ParallelFor parallel_for,
                                  gemma_norm::Message* message);

// These enqueue the work on `stream`, a cudaStream_t or hipStream_t of the current device, and return. All tensors are
// in device memory.
gemma_norm::Status gemma_norm_cuda(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message);
gemma_norm::Status gemma_norm_hip(const gemma_norm::Call* call, void* stream, gemma_norm::Message* message);
}
#pragma GCC visibility pop
