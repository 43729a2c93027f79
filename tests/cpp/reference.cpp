#include "reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>

#include "formats.h"

namespace gemma_norm {
namespace {

// The numbers of a 16-bit format, by their bits.
std::vector<double> all_values(DType dtype) {
  std::vector<double> values(1 << 16);
  for (uint32_t bits = 0; bits < values.size(); ++bits) values[bits] = element(dtype, bits);
  return values;
}

// Where a result may lie, since float32's arithmetic is a little off, and whether it may be NaN. All operations here
// are monotonous in each operand, so that the ends of a result follow from the ends of the operands. Rounding to a
// format is monotonous too: a range becomes one number, unless it spans a boundary at which rounding changes; then
// either neighbour is allowed.
struct Range {
  double least, most;
  bool nan = false;

  explicit Range(double v) : least(v), most(v), nan(std::isnan(v)) {}
  Range(double a, double b) : least(std::fmin(a, b)), most(std::fmax(a, b)), nan(std::isnan(a) || std::isnan(b)) {}

  bool has(double v) const { return least <= v && v <= most; }

  // Reaches so many units in the last place of float32 further to both sides.
  Range widened(double units) const {
    Range wider = *this;
    wider.least -= units * ulp(DType::kFloat32, least);
    wider.most += units * ulp(DType::kFloat32, most);
    return wider;
  }
  Range rounded_to(DType dtype) const {
    Range range = *this;
    range.least = rounded(dtype, least);
    range.most = rounded(dtype, most);
    return range;
  }
};

Range operator*(const Range& a, const Range& b) {
  Range product(a.least * b.least, a.most * b.most);
  const Range crossed(a.least * b.most, a.most * b.least);
  product.least = std::fmin(product.least, crossed.least);
  product.most = std::fmax(product.most, crossed.most);
  const auto infinite = [](const Range& r) { return r.has(INFINITY) || r.has(-INFINITY); };
  product.nan = a.nan || b.nan || (a.has(0) && infinite(b)) || (b.has(0) && infinite(a));
  return product;
}

// How far float32's arithmetic may be off, in units in the last place: some units for the operations, and half of the
// relative error of the sum of squares. That error grows with the number of squares that a lane adds up, because the
// squares of 16-bit numbers lie on a coarse grid, on which roundings need not cancel each other.
double float32_units(int64_t hidden) { return 4 + hidden / 2048.0; }

// What csrc/device/exponential.h promises of activations: the error in units in the last place, and, where the sigmoid
// is subnormal, in multiples of the least float32.
constexpr double kUnitsOfActivation = 3, kLeastNumbersOfActivation = 1.5;
// Where the gate comes first, s = x * activation is off by three units and the half of one by its own rounding, which
// is at most 3.5 * 2^-23 = 7 * 2^-24 of it. The root mean square of such s is off by as much at most. A unit is at
// least 2^-24 of a number, so that this is at most 7 units.
constexpr double kUnitsOfGatedSquares = 7;

// Half a unit in the last place for the one rounding to `dtype`, and the units of float32.
double tolerance(DType dtype, double float32_units, double want) {
  return ulp(dtype, want) * (0.5 + float32_units * power(format(dtype).precision - format(DType::kFloat32).precision));
}

// Of tolerance(dtype, float32_units, want), the least that it can be in relation to `want`, if `want` is at most the
// format's largest number: a unit in the last place is more than 2^-precision of a number.
double least_tolerance(DType dtype, double float32_units) {
  return power(-format(dtype).precision) * (0.5 + float32_units * power(format(dtype).precision - 24));
}

bool near(DType dtype, double float32_units, const Range& want, double got) {
  if (std::isnan(got)) return want.nan;
  if (std::isnan(want.least)) return false;
  const double beyond =
      power(format(dtype).greatest + 1);  // Infinity counts as the number that would come after the largest.
  got = std::clamp(got, -beyond, beyond);
  const double end = std::clamp(got < want.least ? want.least : want.most, -beyond, beyond);
  return want.has(got) || std::fabs(got - end) <= tolerance(dtype, float32_units, end);
}

double activation(double g, bool sigmoid) { return (sigmoid ? 1 : g) / (1 + std::exp(-g)); }

Range activation_range(double g, bool sigmoid) {
  const double exact = activation(g, sigmoid);
  Range range = Range(exact).widened(kUnitsOfActivation);
  if (activation(g, true) < FLT_MIN) {
    const double off = kLeastNumbersOfActivation * power(-149) * (sigmoid ? 1 : std::fabs(g));
    range.least -= off, range.most += off;
  }
  if (range.least < 0 && !std::signbit(exact)) range.least = 0;
  if (range.most > 0 && std::signbit(exact)) range.most = -0.0;
  return range;
}

}  // namespace

std::vector<double> values_of(DType dtype, const Packed& elements) {
  static const std::vector<double> float16 = all_values(DType::kFloat16), bfloat16 = all_values(DType::kBFloat16);
  const size_t item = size_of(dtype);
  std::vector<double> values(elements.size() / item);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = bits_at(dtype, &elements[i * item]);
    values[i] = dtype == DType::kFloat32 ? element(dtype, bits) : (dtype == DType::kFloat16 ? float16 : bfloat16)[bits];
  }
  return values;
}

std::string difference(const char* what, int64_t row, int64_t column, double want, double got) {
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld, %lld] must be %.9g, got %.9g", what, static_cast<long long>(row),
                static_cast<long long>(column), want, got);
  return text;
}

std::string compare_bits(DType dtype, int64_t hidden, const Packed& want, const Packed& got) {
  if (want == got) return "";
  const size_t item = size_of(dtype);
  for (size_t i = 0; i < want.size(); i += item) {
    const double wanted = element_at(dtype, &want[i]), value = element_at(dtype, &got[i]);
    if (std::isnan(wanted) && std::isnan(value)) continue;
    if (std::memcmp(&want[i], &got[i], item) != 0)
      return difference("bits: out", i / item / hidden, i / item % hidden, wanted, value);
  }
  return "";
}

std::string compare_with_reference(const Case& c, const Tensors& inputs, const Tensors& got) {
  const std::vector<double> weight = values_of(c.weight_dtype, inputs[kWeight]),
                            gate = values_of(c.dtype, inputs[kGate]), out = values_of(c.dtype, got[kOut]);
  std::vector<double> s = values_of(c.dtype, inputs[kX]);
  if (has_residual(c.operands)) {
    const DType dtype = c.dtype_of(kResidual);
    std::vector<double> r = values_of(dtype, inputs[kResidual]);
    const std::vector<double> post = values_of(dtype, inputs[kPost]);
    Packed sum(inputs[kResidual].size());
    for (size_t i = 0; i < s.size(); ++i) {
      if (!post.empty()) r[i] = rounded(dtype, r[i] + post[i]);
      s[i] = rounded(dtype, s[i] + r[i]);
      round_to(dtype, s[i], &sum[i * size_of(dtype)]);
    }
    if (const std::string error = compare_bits(dtype, c.hidden, sum, got[kResidualOut]); !error.empty())
      return "the sum's " + error;
  }

  const bool gate_first = !gate.empty() && !c.norm_before_gate, gate_last = !gate.empty() && c.norm_before_gate;
  const int64_t normed = c.normed(), groups = c.hidden / normed;
  const double eps = static_cast<float>(c.eps), units = float32_units(normed) + (gate_first ? kUnitsOfGatedSquares : 0);
  const bool one_rounding = !c.round_each_step && gate.empty();
  const double sure = least_tolerance(c.dtype, units), most = largest(c.dtype);
  std::vector<Range> row(normed, Range(0));
  for (int64_t first = 0; first < static_cast<int64_t>(s.size()); first += normed) {
    double squares = 0;
    bool may_be_nan = false;  // An activation may be 0 or nearly 0, and what it is multiplied with is infinite.
    for (int64_t i = 0; i < normed; ++i) {
      double value = s[first + i];
      row[i] = Range(value);
      if (gate_first) {
        row[i] = (row[i] * activation_range(gate[first + i], c.sigmoid)).widened(0.5).rounded_to(DType::kFloat32);
        may_be_nan = may_be_nan || row[i].nan;
        value = rounded(DType::kFloat32, rounded(DType::kFloat32, activation(gate[first + i], c.sigmoid)) * value);
      }
      squares += value * value;
    }
    if (squares > FLT_MAX) squares = INFINITY;  // as in float32
    const double rstd = 1 / std::sqrt(squares / normed + eps);
    for (int64_t i = 0; i < normed; ++i) {
      const double w = weight.empty() ? 1
                       : c.gemma      ? 1 + weight[first / normed % groups * normed + i]
                                      : weight[first / normed % groups * normed + i];
      const double value = out[first + i];
      if (one_rounding) {  // Most results pass here, in a fraction of the time.
        const double exact = s[first + i] * rstd * w;
        if (std::fabs(exact) <= most && std::fabs(value - exact) <= std::fabs(exact) * sure) continue;
      }
      Range want = row[i].least == row[i].most ? Range(row[i].least * rstd * w) : row[i] * Range(rstd) * Range(w);
      double left = units;  // which are not yet in the range
      if (c.round_each_step) {
        // The product of two numbers of 16 bits is exact in float32, underflow aside.
        const Range normed = (row[i] * Range(rstd)).widened(units).rounded_to(c.dtype);
        want = (normed * Range(w)).rounded_to(DType::kFloat32).rounded_to(c.dtype);
      }
      if (gate_last) {
        if (!c.round_each_step) want = want.widened(units);
        want = want * activation_range(gate[first + i], c.sigmoid);
        left = 0.5;
      }
      want.nan = want.nan || may_be_nan;
      const bool exact = c.round_each_step && !gate_last;  // The ends of the range are numbers of the format.
      if (exact ? !(std::isnan(value) ? want.nan : want.has(value)) : !near(c.dtype, left, want, value))
        return difference("out", first / c.hidden, first % c.hidden + i, want.least, value);
    }
  }
  return "";
}

}  // namespace gemma_norm
