#include "gradient_reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "formats.h"

namespace gemma_norm {
namespace {

// The relative error of one rounding to float32, and the least float32, by which a product can be off that is below the
// normal ones.
const double kUnit = power(-24), kLeast = power(-149);

// How many units rstd, or a sum over a row, is off: some for the operations; and since the errors of a sum grow with
// the number of terms that one thread adds up, some for those, of which there are many in two passes over long rows.
double units_of_row(int64_t length) { return 6 + length / 1024.0; }

// The same for a sum over rows. The errors of its terms are independent of each other, so that together they grow with
// the root of their number.
double units_of_column(int64_t rows) { return 4 + 2 * std::sqrt(static_cast<double>(rows)); }

// A number, how far from it a device may be, and whether it may be NaN there.
struct Number {
  double exact, off;
  bool nan = false;
  explicit Number(double exact = 0, double off = 0, bool nan = false) : exact(exact), off(off), nan(nan) {}
  // A result of so many operations in float32.
  Number rounded(double units = 1) const {
    if (std::fabs(exact) > FLT_MAX) return Number(std::copysign(INFINITY, exact), 0, nan);
    return Number(exact, off + units * kUnit * std::fabs(exact) + kLeast, nan);
  }
  bool may_be_zero() const { return std::fabs(exact) <= off; }
};
Number operator+(const Number& a, const Number& b) { return Number(a.exact + b.exact, a.off + b.off, a.nan || b.nan); }
Number operator-(const Number& a, const Number& b) { return Number(a.exact - b.exact, a.off + b.off, a.nan || b.nan); }
Number operator*(const Number& a, const Number& b) {
  const bool nan = (std::isinf(a.exact) && b.may_be_zero()) || (std::isinf(b.exact) && a.may_be_zero());
  return Number(a.exact * b.exact, std::fabs(a.exact) * b.off + std::fabs(b.exact) * a.off, a.nan || b.nan || nan);
}

// Whether `got` is `want` rounded. Infinity counts as the number that would come after the largest.
bool is_near(DType dtype, const Number& want, double got) {
  if (std::isnan(want.exact) || std::isnan(got)) return (std::isnan(want.exact) || want.nan) && std::isnan(got);
  const double beyond = power(format(dtype).greatest + 1), exact = std::clamp(want.exact, -beyond, beyond);
  got = std::clamp(got, -beyond, beyond);
  const double off = want.off < beyond ? want.off : 0;
  return std::fabs(got - exact) <= 0.5 * ulp(dtype, std::min(std::fabs(exact) + off, beyond)) + off;
}

// What csrc/device/exponential.h promises of the logistic function is 3 units in the last place, each of at most two of
// kUnit, and a little more where it is subnormal.
struct Activation {
  Number value, slope;

  Activation(double gate, bool sigmoid) {
    Number l(1 / (1 + std::exp(-gate)));
    l.off = 6 * kUnit * l.exact + (l.exact < FLT_MIN ? 2 * kLeast : 0);
    const Number g(gate), rest = (l * (Number(1) - l).rounded()).rounded();
    value = sigmoid ? l : (g * l).rounded();
    slope = sigmoid ? rest : (g * rest).rounded() + l;
  }
};

}  // namespace

std::string compare_gradients_with_reference(const Case& c, const Tensors& inputs, const Tensors& got) {
  const auto values = [&](const Tensors& from, Operand o) { return values_of(c.dtype_of(o), from[o]); };
  const std::vector<double> x = values(inputs, kX), dout = values(inputs, kDOut), gate = values(inputs, kGate),
                            dsum = values(inputs, kDSum), dx = values(got, kDX), dgate = values(got, kDGate),
                            dweight = values(got, kDWeight);
  std::vector<double> factors = values(inputs, kWeight);
  if (factors.empty()) factors.assign(c.hidden, 1);
  if (c.gemma)
    for (double& f : factors) f = rounded(DType::kFloat32, 1 + f);

  const int64_t length = c.normed(), groups = c.hidden / length, rows = c.row_count();
  const double eps = static_cast<float>(c.eps), units = units_of_row(length);
  std::vector<Number> sums(c.hidden), n(length), g(length), u(length);
  std::vector<double> magnitudes(c.hidden);
  std::vector<Activation> a;
  for (int64_t first = 0; first < rows * c.hidden; first += length) {
    const int64_t column = first / length % groups * length;
    const auto wrong = [&](Operand o, int64_t i, const Number& want, double value) {
      return difference(kOperandNames[o], first / c.hidden, column + i, want.exact, value);
    };
    double squares = 0, off = 0;
    bool nan = false;
    a.clear();
    for (int64_t i = 0; i < length; ++i) {
      n[i] = Number(x[first + i]);
      u[i] = Number(dout[first + i]);
      if (!gate.empty()) {
        a.emplace_back(gate[first + i], c.sigmoid);
        Number& gated = c.norm_before_gate ? u[i] : n[i];
        gated = (gated * a[i].value).rounded();
      }
      squares += n[i].exact * n[i].exact;
      off += 2 * std::fabs(n[i].exact) * n[i].off;
      nan = nan || n[i].nan;  // an infinite x times an activation that may be 0
    }
    if (squares > FLT_MAX) squares = INFINITY, off = 0;
    Number rstd(1 / std::sqrt(squares / length + eps), 0, nan);
    // It is exactly 0 where the squares overflow.
    if (rstd.exact > 0) rstd.off = rstd.exact * (units * kUnit + 0.5 * off / (squares + eps * length));

    Number mean;
    for (int64_t i = 0; i < length; ++i) {
      n[i] = (n[i] * rstd).rounded();
      g[i] = (u[i] * Number(factors[column + i])).rounded();
      const Number product = g[i] * n[i], term = u[i] * n[i];
      mean = mean + Number(product.exact / length, (product.off + units * kUnit * std::fabs(product.exact)) / length,
                           product.nan);
      sums[column + i] = sums[column + i] + term;
      magnitudes[column + i] += std::fabs(term.exact);
    }
    for (int64_t i = 0; i < length; ++i) {
      const Number ds = (rstd * (g[i] - (n[i] * mean).rounded()).rounded()).rounded();
      Number want = ds, of_gate;
      if (!dsum.empty()) want = (want + Number(dsum[first + i])).rounded();
      if (!gate.empty()) {
        if (!c.norm_before_gate) want = (want * a[i].value).rounded();
        const Number upstream = c.norm_before_gate ? Number(dout[first + i]) * n[i] * Number(factors[column + i])
                                                   : ds * Number(x[first + i]);
        of_gate = (upstream.rounded(2) * a[i].slope).rounded();
        if (!is_near(c.dtype, of_gate, dgate[first + i])) return wrong(kDGate, i, of_gate, dgate[first + i]);
      }
      if (!is_near(c.dtype, want, dx[first + i])) return wrong(kDX, i, want, dx[first + i]);
    }
  }
  if (!has_dweight(c.operands)) return "";
  for (int64_t i = 0; i < c.hidden; ++i) {
    const Number want(sums[i].exact, sums[i].off + units_of_column(rows) * kUnit * magnitudes[i] + kLeast * rows,
                      sums[i].nan);
    if (!is_near(c.weight_dtype, want, dweight[i])) return difference("dweight", 0, i, want.exact, dweight[i]);
  }
  return "";
}

}  // namespace gemma_norm
