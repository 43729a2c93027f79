#include "gradient_reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "formats.h"

namespace gemma_norm {
namespace {

// Half a unit in the last place of float32, of a number of about 1; and the least number of float32, by which a product
// can be off that is below the normal ones.
const double kUnit = power(-24), kLeast = power(-149);

// How many units rstd, n and the mean of g * n are off. The errors of a sum grow with the number of its terms that one
// thread adds up, the last term with that of two passes over long rows.
double units_of_row(int64_t hidden) { return 8 + hidden / 1024.0; }

// The same for a sum over rows. The errors of the terms are independent of each other, so that together they grow with
// the root of their number.
double units_of_column(int64_t hidden, int64_t rows) {
  return units_of_row(hidden) + 2 * std::sqrt(static_cast<double>(rows));
}

// Whether `got` is `want` rounded, give or take `slack` before the rounding. Infinity counts as the number that would
// come after the largest.
bool is_near(DType dtype, double want, double slack, double got) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  const double beyond = power(format(dtype).greatest + 1);
  want = std::clamp(want, -beyond, beyond);
  got = std::clamp(got, -beyond, beyond);
  if (!(slack < beyond)) slack = 0;
  return std::fabs(got - want) <= 0.5 * ulp(dtype, std::min(std::fabs(want) + slack, beyond)) + slack;
}

}  // namespace

std::string compare_gradients_with_reference(const Case& c, const Tensors& inputs, const Tensors& got) {
  const std::vector<double> x = values_of(c.dtype, inputs[kX]), dout = values_of(c.dout_dtype, inputs[kDOut]),
                            dsum = values_of(c.dtype, inputs[kDSum]), dx = values_of(c.dtype, got[kDX]),
                            dweight = values_of(c.weight_dtype, got[kDWeight]);
  std::vector<double> factor = values_of(c.weight_dtype, inputs[kWeight]);
  if (factor.empty()) factor.assign(c.hidden, 1);
  if (c.gemma)
    for (double& f : factor) f = rounded(DType::kFloat32, 1 + f);

  const int64_t hidden = c.hidden, rows = c.row_count();
  const double eps = static_cast<float>(c.eps), units = units_of_row(hidden);
  std::vector<double> sums(hidden), magnitudes(hidden), n(hidden), g(hidden);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0, product = 0, magnitude = 0;
    for (int64_t i = 0; i < hidden; ++i) squares += x[row * hidden + i] * x[row * hidden + i];
    if (squares > FLT_MAX) squares = INFINITY;  // as in float32
    const double rstd = 1 / std::sqrt(squares / hidden + eps);
    for (int64_t i = 0; i < hidden; ++i) {
      n[i] = x[row * hidden + i] * rstd;
      g[i] = dout[row * hidden + i] * factor[i];
      product += g[i] * n[i];
      magnitude += std::fabs(g[i] * n[i]);
      sums[i] += dout[row * hidden + i] * n[i];
      magnitudes[i] += std::fabs(dout[row * hidden + i] * n[i]);
    }
    const double mean = product / hidden;
    for (int64_t i = 0; i < hidden; ++i) {
      const double norm_part = rstd * (g[i] - n[i] * mean),
                   want = dsum.empty() ? norm_part : norm_part + dsum[row * hidden + i];
      const double of_terms = std::fabs(g[i]) + std::fabs(n[i]) * magnitude / hidden;
      const double slack = units * kUnit * rstd * of_terms + kUnit * std::fabs(want) +
                           kLeast * (1 + rstd) * (1 + rstd + std::fabs(mean) + std::fabs(n[i]));
      if (!is_near(c.dtype, want, slack, dx[row * hidden + i]))
        return difference("dx", row, i, want, dx[row * hidden + i]);
    }
  }
  if (c.operands != Operands::kGradients) return "";
  for (int64_t i = 0; i < hidden; ++i) {
    const double slack = units_of_column(hidden, rows) * kUnit * magnitudes[i] + kLeast * rows;
    if (!is_near(c.weight_dtype, sums[i], slack, dweight[i])) return difference("dweight", 0, i, sums[i], dweight[i]);
  }
  return "";
}

}  // namespace gemma_norm
