// The calls on which qk_norm_rope is tried on every device, and what must be true of each.
#pragma once

#include <string>
#include <vector>

#include "target.h"

namespace gemma_norm {

// How the heads of q, k and their results lie in memory.
enum class Layout { kRows, kGaps, kHeadsFirst, kOddStrides, kOddBase, kLayouts };

struct RopeCase {
  DType x = DType::kFloat32, weight = DType::kFloat32, angles = DType::kFloat32, index = DType::kInt64;
  int64_t head_dim = 64, rotary = 64;
  std::vector<int64_t> tokens = {3};
  int64_t heads[2] = {4, 2};
  int64_t copied[2] = {0, 0};  // heads of a gate and of v; in place, none
  Layout layout = Layout::kRows;
  bool in_place = false, cache = false, gemma = false, interleaved = false, round_norm = false, round_rotation = false;
  bool shared_angles = false;  // those of the first dimension's tokens are one: stride 0
  int sections = 0;            // 0: one position; 1: one section after another; 2: in turns
  bool wide = false;           // values of all sizes, NaN and infinity among them
  Guard guard = Guard::kAfter;
  uint32_t seed = 0;
  Variation variation;

  int64_t token_count() const {
    int64_t count = 1;
    for (const int64_t n : tokens) count *= n;
    return count;
  }
};

std::string describe(const RopeCase& c);

// Every pair of dtypes, with heads for which kernels differ, and whatever else there is at random.
std::vector<RopeCase> rope_cases();

// Each returns "" or what is wrong.
//
// Where its norm is rounded, or is float32, the operator must have the bits of the target's own rms_norm followed by
// the rotation in the host's arithmetic. Where it is rounded once, it must be within the error of float32's arithmetic.
// No byte beside the results may change.
std::string check_rope(Target& target, const RopeCase& c);
// Both targets must have the same bits. A hash of them goes to `hash`, unless it is null.
std::string compare_ropes(Target& a, Target& b, const RopeCase& c, uint64_t* hash = nullptr);
// Runs the call without a look at its results.
std::string run_rope(Target& target, const RopeCase& c);

}  // namespace gemma_norm
