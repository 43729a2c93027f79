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

constexpr double kEps[] = {1e-6, 1e-6, 1e-5, 1.0, 0.0};
constexpr Values kValues[] = {Values::kNormal, Values::kNormal, Values::kNormal,    Values::kNormal,
                              Values::kNormal, Values::kWide,   Values::kSubnormal, Values::kHuge,
                              Values::kZeros,  Values::kNan,    Values::kInfinity,  Values::kSpecialWeight};

bool fits(const Case& c) { return c.row_count() * c.hidden <= std::max<int64_t>(37 * kManyRowsHidden, 3 * c.hidden); }

// Does check() let calls like this one through?
bool is_allowed(const Case& c) {
  const int64_t sizes[] = {1, 8}, strides[] = {8, 1};
  Tensor tensors[kOperands];
  Call call{&c.op(), {}, c.options()};
  for (const OperandRule& rule : c.op()) {
    const Operand o = rule.operand;
    const int32_t dims = rule.has_rows() ? 2 : 1;
    tensors[o] = {reinterpret_cast<void*>(1024 * (o + 1)), &sizes[2 - dims], &strides[2 - dims], dims, c.dtype_of(o), ""};
    if (o != kPost && (o != kWeight || c.weight_dtype != DType::kOther)) call.tensors[o] = &tensors[o];
  }
  RowParams params;
  RowSlices slices;
  Message message;
  return check(call, &params, &slices, &message) == Status::kOk;
}

bool is_of_old(const Case& c) {
  for (const auto& [x, weight] : kDTypePairs)
    if (c.dtype == x && c.weight_dtype == weight) return !c.round_each_step && !c.float32_residual && !is_gated(c.operands);
  return false;
}

// The rows, in vectors of 16 bytes, that a GPU's plan gives one kernel.
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
    // One a thread, of two threads a slot; then 2, 4 and 8 a thread, over clusters.
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

  // A row of the range, at either end of it more often than not, but not much more than the smallest of large ones.
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
    c.seed |= 1 << kX;  // at an odd element
    add(c);
  }

  // Few enough rows of enough bytes, on a GPU with processors (see EmulatedTarget).
  void add_spread(int64_t vectors) {
    Case c = draw((vectors - between(0, vectors / 16)) * items_);
    if (has_residual(c.operands)) c.operands = random_() % 2 ? Operands::kAddPost : Operands::kFusedPost;
    c.gate = is_gated(c.operands);
    c.rows = kRows[1];
    c.alignment = Alignment::kWhole;
    c.seed |= 8;
    add(c);
  }

  // But for its rows and alignment.
  Case draw(int64_t hidden) {
    Case c = variant_;
    c.hidden = hidden;
    c.values = pick(kValues);
    c.eps = pick(kEps);
    c.seed = static_cast<uint32_t>(random_());
    const bool adds = has_residual(c.operands);
    if (is_gated(c.operands)) {
      c.gate = random_() % 6 != 0;
      c.sigmoid = random_() % 3 == 0;
      c.operands = static_cast<Operands>(static_cast<int>(Operands::kGated) + random_() % (c.gate ? 3 : 2));
    } else {
      c.gemma = c.weight_dtype != DType::kOther && !c.round_each_step && random_() % 2;
      const int count = !adds ? 2 : c.float32_residual ? 4 : 5, first = static_cast<int>(adds ? Operands::kAdd : Operands::kPlain);
      c.operands = static_cast<Operands>(first + random_() % count);
    }
    // Without eps, squares that are nothing in float32 make an infinite rstd: nothing to compare with.
    if (c.eps == 0 && (c.values == Values::kSubnormal || !c.norm_before_gate)) c.eps = 1e-6;
    return c;
  }

  // `hidden` is of one group so far.
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

int64_t Case::row_count() const {
  int64_t count = 1;
  for (const int64_t size : rows.sizes) count *= size;
  return count;
}

DType Case::dtype_of(Operand operand) const {
  switch (operand) {
    case kWeight: return weight_dtype;
    case kResidual:
    case kPost:
    case kResidualOut: return float32_residual ? DType::kFloat32 : dtype;
    default: return dtype;
  }
}

DType Case::row_dtype() const { return float32_residual || !norm_before_gate ? DType::kFloat32 : dtype; }

Held Case::held() const {
  if (is_gated(operands)) return Held::kRowAndGates;
  if (has_residual(operands)) return Held::kTwoRows;
  return weight_dtype != DType::kOther && size_of(weight_dtype) > size_of(row_dtype()) ? Held::kRowWideWeights : Held::kRow;
}

Options Case::options() const { return {eps, gemma, round_each_step, sigmoid, norm_before_gate, group_size}; }

const OpInfo& Case::op() const {
  return is_gated(operands) ? GatedRmsNorm::kInfos[0] : has_residual(operands) ? AddRmsNorm::kInfos[0] : RmsNorm::kInfos[0];
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "no"};
  return kNames[static_cast<int>(dtype)];
}

std::string describe(const Case& c) {
  constexpr const char* kOperands[] = {
      "plain",           "in place",      "add",   "add with post",       "fused",
      "fused with post", "fused crossed", "gated", "gated in place of x", "gated in place of the gate"};
  constexpr const char* kAlignments[] = {"aligned", "odd base", "odd strides", "flush with the end"};
  constexpr const char* kValues[] = {"normal", "wide", "subnormal", "huge", "zeros", "one NaN", "one infinity", "special weights"};
  std::string shape = "[";
  for (const int64_t size : c.rows.sizes) shape += std::to_string(size) + ", ";
  std::string how = kOperands[static_cast<int>(c.operands)];
  if (c.gemma) how += ", gemma";
  if (c.round_each_step) how += ", rounded at each step";
  if (c.float32_residual) how += ", float32 residual";
  if (is_gated(c.operands)) {
    how += !c.gate ? ", no gate" : c.sigmoid ? ", sigmoid" : ", silu";
    how += c.norm_before_gate ? ", norm first" : ", gate first";
    if (c.group_size != kWholeRow) how += ", groups of " + std::to_string(c.group_size);
  }
  return std::string(dtype_name(c.dtype)) + " x, " + dtype_name(c.weight_dtype) + " weight, " + how + ", " + shape +
         std::to_string(c.hidden) + "] " + c.rows.name + ", " + kAlignments[static_cast<int>(c.alignment)] + ", " +
         kValues[static_cast<int>(c.values)] + " values, eps " + std::to_string(c.eps) + ", seed " + std::to_string(c.seed);
}

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
        for (const int64_t edge : {hidden - items, hidden - items + 1, hidden - 1, hidden, hidden + 1}) edges.push_back(edge);
      before = plan;
    }
  }
  return edges;
}

std::vector<Case> all_cases() {
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
          while (!fits(c));
          const bool large = hidden > kFewCasesHidden;
          c.alignment = large && random() % 2 ? Alignment::kWhole : static_cast<Alignment>(random() % 4);
          c.values = pick(kValues);
          c.eps = pick(kEps);
          // Without eps, squares that are nothing in float32 make an infinite rstd: nothing to compare with.
          if (c.values == Values::kSubnormal && c.eps == 0) c.eps = 1e-6;
          if (!large || random() % 3 == 0) cases.push_back(c);
        }
  }

  std::mt19937 random_of_variants(2);
  for (const Case& variant : all_variants())
    if (!is_of_old(variant)) VariantCases(variant, &random_of_variants, &cases).add_all();
  return cases;
}

std::vector<Case> all_variants() {
  constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  std::vector<Case> variants;
  for (const Operands operands : {Operands::kPlain, Operands::kAdd, Operands::kGated})
    for (const DType dtype : kFloats)
      for (const DType weight_dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kOther})
        for (int options = 0; options < 8; ++options) {
          Case c{};
          c.dtype = dtype;
          c.weight_dtype = weight_dtype;
          c.operands = operands;
          c.round_each_step = options & 1;
          c.float32_residual = options & 2;
          c.norm_before_gate = !(options & 4);
          const bool same = (c.round_each_step && (dtype == DType::kFloat32 || weight_dtype == DType::kOther)) ||
                            (c.float32_residual && (!has_residual(operands) || dtype == DType::kFloat32)) ||
                            (!c.norm_before_gate && !is_gated(operands));  // as without
          if (!same && is_allowed(c)) variants.push_back(c);
        }
  return variants;
}

Case plain_case(const Case& c, int64_t rows) {
  Case plain = c;
  plain.operands = is_gated(c.operands) ? Operands::kGated : c.float32_residual ? Operands::kAdd : Operands::kPlain;
  plain.rows = {"rows", {rows}, {0}, 0};
  plain.alignment = Alignment::kWhole;
  return plain;
}

}  // namespace gemma_norm
