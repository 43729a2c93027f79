// The exponential and the activations of gates, by a float's arithmetic, beside double's.
#include "device/exponential.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "device/platform.h"
#include "formats.h"

namespace gemma_norm {
namespace {

using device::as_bits;
using device::as_float;
using device::Scalar;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kBounds[] = {0.9, 1, 3.2};  // units in the last place: of the exponential, the reciprocal and the activations

// How far `got` is off, in units in the last place of the float32 that is next to `want`.
double units(double want, float got) { return std::fabs(got - want) / ulp(DType::kFloat32, want); }

// The most of any, and where.
struct Worst {
  double units = 0;
  float at = 0;
  void add(double u, float v) {
    if (!(u <= units)) units = u, at = v;
  }
};

// Calls visit(f) for every `step`-th float32 from `first` to `last`, both positive and with them.
template <class Visit>
void each_float(float first, float last, uint32_t step, const Visit& visit) {
  for (uint64_t bits = as_bits(first); bits <= as_bits(last); bits += step) visit(as_float(static_cast<uint32_t>(bits)));
}

Worst worst_exponential(float first, float last, uint32_t step) {
  Worst worst;
  each_float(first, last, step, [&](float t) {
    worst.add(units(0x1p64 * std::exp(-static_cast<double>(t)), formulas::scaled_exponential<Scalar>(t)), t);
  });
  return worst;
}

TEST(Exponential, IsNearForEveryNumber) {
  const Worst worst = worst_exponential(0x1p-4f, 125, 1);
  std::printf("the exponential is off by %.3f units in the last place at %a\n", worst.units, worst.at);
  EXPECT_LE(worst.units, kBounds[0]) << std::hexfloat << worst.at;
}

TEST(Exponential, IsNearForSmallNumbers) {
  const Worst worst = worst_exponential(0, 0x1p-4f, 997);
  EXPECT_LE(worst.units, kBounds[0]) << std::hexfloat << worst.at;
  EXPECT_EQ(0x1p64f, formulas::scaled_exponential<Scalar>(0.0f));
}

TEST(Reciprocal, IsNearForEveryNumber) {
  Worst worst;
  each_float(1, 2, 1, [&](float d) { worst.add(units(1 / static_cast<double>(d), formulas::reciprocal<Scalar>(d)), d); });
  std::printf("the reciprocal is off by %.3f units in the last place at %a\n", worst.units, worst.at);
  EXPECT_LE(worst.units, kBounds[1]) << std::hexfloat << worst.at;
}

class Activation : public testing::TestWithParam<bool> {
 protected:
  static float got(float g) { return GetParam() ? formulas::activation<Scalar, true>(g) : formulas::activation<Scalar, false>(g); }
  static double want(float g) { return (GetParam() ? 1.0 : g) / (1 + std::exp(-static_cast<double>(g))); }

  // Of g and -g. A result that is subnormal may be off by one of its units more, as it is rounded twice.
  void add(float magnitude) {
    for (const float g : {magnitude, -magnitude}) {
      const double exact = want(g), off = units(exact, got(g));
      (std::fabs(exact) < kLeastNormal ? tiny_ : worst_).add(off, g);
      signs_ = signs_ && std::signbit(got(g)) == std::signbit(exact);
    }
  }
  void expect_near() {
    std::printf("%s is off by %.3f units in the last place at %a, by %.3f at %a where it is subnormal\n",
                GetParam() ? "sigmoid" : "silu", worst_.units, worst_.at, tiny_.units, tiny_.at);
    EXPECT_LE(worst_.units, kBounds[2]) << std::hexfloat << worst_.at;
    EXPECT_LE(tiny_.units, kBounds[2] + 1) << std::hexfloat << tiny_.at;
    EXPECT_TRUE(signs_);
  }

 private:
  static constexpr float kLeastNormal = std::numeric_limits<float>::min();
  Worst worst_, tiny_;
  bool signs_ = true;
};

TEST_P(Activation, IsNearForEveryNumberOfSixteenBits) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16})
    for (uint32_t bits = 0; std::isfinite(element(dtype, bits)); ++bits) add(static_cast<float>(element(dtype, bits)));
  expect_near();
}

TEST_P(Activation, IsNearForFloat32) {
  each_float(0, std::numeric_limits<float>::max(), 211, [&](float g) { add(g); });
  expect_near();
}

// Where all but exponentials of every kind of rounding lie, and where results become subnormal and zero.
TEST_P(Activation, IsNearWhereItIsUsed) {
  each_float(0x1p-2f, 131, 13, [&](float g) { add(g); });
  expect_near();
}

TEST_P(Activation, OfSpecialNumbers) {
  const bool sigmoid = GetParam();
  const auto same = [](float a, float b) { return as_bits(a) == as_bits(b); };
  EXPECT_TRUE(same(sigmoid ? 0.5f : 0.0f, got(0.0f)));
  EXPECT_TRUE(same(sigmoid ? 0.5f : -0.0f, got(-0.0f)));
  EXPECT_TRUE(same(sigmoid ? 1.0f : kInfinity, got(kInfinity)));
  EXPECT_TRUE(same(sigmoid ? 0.0f : -0.0f, got(-kInfinity))) << "the limit";
  for (const float huge : {126.0f, 1e4f, 1e30f, std::numeric_limits<float>::max()}) {
    EXPECT_TRUE(same(sigmoid ? 1.0f : huge, got(huge))) << huge;
    EXPECT_TRUE(same(sigmoid ? 0.0f : -0.0f, got(-huge))) << huge;
  }
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0x7f800001u, 0xff800001u})
    EXPECT_TRUE(std::isnan(got(as_float(nan)))) << std::hex << nan;
}

INSTANTIATE_TEST_SUITE_P(, Activation, testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "sigmoid" : "silu"); });

}  // namespace
}  // namespace gemma_norm
