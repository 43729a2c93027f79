// The calls that every device's kernels are tried on. Knows nothing of GoogleTest or of any device.
#pragma once

#include <string>
#include <vector>

#include "gpu/tuning.h"
#include "ops/ops.h"

namespace gemma_norm {

// Which operands there are, and whose memory the results take.
enum class Operands {
  kPlain,    // out = norm(x)
  kInPlace,  // x = norm(x)
  kAdd,      // residual_out = x + residual, out = norm(residual_out)
  kAddPost,  // the same with post_residual_addition
  kFused,    // the sum to residual's memory, its norm to x's
  kFusedPost,
  kFusedCrossed,  // the sum to x's memory, its norm to residual's
  kGated,         // out = the norm of x, gated
  kGatedIntoX,    // the same to x's memory
  kGatedIntoGate,
};
inline bool has_residual(Operands o) { return o >= Operands::kAdd && o <= Operands::kFusedCrossed; }
inline bool is_gated(Operands o) { return o >= Operands::kGated; }
inline bool has_post(Operands o) { return o == Operands::kAddPost || o == Operands::kFusedPost; }

// What x and the weight were before there were modes. The cases of these pairs come first and stay as they are.
constexpr DType kDTypePairs[][2] = {{DType::kFloat32, DType::kFloat32},
                                    {DType::kFloat16, DType::kFloat16},
                                    {DType::kFloat16, DType::kFloat32},
                                    {DType::kBFloat16, DType::kBFloat16},
                                    {DType::kBFloat16, DType::kFloat32}};

// How the rows lie in memory. Every operand has its own padding.
struct Rows {
  const char* name;
  std::vector<int64_t> sizes;  // the leading dimensions
  std::vector<int> order;      // of the leading dimensions in memory, outermost first; those not named have stride 0 in inputs
  int padding;                 // the number of dimensions, from the innermost, that have a gap before the next index
};

enum class Alignment {
  kWhole,      // every base and every stride is a multiple of 64 bytes, gaps included
  kOffBase,    // some operands' bases are an odd number of elements off, not all the same
  kOffStride,  // gaps are no multiple of anything
  kAtEnd,      // every operand ends where its guard page begins, whatever alignment that gives
};

enum class Values { kNormal, kWide, kSubnormal, kHuge, kZeros, kNan, kInfinity, kSpecialWeight };

struct Case {
  DType dtype, weight_dtype;  // the weight's is kOther where there is none
  Operands operands;
  bool gemma;
  int64_t hidden;
  Rows rows;
  Alignment alignment;
  Values values;
  double eps;
  uint32_t seed;  // of the values, and of all that a device may vary without changing the result

  bool round_each_step = false;
  bool float32_residual = false;  // and post and residual_out
  // Of the gated norm.
  bool gate = false;  // there is one
  bool sigmoid = false, norm_before_gate = true;
  int64_t group_size = kWholeRow;

  int64_t row_count() const;
  int64_t normed() const { return group_size == kWholeRow ? hidden : group_size; }  // elements that share an rstd
  DType dtype_of(Operand operand) const;
  DType row_dtype() const;  // of s, which is what plans are made by
  Held held() const;        // by a GPU's thread
  Options options() const;
  const OpInfo& op() const;
};

// "bfloat16 x, float32 weight, fused, gemma, [3, 2, 2048] slice, ...".
std::string describe(const Case& c);

// Every one of kDTypePairs, operands and gemma at every hidden size where the plan changes and those models use; the rest at
// random. Then the same for what has come since, at one hidden size for each kernel and some more.
std::vector<Case> all_cases();

// So many rows as one contiguous, aligned block, nothing in place: what `c` must equal bit for bit. Of the same operator where that
// is gated; else the plain norm of the sum, or, where the sum is float32 and x is not, the norm of the sum and an x of -0.
Case plain_case(const Case& c, int64_t rows);

// Every kind of call that has kernels of its own. weight_dtype, operands and what comes after `seed` say which; the rest is empty.
std::vector<Case> all_variants();

// The hidden sizes around which the plan for `dtype` takes another kernel, each with its neighbours.
std::vector<int64_t> plan_edges(DType dtype);

const char* dtype_name(DType dtype);

}  // namespace gemma_norm
