#include "cases.h"

#include <algorithm>
#include <random>
#include <set>

#include "core/check.h"
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
    {"four strides",
     {2, 2, 2, 2},
     {1, 3, 0, 2},
     4},  // more dimensions than a kernel takes, so that there are several launches
    {"many rows", {37}, {0}, 0},
    {"many padded rows", {7, 19}, {0, 1}, 2},
};
constexpr int64_t kManyRowsHidden = 600;    // Longer rows come in smaller numbers.
constexpr int64_t kFewCasesHidden = 20000;  // Of longer rows, a third of the cases is taken.

const int64_t kHidden[] = {1,     2,     3,     5,     7,     8,      9,      15,     16,    17,   31,
                           33,    63,    64,    65,    80,    96,     127,    128,    129,   192,  255,
                           256,   257,   511,   513,   576,   768,    1000,   1152,   1536,  2048, 2560,
                           2816,  3584,  3840,  4095,  4096,  4097,   5120,   5376,   6144,  7168, 8192,
                           12288, 16384, 18432, 65535, 98304, 131072, 200000, 262144, 262147};

constexpr double kEps[] = {1e-6, 1e-6, 1e-5, 1.0, 0.0};
constexpr Values kValues[] = {Values::kNormal, Values::kNormal, Values::kNormal,    Values::kNormal,
                              Values::kNormal, Values::kWide,   Values::kSubnormal, Values::kHuge,
                              Values::kZeros,  Values::kNan,    Values::kInfinity,  Values::kSpecialWeight};

bool fits(const Case& c) { return c.row_count() * c.hidden <= std::max<int64_t>(37 * kManyRowsHidden, 3 * c.hidden); }

// Whether check() lets calls like this one through.
bool is_allowed(const Case& c) {
  const int64_t sizes[] = {1, 8}, strides[] = {8, 1};
  Tensor tensors[kOperands];
  Call call{&c.op(), {}, c.options()};
  for (const OperandRule& rule : c.op()) {
    const Operand o = rule.operand;
    const int32_t dims = rule.has_rows() ? 2 : 1;
    tensors[o] = {
        reinterpret_cast<void*>(1024 * (o + 1)), &sizes[2 - dims], &strides[2 - dims], dims, c.dtype_of(o), ""};
    if (o != kPost && (o != kWeight || c.weight_dtype != DType::kOther)) call.tensors[o] = &tensors[o];
  }
  RowParams params;
  RowSlices slices;
  Message message;
  return check(call, &params, &slices, &message) == Status::kOk;
}

// Whether the first part of all_cases() has cases of this variant.
bool is_in_first_part(const Case& c) {
  for (const auto& [x, weight] : kDTypePairs)
    if (c.dtype == x && c.weight_dtype == weight)
      return !c.round_each_step && !c.float32_residual && !is_gated(c.operands) && !norms_x(c.operands);
  return false;
}

// The lengths of rows, in vectors of 16 bytes, for which a GPU's plan takes one kernel.
struct KernelRange {
  int32_t kernel;
  int64_t first, last;
};
std::vector<KernelRange> kernel_ranges(const Case& c, const DeviceFacts& device) {
  const int64_t items = kVectorBytes / size_of(c.row_dtype());
  std::vector<KernelRange> ranges;
  for (int64_t vectors = 1; vectors <= 66000; ++vectors) {
    const LaunchPlan plan = make_plan(vectors * items, c.row_dtype(), device, c.held());
    if (ranges.empty() || plan.kernel != ranges.back().kernel) ranges.push_back({plan.kernel, vectors, vectors});
    ranges.back().last = vectors;
  }
  return ranges;
}

// Draws what does not change the result. It has random numbers of its own, so that it does not change which cases there
// are.
void vary(Case* c) {
  std::mt19937 random(c->seed);
  const auto one_in = [&](uint32_t n) { return random() % n == 0; };
  c->variation.few_threads = one_in(2);
  c->variation.processors = one_in(2);
  c->variation.order = random() % 4;
  c->variation.pieces = one_in(4) ? 0 : random();
  for (Placement& placement : c->placements) {
    placement.odd_elements = one_in(2) ? 0 : 1 + 2 * static_cast<int>(random() % 4);
    placement.guarded_after = one_in(2);
  }
}

// Cases of one of all_variants().
class VariantCases {
  template <class List>
  auto pick(const List& list) {
    return list[random_() % std::size(list)];
  }

 public:
  VariantCases(const Case& variant, std::mt19937* random, std::vector<Case>* cases)
      : variant_(variant), items_(kVectorBytes / size_of(variant.row_dtype())), random_(*random), cases_(*cases) {}

  void add_all() {
    for (const int32_t max_cluster : {1, kMaxCluster})
      for (const KernelRange& range : kernel_ranges(variant_, {32, int64_t{1} << 42, false, max_cluster}))
        if (max_cluster == 1 || kKernels[range.kernel].scope == Scope::kCluster) add_kernel(range);
    // Rows that are spread: over two threads a slot, of one vector each; then over clusters, with 2, 4 and 8 vectors a
    // thread.
    for (const int64_t vectors : {32, 512, 1024, 2048}) add_spread(vectors);
    for (int i = 0; i < 7; ++i) {
      Case c = draw(pick(kHidden));
      while (c.hidden > kFewCasesHidden) c = draw(pick(kHidden));
      c.alignment = static_cast<Alignment>(random_() % 4);
      add(c);
    }
  }

 private:
  int64_t between(int64_t first, int64_t last) { return first + static_cast<int64_t>(random_() % (last - first + 1)); }

  // Two cases of the range: one aligned, one not. The row is the shortest or longest of the range more often than not;
  // in a range of long rows, it is little longer than the shortest.
  void add_kernel(const KernelRange& range) {
    const bool large = range.last * items_ > kFewCasesHidden;
    const int64_t last = large ? range.first + range.first / 16 : range.last;
    const int64_t vectors[] = {range.first, last, between(range.first, last)};
    Case c = draw(pick(vectors) * items_);
    c.alignment = Alignment::kWhole;
    add(c);

    c = draw(pick(vectors) * items_);
    if (random_() % 2) c.hidden -= between(0, items_ - 1);
    c.alignment = c.hidden % items_ ? static_cast<Alignment>(random_() % 4) : Alignment::kOffBase;
    c.placements[kX].odd_elements |= 1;
    add(c);
  }

  // Few enough rows, of enough bytes each, that a GPU with many processors spreads them.
  void add_spread(int64_t vectors) {
    Case c = draw((vectors - between(0, vectors / 16)) * items_);
    if (has_residual(c.operands) && !norms_x(c.operands))
      c.operands = random_() % 2 ? Operands::kAddPost : Operands::kFusedPost;
    c.gate = is_gated(c.operands);
    c.rows = kRows[1];
    c.alignment = Alignment::kWhole;
    c.variation.processors = true;
    add(c);
  }

  // A case of the variant without rows and alignment.
  Case draw(int64_t hidden) {
    Case c = variant_;
    c.hidden = hidden;
    c.values = pick(kValues);
    c.eps = pick(kEps);
    c.seed = static_cast<uint32_t>(random_());
    vary(&c);
    const bool adds = has_residual(c.operands);
    if (is_gated(c.operands)) {
      c.gate = random_() % 6 != 0;
      c.sigmoid = random_() % 3 == 0;
      c.operands = static_cast<Operands>(static_cast<int>(Operands::kGated) + random_() % (c.gate ? 3 : 2));
    } else {
      c.gemma = c.weight_dtype != DType::kOther && !c.round_each_step && random_() % 2;
      const bool norm_adds = norms_x(c.operands);
      const int count = !adds || norm_adds   ? 2
                        : c.float32_residual ? 4
                                             : 5,
                first = static_cast<int>(norm_adds ? Operands::kNormAdd
                                         : adds    ? Operands::kAdd
                                                   : Operands::kPlain);
      c.operands = static_cast<Operands>(first + random_() % count);
    }
    // Where squares underflow to 0 in float32, eps = 0 makes rstd infinite, and there is nothing to compare with.
    if (c.eps == 0 && (c.values == Values::kSubnormal || !c.norm_before_gate)) c.eps = 1e-6;
    return c;
  }

  // Gives the case its rows, and cuts some rows into groups. So far, `hidden` is the length of one group.
  void add(Case c) {
    if (is_gated(c.operands) && c.hidden <= kFewCasesHidden && random_() % 3 == 0) {
      c.group_size = c.hidden;
      c.hidden *= between(1, 4);
    }
    if (c.hidden > 3 * kFewCasesHidden && random_() % 2) c.rows = kRows[0];
    while (!c.rows.name || !fits(c)) c.rows = pick(kRows);
    cases_.push_back(c);
  }

  const Case variant_;
  const int64_t items_;
  std::mt19937& random_;
  std::vector<Case>& cases_;
};

}  // namespace

std::vector<int64_t> plan_edges(DType dtype) {
  const int64_t items = kVectorBytes / size_of(dtype);
  std::vector<int64_t> edges;
  for (const int32_t max_cluster : {1, 8}) {
    const DeviceFacts device{32, int64_t{1} << 42, false, max_cluster};
    LaunchPlan before = make_plan(items, dtype, device);
    for (int64_t hidden = 2 * items; hidden <= 600000; hidden += items) {
      const LaunchPlan plan = make_plan(hidden, dtype, device);
      const bool more = plan.vectors != before.vectors && plan.scope != Scope::kTwoPasses;
      if (plan.scope != before.scope || more || plan.max_block_threads != before.max_block_threads)
        for (const int64_t edge : {hidden - items, hidden - items + 1, hidden - 1, hidden, hidden + 1})
          edges.push_back(edge);
      before = plan;
    }
  }
  return edges;
}

std::vector<Case> all_cases() {
  std::mt19937 random(1);  // Its numbers are the same everywhere, unlike those of std's distributions.
  const auto pick = [&](const auto& list) { return list[random() % std::size(list)]; };

  std::vector<Case> cases;
  for (const auto& [dtype, weight_dtype] : kDTypePairs) {
    std::set<int64_t> sizes(std::begin(kHidden), std::end(kHidden));
    for (const int64_t edge : plan_edges(dtype)) sizes.insert(edge);
    for (const int64_t hidden : sizes)
      for (int operands = 0; operands <= static_cast<int>(Operands::kFusedCrossed); ++operands)
        for (const bool gemma : {false, true}) {
          Case c = simple_case(dtype, weight_dtype, static_cast<Operands>(operands), 0, hidden);
          c.gemma = gemma;
          c.seed = static_cast<uint32_t>(random());
          vary(&c);
          do c.rows = pick(kRows);
          while (!fits(c));
          const bool large = hidden > kFewCasesHidden;
          c.alignment = large && random() % 2 ? Alignment::kWhole : static_cast<Alignment>(random() % 4);
          c.values = pick(kValues);
          c.eps = pick(kEps);
          // Where squares underflow to 0 in float32, eps = 0 makes rstd infinite, and there is nothing to compare with.
          if (c.values == Values::kSubnormal && c.eps == 0) c.eps = 1e-6;
          if (!large || random() % 3 == 0) cases.push_back(c);
        }
  }

  std::mt19937 random_of_variants(2);
  for (const Case& variant : all_variants())
    if (!is_in_first_part(variant)) VariantCases(variant, &random_of_variants, &cases).add_all();
  return cases;
}

std::vector<Case> all_variants() {
  constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  std::vector<Case> variants;
  for (const Operands operands : {Operands::kPlain, Operands::kAdd, Operands::kGated, Operands::kNormAdd})
    for (const DType dtype : kFloats)
      for (const DType weight_dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kOther})
        for (const bool norm_before_gate : {true, false})
          for (const bool float32_residual : {false, true})
            for (const bool round_each_step : {false, true}) {
              // Options that change nothing make no variant.
              if (round_each_step && (dtype == DType::kFloat32 || weight_dtype == DType::kOther)) continue;
              if (float32_residual && (!has_residual(operands) || norms_x(operands) || dtype == DType::kFloat32))
                continue;
              if (!norm_before_gate && !is_gated(operands)) continue;
              Case c{};
              c.dtype = dtype;
              c.weight_dtype = weight_dtype;
              c.operands = operands;
              c.round_each_step = round_each_step;
              c.float32_residual = float32_residual;
              c.norm_before_gate = norm_before_gate;
              if (is_allowed(c)) variants.push_back(c);
            }
  return variants;
}

}  // namespace gemma_norm
