#include "reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>

#include "formats.h"

namespace gemma_norm {
namespace {

std::string difference(const char* what, int64_t row, int64_t column, double want, double got) {
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld, %lld] must be %.9g, got %.9g", what, static_cast<long long>(row),
                static_cast<long long>(column), want, got);
  return text;
}

// Of all numbers of a 16-bit format.
std::vector<double> all_values(DType dtype) {
  std::vector<double> values(1 << 16);
  for (uint32_t bits = 0; bits < values.size(); ++bits) values[bits] = element(dtype, bits);
  return values;
}

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

// Half a unit in the last place for the one rounding; some of float32's for the operations before; and half of the relative error
// of the sum of squares, which grows with the number of terms that a lane adds up: squares of 16-bit numbers lie on a coarse grid,
// so that their roundings need not cancel.
double tolerance(DType dtype, int64_t hidden, double want) {
  const double float32_units = 4 + hidden / 2048.0;
  return ulp(dtype, want) * (0.5 + float32_units * power(format(dtype).precision - format(DType::kFloat32).precision));
}

bool near(DType dtype, int64_t hidden, double want, double got) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  const double beyond = power(format(dtype).greatest + 1);  // infinity is where the next number would be
  want = std::clamp(want, -beyond, beyond);
  got = std::clamp(got, -beyond, beyond);
  return std::fabs(got - want) <= tolerance(dtype, hidden, want);
}

}  // namespace

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
  std::vector<double> s = values_of(c.dtype, inputs[kX]);
  const std::vector<double> weight = values_of(c.weight_dtype, inputs[kWeight]), out = values_of(c.dtype, got[kOut]);
  if (has_residual(c.operands)) {
    std::vector<double> r = values_of(c.dtype, inputs[kResidual]);
    const std::vector<double> post = values_of(c.dtype, inputs[kPost]);
    Packed sum(inputs[kX].size());
    for (size_t i = 0; i < s.size(); ++i) {
      if (!post.empty()) r[i] = rounded(c.dtype, r[i] + post[i]);
      s[i] = rounded(c.dtype, s[i] + r[i]);
      round_to(c.dtype, s[i], &sum[i * size_of(c.dtype)]);
    }
    if (const std::string error = compare_bits(c.dtype, c.hidden, sum, got[kResidualOut]); !error.empty())
      return "the sum's " + error;
  }

  const double eps = static_cast<float>(c.eps);
  for (int64_t row = 0; row < c.row_count(); ++row) {
    const double* const row_s = &s[row * c.hidden];
    double squares = 0;
    for (int64_t i = 0; i < c.hidden; ++i) squares += row_s[i] * row_s[i];
    if (squares > FLT_MAX) squares = INFINITY;  // as in float32
    const double rstd = 1 / std::sqrt(squares / c.hidden + eps);
    for (int64_t i = 0; i < c.hidden; ++i) {
      const double want = row_s[i] * rstd * (c.gemma ? 1 + weight[i] : weight[i]);
      if (!near(c.dtype, c.hidden, want, out[row * c.hidden + i])) return difference("out", row, i, want, out[row * c.hidden + i]);
    }
  }
  return "";
}

}  // namespace gemma_norm
