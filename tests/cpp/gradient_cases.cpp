#include "gradient_cases.h"

#include <algorithm>
#include <iterator>
#include <random>
#include <set>

#include "gpu/backward_plan.h"

namespace gemma_norm {
namespace {

constexpr DType kNone = DType::kOther;

// How few rows lie in memory, see Rows.
const std::vector<Rows> kFewRows = {
    {"vector", {}, {}, 0},
    {"row", {1}, {0}, 0},
    {"rows", {2}, {0}, 0},
    {"padded rows", {3}, {0}, 1},
    {"rows", {11}, {0}, 0},
    {"expanded rows", {4}, {}, 0},
    {"slice", {3, 2}, {0, 1}, 2},
    {"transposed slice", {2, 3}, {1, 0}, 2},
    {"expanded slice", {2, 3}, {1}, 1},
    {"four strides", {2, 1, 2, 2, 2}, {2, 4, 0, 1, 3}, 5},  // several launches, each with chunks of its own
};
// The same where rows are short.
const std::vector<Rows> kMoreRows = {
    {"rows", {300}, {0}, 0},
    {"padded slice", {7, 41}, {0, 1}, 2},
    {"transposed slice", {29, 10}, {1, 0}, 2},
    {"four strides", {3, 5, 4, 3}, {1, 3, 0, 2}, 4},
};
constexpr int64_t kMostVectorsOfMany = 640;  // The gated norm's longer rows would take much time, and are unusual.
constexpr int64_t kShortRow = 300, kLongRow = 2500;

constexpr double kEps[] = {1e-6, 1e-5, 1.0, 0.0};
constexpr Values kValues[] = {Values::kNormal,    Values::kNormal,    Values::kWide, Values::kMixedRows,
                              Values::kNormal,    Values::kNormal,    Values::kHuge, Values::kMixedRows,
                              Values::kSubnormal, Values::kMixedRows, Values::kNan,  Values::kInfinity,
                              Values::kZeros,     Values::kNormal,    Values::kWide, Values::kSpecialWeight};

std::vector<DType> weight_dtypes(DType x) {
  if (x == DType::kFloat32) return {DType::kFloat32, DType::kFloat16, DType::kBFloat16, kNone};
  return {x, DType::kFloat32, kNone};
}

int64_t items_of(DType x) { return kVectorBytes / size_of(x); }

// Draws cases. Its numbers are the same everywhere, unlike those of std's distributions.
class Drawing {
  const bool gated_;

  template <class List>
  auto pick(const List& list) {
    return list[random_() % std::size(list)];
  }

 public:
  explicit Drawing(bool gated) : gated_(gated) {}

  Case draw(const DType (&dtypes)[2], int64_t hidden) {
    Case c = simple_gradient_case(dtypes[0], dtypes[1], 1, hidden);
    std::vector<DType> weights = weight_dtypes(c.dtype);
    if (gated_) weights.pop_back();  // It needs one.
    c.weight_dtype = weights[count_++ % weights.size()];
    c.gemma = c.weight_dtype != kNone && one_in(2);
    c.operands = c.weight_dtype != kNone && !one_in(4) ? Operands::kGradients : Operands::kInputGradients;
    c.dsum = one_in(2);
    if (gated_) {
      c.operands = has_dweight(c.operands) ? Operands::kGatedGradients : Operands::kGatedInputGradients;
      c.gemma = c.dsum = false;
      c.gate = true;
      c.sigmoid = one_in(3);
      c.norm_before_gate = one_in(2);
    }
    c.expanded_dout = one_in(5);
    c.seed = static_cast<uint32_t>(random_());
    c.variation.order = random_() % 4;
    c.variation.pieces = one_in(4) ? 0 : random_();
    for (Placement& placement : c.placements) {
      placement.odd_elements = one_in(2) ? 0 : 1 + 2 * static_cast<int>(random_() % 4);
      placement.guarded_after = one_in(2);
    }
    return c;
  }

  Case draw_few_rows(const DType (&dtypes)[2], int64_t hidden) {
    Case c = draw(dtypes, hidden);
    c.rows = hidden <= kShortRow && one_in(2) ? pick(kMoreRows) : pick(kFewRows);
    // Most cases must be aligned, since only these reach the kernels that hold rows in a block.
    c.alignment = one_in(2) ? Alignment::kWhole : static_cast<Alignment>(random_() % 4);
    c.values = kValues[count_ / 2 % std::size(kValues)];
    c.eps = pick(kEps);
    // Where squares underflow to 0 in float32, eps = 0 makes rstd infinite, and there is nothing to compare with.
    if (c.eps == 0 && (c.values == Values::kSubnormal || !c.norm_before_gate)) c.eps = 1e-6;
    if (gated_ && hidden <= kLongRow && one_in(3)) group(&c, 1 + below(4));
    if (one_in(4)) {
      constexpr Operand kPlaces[] = {kX, kDOut, kDSum};
      const Operand place = pick(kPlaces);
      if (c.has(place) && c.dtype_of(place) == c.dtype) c.dx_place = place;
    }
    if (c.dx_place == kDOut) c.expanded_dout = false;
    return c;
  }

  // Makes each row so many groups of its length.
  static void group(Case* c, int64_t groups) {
    c->group_size = c->hidden;
    c->hidden *= groups;
  }

  bool one_in(uint32_t n) { return random_() % n == 0; }
  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % n); }

 private:
  std::mt19937 random_{4};
  size_t count_ = 0;
};

std::vector<int64_t> hidden_sizes(DType x) {
  const int64_t items = items_of(x);
  std::set<int64_t> sizes = {1, 2, 3, items - 1, items, items + 1, 12 * items, 12 * items + 1};
  for (const BackwardTuning& kernel : kBackwardKernels) {
    if (kernel.row_vectors == INT64_MAX) continue;
    const int64_t edge = kernel.row_vectors * items;
    for (const int64_t size : {edge - items, edge - 1, edge, edge + 1, edge + items}) sizes.insert(size);
  }
  sizes.insert(3 * kTwoPassSlots * items * 2);  // several vectors a thread, in two passes
  return {sizes.begin(), sizes.end()};
}

}  // namespace

Case simple_gradient_case(DType dtype, DType dout_dtype, int64_t rows, int64_t hidden) {
  Case c = simple_case(dtype, dtype, Operands::kGradients, rows, hidden);
  c.dout_dtype = dout_dtype;
  return c;
}

std::vector<Case> few_rows_gradient_cases(bool gated) {
  Drawing drawing(gated);
  std::vector<Case> cases;
  for (size_t d = 0; d < (gated ? kGatedGradientDTypes : std::size(kGradientDTypes)); ++d)
    for (const int64_t hidden : hidden_sizes(kGradientDTypes[d][0]))
      for (int i = 0; i < (hidden <= (gated ? kShortRow : kLongRow) ? 2 : 1); ++i)
        cases.push_back(drawing.draw_few_rows(kGradientDTypes[d], hidden));
  return cases;
}

std::vector<Case> many_rows_gradient_cases(bool gated) {
  Drawing drawing(gated);
  std::vector<Case> cases;
  size_t turn = 0;
  int64_t last_row_vectors = 3;  // Of the shortest rows, those of 4 vectors are taken.
  for (const BackwardTuning& kernel : kBackwardKernels) {
    for (const bool aligned : {true, false}) {
      if (!aligned && kernel.scope == Scope::kBlock) continue;
      if (gated && aligned && kernel.row_vectors > kMostVectorsOfMany) continue;
      const auto& dtypes = kGradientDTypes[turn++ % (gated ? kGatedGradientDTypes : std::size(kGradientDTypes))];
      const int64_t items = items_of(dtypes[0]);
      // In two passes, also shorter rows that are not aligned.
      int64_t hidden = (last_row_vectors + 1) * items;
      if (!aligned) hidden = kernel.scope == Scope::kTwoPasses ? 70 * items + 1 : hidden - 1;
      Case c = drawing.draw(dtypes, hidden);
      if (c.weight_dtype == kNone) c.weight_dtype = c.dtype;
      c.operands = gated ? Operands::kGatedGradients : Operands::kGradients;

      RowParams p{};
      p.hidden = hidden;
      p.dtypes[kX] = c.dtype;
      p.rows = 1;
      const BackwardPlan plan = make_backward_plan(p, aligned, 32);
      const int64_t at_a_time = int64_t{kernel.chunks} * plan.groups() * std::max(kernel.of[gated].rows, 1);
      const int64_t rows = 2 * at_a_time + 1 + drawing.below(at_a_time / 2);
      if (turn % 3 == 0)
        c.rows = {"many rows", {rows}, {0}, 0};
      else if (turn % 3 == 1)
        c.rows = {"many padded rows", {rows / 5 + 1, 5}, {0, 1}, 2};
      else
        c.rows = {"many padded rows", {3, rows / 3 + 1}, {0, 1}, 2};
      if (gated && turn % 2) {  // Each chunk has rows of one group.
        c.rows.sizes.back() = c.rows.sizes.back() / 3 + 1;
        Drawing::group(&c, 3);
      }
      cases.push_back(c);
    }
    last_row_vectors = kernel.row_vectors;
  }
  return cases;
}

std::vector<Case> two_rows_gradient_cases(bool gated) {
  Drawing drawing(gated);
  std::vector<Case> cases;
  for (size_t d = 0; d < (gated ? kGatedGradientDTypes : std::size(kGradientDTypes)); ++d) {
    int64_t last_row_vectors = 0;
    for (const BackwardTuning& kernel : kBackwardKernels) {
      if (!has_one_row_kernel(kernel)) continue;
      Case c = drawing.draw(kGradientDTypes[d], (last_row_vectors + 1) * items_of(kGradientDTypes[d][0]));
      last_row_vectors = kernel.row_vectors;
      RowParams p{};
      p.hidden = c.hidden;
      p.dtypes[kX] = c.dtype;
      p.rows = 1;
      c.rows = {"rows", {int64_t{kernel.chunks} * make_backward_plan(p, true, 32).groups() + 2}, {0}, 0};
      c.alignment = Alignment::kWhole;
      cases.push_back(c);
    }
  }
  return cases;
}

std::vector<Case> grouped_gradient_cases() {
  Drawing drawing(true);
  std::vector<Case> cases;
  for (const auto& [row_vectors, groups] : {std::pair{128, 6}, {512, 2}}) {
    Case c = drawing.draw(kGradientDTypes[0], row_vectors * items_of(kGradientDTypes[0][0]));
    c.operands = Operands::kGatedGradients;
    c.rows = {"rows", {100}, {0}, 0};
    c.alignment = Alignment::kWhole;
    Drawing::group(&c, groups);
    cases.push_back(c);
  }
  return cases;
}

std::vector<Case> gradient_cases() {
  std::vector<Case> cases;
  for (const bool gated : {false, true})
    for (const auto& some :
         {few_rows_gradient_cases(gated), two_rows_gradient_cases(gated), many_rows_gradient_cases(gated)})
      cases.insert(cases.end(), some.begin(), some.end());
  for (const Case& c : grouped_gradient_cases()) cases.push_back(c);
  return cases;
}

}  // namespace gemma_norm
