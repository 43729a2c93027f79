#include "cases.h"

namespace gemma_norm {

const OperandsInfo& info(Operands operands) {
  constexpr const OpInfo *kPlain = &RmsNorm::kInfos[0], *kAdd = &AddRmsNorm::kInfos[0],
                         *kGated = &GatedRmsNorm::kInfos[0], *kNormAdd = &RmsNormAddRmsNorm::kInfos[0],
                         *kGradients = &RmsNormBackward::kInfos[0], *kInputGradients = &RmsNormBackward::kInfos[1],
                         *kGatedGradients = &GatedRmsNormBackward::kInfos[0],
                         *kGatedInputGradients = &GatedRmsNormBackward::kInfos[1];
  static constexpr OperandsInfo kInfos[] = {
      {"plain", kPlain, false, false, kOut, kNoOperand},
      {"in place", kPlain, false, false, kX, kNoOperand},
      {"add", kAdd, true, false, kOut, kResidualOut},
      {"add with post", kAdd, true, true, kOut, kResidualOut},
      {"fused", kAdd, true, false, kX, kResidual},
      {"fused with post", kAdd, true, true, kX, kResidual},
      {"fused crossed", kAdd, true, false, kResidual, kX},
      {"gated", kGated, false, false, kOut, kNoOperand},
      {"gated in place of x", kGated, false, false, kX, kNoOperand},
      {"gated in place of the gate", kGated, false, false, kGate, kNoOperand},
      {"norm and add", kNormAdd, true, false, kOut, kResidualOut},
      {"fused norm and add", kNormAdd, true, false, kX, kResidual},
      {"gradients", kGradients, false, false, kNoOperand, kNoOperand},
      {"gradient of x", kInputGradients, false, false, kNoOperand, kNoOperand},
      {"gradients of the gated norm", kGatedGradients, false, false, kNoOperand, kNoOperand},
      {"gradients of x and gate", kGatedInputGradients, false, false, kNoOperand, kNoOperand},
  };
  return kInfos[static_cast<int>(operands)];
}

int64_t Case::row_count() const {
  int64_t count = 1;
  for (const int64_t size : rows.sizes) count *= size;
  return count;
}

bool Case::has(Operand operand) const {
  switch (operand) {
    case kWeight: return weight_dtype != DType::kOther;
    case kResidual:
    case kResidualOut: return info(operands).residual;
    case kPost: return info(operands).post;
    case kGate: return gate;
    case kPostWeight: return norms_x(operands);
    case kDSum: return dsum;
    default: return true;
  }
}

DType Case::dtype_of(Operand operand) const {
  switch (operand) {
    case kWeight:
    case kPostWeight:
    case kDWeight: return weight_dtype;
    case kDOut: return dout_dtype;
    case kResidual:
    case kPost:
    case kResidualOut: return float32_residual ? DType::kFloat32 : dtype;
    default: return dtype;
  }
}

DType Case::row_dtype() const { return float32_residual || !norm_before_gate ? DType::kFloat32 : dtype; }

Held Case::held() const {
  if (is_gated(operands)) return Held::kRowAndGates;
  if (norms_x(operands)) return Held::kTwoRowsTwoWeights;
  if (has_residual(operands)) return Held::kTwoRows;
  return weight_dtype != DType::kOther && size_of(weight_dtype) > size_of(row_dtype()) ? Held::kRowWideWeights
                                                                                       : Held::kRow;
}

Options Case::options() const {
  Options options;
  options.eps = eps;
  options.gemma = gemma;
  options.round_each_step = round_each_step;
  options.sigmoid = sigmoid;
  options.norm_before_gate = norm_before_gate;
  options.group_size = group_size;
  return options;
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "no", "int32", "int64"};
  return kNames[static_cast<int>(dtype)];
}

std::string describe(const Case& c) {
  constexpr const char* kAlignments[] = {"aligned", "odd base", "odd strides", "flush with the end"};
  constexpr const char* kValues[] = {"normal",  "wide",         "subnormal",       "huge", "zeros",
                                     "one NaN", "one infinity", "special weights", "mixed"};
  std::string shape = "[";
  for (const int64_t size : c.rows.sizes) shape += std::to_string(size) + ", ";
  std::string how = info(c.operands).name;
  if (c.gemma) how += ", gemma";
  if (c.round_each_step) how += ", rounded at each step";
  if (c.float32_residual) how += ", float32 residual";
  if (is_gated(c.operands) || (is_backward(c.operands) && c.gate)) {
    how += !c.gate ? ", no gate" : c.sigmoid ? ", sigmoid" : ", silu";
    how += c.norm_before_gate ? ", norm first" : ", gate first";
    if (c.group_size != kWholeRow) how += ", groups of " + std::to_string(c.group_size);
  }
  if (is_backward(c.operands)) {
    how += std::string(", ") + dtype_name(c.dout_dtype) + " dout";
    if (c.expanded_dout) how += " of one row";
    if (c.dsum) how += ", with dsum";
    if (c.dx_place != kDX) how += std::string(", in place of ") + kOperandNames[c.dx_place];
  }
  return std::string(dtype_name(c.dtype)) + " x, " + dtype_name(c.weight_dtype) + " weight, " + how + ", " + shape +
         std::to_string(c.hidden) + "] " + c.rows.name + ", " + kAlignments[static_cast<int>(c.alignment)] + ", " +
         kValues[static_cast<int>(c.values)] + " values, eps " + std::to_string(c.eps) + ", seed " +
         std::to_string(c.seed);
}

Case simple_case(DType dtype, DType weight_dtype, Operands operands, int64_t rows, int64_t hidden) {
  Case c{};
  c.dtype = dtype;
  c.weight_dtype = weight_dtype;
  c.operands = operands;
  c.gate = is_gated(operands);
  c.hidden = hidden;
  c.rows = {"rows", {rows}, {0}, 0};
  c.eps = 1e-6;
  c.seed = 1;
  return c;
}

Case plain_case(const Case& c, int64_t rows) {
  Case plain = c;
  plain.operands = is_gated(c.operands) ? Operands::kGated : c.float32_residual ? Operands::kAdd : Operands::kPlain;
  plain.rows = {"rows", {rows}, {0}, 0};
  plain.alignment = Alignment::kWhole;
  return plain;
}

}  // namespace gemma_norm
