#include "rope_cases.h"

#include <random>

#include "formats.h"

namespace gemma_norm {

std::string describe(const RopeCase& c) {
  constexpr const char* kLayouts[] = {"rows", "gaps", "heads first", "odd strides", "odd base"};
  std::string text = std::string(dtype_name(c.x)) + " x, " + dtype_name(c.weight) + " weight, " + dtype_name(c.angles) +
                     (c.cache ? " cache, " : " angles, ") + std::to_string(c.rotary) + " of " +
                     std::to_string(c.head_dim) + ", heads " + std::to_string(c.heads[0]) + " + " +
                     std::to_string(c.heads[1]) + ", copied " + std::to_string(c.copied[0]) + " + " +
                     std::to_string(c.copied[1]) + ", tokens [";
  for (const int64_t n : c.tokens) text += std::to_string(n) + " ";
  text += std::string("], ") + kLayouts[static_cast<int>(c.layout)];
  for (const auto& [set, what] : std::initializer_list<std::pair<bool, const char*>>{{c.in_place, "in place"},
                                                                                     {c.gemma, "gemma"},
                                                                                     {c.interleaved, "interleaved"},
                                                                                     {c.round_norm, "norm rounded"},
                                                                                     {c.round_rotation, "rounded"},
                                                                                     {c.shared_angles, "shared angles"},
                                                                                     {c.sections == 1, "sections"},
                                                                                     {c.sections == 2, "in turns"},
                                                                                     {c.wide, "wide"}})
    if (set) text += std::string(", ") + what;
  return text + ", seed " + std::to_string(c.seed);
}

std::vector<RopeCase> rope_cases() {
  std::mt19937 random(7);
  const auto one_in = [&](uint32_t n) { return random() % n == 0; };
  constexpr int64_t kSizes[][2] = {{64, 64},   {128, 128}, {256, 64}, {512, 512}, {256, 256}, {80, 80},
                                   {512, 128}, {96, 32},   {128, 24}, {7, 2},     {20, 6},    {500, 250}};
  constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  std::vector<RopeCase> cases;
  for (const DType x : kFloats)
    for (const DType weight : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kOther})
      for (const DType angles : kFloats)
        for (const auto& [head_dim, rotary] : kSizes) {
          const auto fits = [&](DType d) { return d == DType::kFloat32 || d == x; };
          if (!fits(angles) || !(fits(weight) || weight == DType::kOther || x == DType::kFloat32)) continue;
          for (int i = 0; i < 3; ++i) {
            RopeCase c;
            c.x = x, c.weight = weight, c.angles = angles;
            c.head_dim = head_dim, c.rotary = rotary;
            c.layout = i == 1 ? static_cast<Layout>(random() % static_cast<int>(Layout::kLayouts)) : Layout::kRows;
            const std::vector<int64_t> tokens[] = {{}, {1}, {5}, {2, 3}, {2, 1, 2, 2}, {11}};
            c.tokens = tokens[random() % std::size(tokens)];
            c.heads[0] = 1 + random() % 6, c.heads[1] = 1 + random() % 3;
            c.in_place = one_in(2);
            c.cache = one_in(2);
            c.index = one_in(2) ? DType::kInt32 : DType::kInt64;
            c.interleaved = i == 2 || (i == 1 && one_in(3));
            c.shared_angles = !c.cache && !c.tokens.empty() && one_in(3);
            c.sections = c.cache ? random() % 3 : 0;
            c.round_rotation = one_in(2);
            c.gemma = weight != DType::kOther && one_in(2);
            c.round_norm = c.round_rotation && !c.gemma && (weight == x || weight == DType::kOther) && one_in(2);
            c.wide = one_in(3);
            c.guard = one_in(2) ? Guard::kBefore : Guard::kAfter;
            c.seed = static_cast<uint32_t>(random());
            c.variation.few_threads = one_in(3);
            c.variation.processors = one_in(2);
            c.variation.order = random() % 4;
            c.variation.pieces = one_in(2) ? 0 : random();
            if (!c.in_place && one_in(2)) c.copied[0] = random() % 7, c.copied[1] = random() % 4;
            cases.push_back(c);
          }
        }
  RopeCase many;  // more heads than one launch of few threads has
  many.x = many.weight = many.angles = DType::kBFloat16;
  many.tokens = {70};
  many.heads[0] = 128;
  many.variation.few_threads = true;
  cases.push_back(many);
  many.copied[0] = 130;
  cases.push_back(many);
  many.tokens = {21};  // several periods of a launch, and a part of one
  many.heads[0] = 3;
  many.copied[0] = 5, many.copied[1] = 2;
  many.variation.few_threads = false;
  cases.push_back(many);
  return cases;
}

}  // namespace gemma_norm
