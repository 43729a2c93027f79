// The exponential and the activations of gates, which are computed in float32, agree with those computed in double.
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
// What csrc/device/exponential.h promises, in units in the last place.
constexpr double kExponentialBound = 0.9, kSigmoidBound = 2.5, kSiluBound = 3, kSubnormalBound = 1.5;

// How far `got` is from `want`, in units in the last place of the float32 nearest to it.
double units(double want, float got) { return std::fabs(got - want) / ulp(DType::kFloat32, want); }

// The largest error of any, and for which number.
struct Worst {
  double units = 0;
  float at = 0;
  void add(double u, float v) {
    if (!(u <= units)) units = u, at = v;
  }
};

// Calls visit(f) for every `step`-th float32 from `first` to `last`, which are positive.
template <class Visit>
void each_float(float first, float last, uint32_t step, const Visit& visit) {
  for (uint64_t bits = as_bits(first); bits <= as_bits(last); bits += step)
    visit(as_float(static_cast<uint32_t>(bits)));
}

Worst worst_exponential(float first, float last, uint32_t step) {
  Worst worst;
  each_float(first, last, step, [&](float t) {
    for (const float g : {t, -t}) {
      if (g > 43) continue;
      const formulas::Exponential<float> got = formulas::exponential<Scalar>(g);
      worst.add(units(0x1p-64 * std::exp(-static_cast<double>(g)), got.fraction * got.power), g);
    }
  });
  return worst;
}

TEST(Exponential, IsNearForEveryNumber) {
  const Worst worst = worst_exponential(0x1p-4f, 125, 1);
  std::printf("the exponential is off by %.3f units in the last place at %a\n", worst.units, worst.at);
  EXPECT_LE(worst.units, kExponentialBound) << std::hexfloat << worst.at;
}

TEST(Exponential, IsNearForSmallNumbers) {
  const Worst worst = worst_exponential(0, 0x1p-4f, 997);
  EXPECT_LE(worst.units, kExponentialBound) << std::hexfloat << worst.at;
  EXPECT_EQ(1.0f, formulas::exponential<Scalar>(0.0f).fraction);
  EXPECT_EQ(0x1p-64f, formulas::exponential<Scalar>(0.0f).power);
}

class Activation : public testing::TestWithParam<bool> {
 protected:
  static float got(float g) {
    return GetParam() ? formulas::activation<Scalar, formulas::Activation::kSigmoid>(g)
                      : formulas::activation<Scalar, formulas::Activation::kSilu>(g);
  }
  static double want(float g) { return (GetParam() ? 1.0 : g) / (1 + std::exp(-static_cast<double>(g))); }

  // Notes the errors for g and -g. Where the sigmoid is subnormal, they are counted in least float32 numbers, times |g|
  // for silu.
  void add(float magnitude) {
    for (const float g : {magnitude, -magnitude}) {
      const double exact = want(g);
      if (1 / (1 + std::exp(-static_cast<double>(g))) < kLeastNormal)
        tiny_.add(std::fabs(got(g) - exact) / (kLeast * (GetParam() ? 1 : magnitude)), g);
      else
        worst_.add(units(exact, got(g)), g);
      signs_ = signs_ && std::signbit(got(g)) == std::signbit(exact);
    }
  }
  void expect_near() {
    std::printf(
        "%s is off by %.3f units in the last place at %a, by %.3f least numbers at %a where the sigmoid is subnormal\n",
        GetParam() ? "sigmoid" : "silu", worst_.units, worst_.at, tiny_.units, tiny_.at);
    EXPECT_LE(worst_.units, GetParam() ? kSigmoidBound : kSiluBound) << std::hexfloat << worst_.at;
    EXPECT_LE(tiny_.units, kSubnormalBound) << std::hexfloat << tiny_.at;
    EXPECT_TRUE(signs_);
  }

 private:
  static constexpr float kLeastNormal = std::numeric_limits<float>::min(),
                         kLeast = std::numeric_limits<float>::denorm_min();
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

// From 0.25 to 131, more densely than above: up to where results become subnormal and zero.
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
  if (sigmoid)
    EXPECT_TRUE(same(0.0f, got(-kInfinity)));
  else
    EXPECT_TRUE(std::isnan(got(-kInfinity))) << "-inf / inf by definition, as in PyTorch";
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
