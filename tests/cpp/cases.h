// The calls on which every device's kernels are tried. Knows neither GoogleTest nor any device.
#pragma once

#include <string>
#include <vector>

#include "gpu/tuning.h"
#include "ops/ops.h"

namespace gemma_norm {

// Which operands a call has, and whose memory its results take.
enum class Operands {
  kPlain,    // out = norm(x)
  kInPlace,  // x = norm(x)
  kAdd,      // residual_out = x + residual, out = norm(residual_out)
  kAddPost,  // the same with post_residual_addition
  kFused,    // the sum goes to residual's memory, its norm to x's
  kFusedPost,
  kFusedCrossed,    // the sum goes to x's memory, its norm to residual's
  kGated,           // out = the norm of x, gated
  kGatedIntoX,      // the same, out being x's memory
  kGatedIntoGate,   // the same, out being the gate's memory
  kNormAdd,         // residual_out = norm(x) + residual, out = norm(residual_out)
  kFusedNormAdd,    // the same, the sum going to residual's memory and its norm to x's
  kGradients,       // of the norm of x: dx and dweight
  kInputGradients,  // dx alone
  kGatedGradients,  // of the gated norm: dx, dgate and dweight
  kGatedInputGradients,
};

// What there is to know of each of Operands.
struct OperandsInfo {
  const char* name;
  const OpInfo* op;
  bool residual, post;        // are among the operands
  Operand out, residual_out;  // whose memory the outputs take: an input's, or their own
};
const OperandsInfo& info(Operands operands);

inline bool has_residual(Operands o) { return info(o).residual; }
inline bool is_gated(Operands o) { return info(o).op == &GatedRmsNorm::kInfos[0]; }
inline bool norms_x(Operands o) { return info(o).op == &RmsNormAddRmsNorm::kInfos[0]; }
inline bool has_dweight(Operands o) { return o == Operands::kGradients || o == Operands::kGatedGradients; }
inline bool is_backward(Operands o) { return o >= Operands::kGradients; }

// The dtypes of x and of the weight in Gemma's and Qwen's models, for which there are the most cases.
constexpr DType kDTypePairs[][2] = {{DType::kFloat32, DType::kFloat32},
                                    {DType::kFloat16, DType::kFloat16},
                                    {DType::kFloat16, DType::kFloat32},
                                    {DType::kBFloat16, DType::kBFloat16},
                                    {DType::kBFloat16, DType::kFloat32}};

// How the rows lie in memory. Every operand has gaps of its own size.
struct Rows {
  const char* name;
  std::vector<int64_t> sizes;  // of the leading dimensions
  std::vector<int>
      order;    // of the leading dimensions in memory, outermost first; an input has stride 0 in those not named
  int padding;  // how many dimensions, counted from the innermost, have a gap before their next index
};

enum class Alignment {
  kWhole,    // every base and every stride is a multiple of 64 bytes, gaps included
  kOffBase,  // the bases of some operands are off by an odd number of elements (Placement), which differs between them
  kOffStride,  // the gaps are one element longer than a multiple of 64 bytes
  kAtEnd,      // every operand ends where its guard page begins, whatever alignment that gives
};

// Where one operand lies in its memory.
struct Placement {
  int odd_elements = 0;        // before the first element, where Alignment is kOffBase
  bool guarded_after = false;  // the guard page follows the operand, else it precedes it
};

// What a target may do in one way or another, without a change to any bit of the result.
struct Variation {
  bool few_threads = false;  // an emulated GPU takes so few threads at once that most calls need several launches
  bool processors =
      false;            // an emulated GPU has multiprocessors to fill, so that few rows are spread over more threads
  uint32_t order = 0;   // of an emulated GPU's blocks, waves and lanes: 0 is first to last, else random by this seed
  uint32_t pieces = 0;  // of the rows, on CPUs: 0 is all at once, else pieces in a random order by this seed
};

enum class Values {
  kNormal,
  kWide,
  kSubnormal,
  kHuge,
  kZeros,
  kNan,
  kInfinity,
  kSpecialWeight,
  // Rows of four kinds, in turns: normal ones; ones of which the sum of g * x is beyond float32, though that of g * n
  // is not (see ops/rms_norm_backward.h); huge ones; zeros.
  kMixedRows
};

struct Case {
  DType dtype, weight_dtype;  // weight_dtype is kOther where there is no weight
  Operands operands;
  bool gemma;
  int64_t hidden;
  Rows rows;
  Alignment alignment;
  Values values;
  double eps;
  uint32_t seed;  // of the values

  Variation variation;
  Placement placements[kOperands];

  bool round_each_step = false;
  bool float32_residual = false;  // so are post and residual_out
  // Options of the gated norm.
  bool gate = false;  // there is a gate
  bool sigmoid = false, norm_before_gate = true;
  int64_t group_size = kWholeRow;
  // Of the gradients.
  DType dout_dtype = DType::kFloat32;
  bool dsum = false;           // there is a dsum
  bool expanded_dout = false;  // all rows of dout are one
  Operand dx_place = kDX;      // whose memory dx takes: an input's, or its own

  int64_t row_count() const;
  int64_t normed() const { return group_size == kWholeRow ? hidden : group_size; }  // elements that share an rstd
  bool has(Operand operand) const;
  DType dtype_of(Operand operand) const;
  DType row_dtype() const;  // of s, by which plans are made
  Held held() const;        // what a GPU's thread holds
  Options options() const;
  const OpInfo& op() const { return *info(operands).op; }
};

// "bfloat16 x, float32 weight, fused, gemma, [3, 2, 2048] slice, ...".
std::string describe(const Case& c);

// So many contiguous, aligned rows of normal values, for tests to change.
Case simple_case(DType dtype, DType weight_dtype, Operands operands, int64_t rows, int64_t hidden);

// Every case that kernels are tried on. First, for each of kDTypePairs: all operands, with gemma and without, at every
// hidden size at which the plan changes or that those models use; what else there is to choose is random. Then, for
// each further variant, cases at one hidden size for each of its kernels, and some more.
std::vector<Case> all_cases();

// So many rows of `c` as one contiguous, aligned block, with nothing in place. The result must equal that of `c` bit
// for bit. The operator is the same if it is gated. Else it is the plain norm, given the sum for x; or, where the sum
// is float32 and x is not, the norm of the sum plus an x of -0. With post_weight for the weight and x for x, the plain
// norm also is the one that x has of its own.
Case plain_case(const Case& c, int64_t rows);

// One case for each variant, that is each kind of call that has kernels of its own. The dtypes, operands and options
// say which; what else a case has is left empty.
std::vector<Case> all_variants();

// The hidden sizes at which the plan for `dtype` takes another kernel, each with its neighbours.
std::vector<int64_t> plan_edges(DType dtype);

const char* dtype_name(DType dtype);

}  // namespace gemma_norm
