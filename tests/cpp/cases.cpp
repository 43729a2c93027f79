#include "cases.h"

#include <algorithm>
#include <random>
#include <set>

#include "gpu/plan.h"

namespace gemma_norm {
namespace {

const std::vector<Rows> kRows = {
    {"vector", {}, {}, 0},
    {"rows", {3}, {0}, 0},
    {"padded rows", {5}, {0}, 1},
    {"expanded rows", {4}, {}, 0},
    {"slice", {3, 2}, {0, 1}, 2},             // q or k of [tokens, heads, head_dim + gate]
    {"transposed slice", {2, 3}, {1, 0}, 2},  // [heads, tokens] of the same
    {"expanded slice", {2, 3}, {1}, 1},
    {"three strides", {2, 1, 2, 2}, {2, 0, 3, 1}, 3},
    {"four strides", {2, 2, 2, 2}, {1, 3, 0, 2}, 4},  // more than a kernel takes: several launches
    {"many rows", {37}, {0}, 0},
    {"many padded rows", {7, 19}, {0, 1}, 2},
};
constexpr int64_t kManyRowsHidden = 600;  // larger rows come in smaller numbers
constexpr int64_t kFewCasesHidden = 20000;

const int64_t kHidden[] = {1,    2,    3,     5,     7,     8,     9,     15,     16,     17,     31,    33,   63,   64,
                           65,   80,   96,    127,   128,   129,   192,   255,    256,    257,    511,   513,  576,  768,
                           1000, 1152, 1536,  2048,  2560,  2816,  3584,  3840,   4095,   4096,   4097,  5120, 5376, 6144,
                           7168, 8192, 12288, 16384, 18432, 65535, 98304, 131072, 200000, 262144, 262147};

}  // namespace

int64_t Case::row_count() const {
  int64_t count = 1;
  for (const int64_t size : rows.sizes) count *= size;
  return count;
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "other"};
  return kNames[static_cast<int>(dtype)];
}

std::string describe(const Case& c) {
  constexpr const char* kOperands[] = {"plain", "in place", "add", "add with post", "fused", "fused with post", "fused crossed"};
  constexpr const char* kAlignments[] = {"aligned", "odd base", "odd strides", "flush with the end"};
  constexpr const char* kValues[] = {"normal", "wide", "subnormal", "huge", "zeros", "one NaN", "one infinity", "special weights"};
  std::string shape = "[";
  for (const int64_t size : c.rows.sizes) shape += std::to_string(size) + ", ";
  return std::string(dtype_name(c.dtype)) + " x, " + dtype_name(c.weight_dtype) + " weight, " +
         kOperands[static_cast<int>(c.operands)] + (c.gemma ? ", gemma, " : ", ") + shape + std::to_string(c.hidden) + "] " +
         c.rows.name + ", " + kAlignments[static_cast<int>(c.alignment)] + ", " + kValues[static_cast<int>(c.values)] +
         " values, eps " + std::to_string(c.eps) + ", seed " + std::to_string(c.seed);
}

std::vector<int64_t> plan_edges(DType dtype) {
  const int64_t items = kVectorBytes / size_of(dtype);
  std::vector<int64_t> edges;
  for (const int32_t max_cluster : {1, 8}) {
    const DeviceFacts device{32, int64_t{1} << 42, false, max_cluster};
    LaunchPlan before = make_plan(items, dtype, device);
    for (int64_t hidden = 2 * items; hidden <= 600000; hidden += items) {
      const LaunchPlan plan = make_plan(hidden, dtype, device);
      const bool more = plan.vectors != before.vectors && plan.scope != Scope::kStream;
      if (plan.scope != before.scope || more || plan.max_block_threads != before.max_block_threads)
        for (const int64_t edge : {hidden - items, hidden - items + 1, hidden - 1, hidden, hidden + 1}) edges.push_back(edge);
      before = plan;
    }
  }
  return edges;
}

std::vector<Case> all_cases() {
  constexpr double kEps[] = {1e-6, 1e-6, 1e-5, 1.0, 0.0};
  constexpr Values kValues[] = {Values::kNormal, Values::kNormal, Values::kNormal,    Values::kNormal,
                                Values::kNormal, Values::kWide,   Values::kSubnormal, Values::kHuge,
                                Values::kZeros,  Values::kNan,    Values::kInfinity,  Values::kSpecialWeight};
  std::mt19937 random(1);  // its numbers are the same everywhere, unlike those of std's distributions
  const auto pick = [&](const auto& list) { return list[random() % std::size(list)]; };

  std::vector<Case> cases;
  for (const auto& [dtype, weight_dtype] : kDTypePairs) {
    std::set<int64_t> sizes(std::begin(kHidden), std::end(kHidden));
    for (const int64_t edge : plan_edges(dtype)) sizes.insert(edge);
    for (const int64_t hidden : sizes)
      for (int operands = 0; operands <= static_cast<int>(Operands::kFusedCrossed); ++operands)
        for (const bool gemma : {false, true}) {
          Case c{dtype, weight_dtype, static_cast<Operands>(operands), gemma, hidden, {}, {},
                 {},    {},           static_cast<uint32_t>(random())};
          do c.rows = pick(kRows);
          while (c.row_count() * hidden > std::max<int64_t>(37 * kManyRowsHidden, 3 * hidden));
          const bool large = hidden > kFewCasesHidden;
          c.alignment = large && random() % 2 ? Alignment::kWhole : static_cast<Alignment>(random() % 4);
          c.values = pick(kValues);
          c.eps = pick(kEps);
          // Without eps, squares that are nothing in float32 make an infinite rstd: nothing to compare with.
          if (c.values == Values::kSubnormal && c.eps == 0) c.eps = 1e-6;
          if (!large || random() % 3 == 0) cases.push_back(c);
        }
  }
  return cases;
}

Case plain_case(const Case& c, int64_t rows) {
  Case plain = c;
  plain.operands = Operands::kPlain;
  plain.rows = {"rows", {rows}, {0}, 0};
  plain.alignment = Alignment::kWhole;
  return plain;
}

}  // namespace gemma_norm
