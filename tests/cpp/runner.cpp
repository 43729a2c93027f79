#include "runner.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <tuple>

#include "formats.h"
#include "gradient_reference.h"

namespace gemma_norm {
namespace {

// The case's tensors. An output that takes an input's memory shares that input's TestTensor.
struct CaseTensors {
  explicit CaseTensors(const Case& c) {
    for (const OperandRule& rule : c.op()) {
      const Operand o = rule.operand;
      place[o] = !c.has(o)           ? kNoOperand
                 : o == kOut         ? info(c.operands).out
                 : o == kResidualOut ? info(c.operands).residual_out
                 : o == kDX          ? c.dx_place
                                     : o;
      if (rule.written() && c.has(o)) written[place[o]] = true;
    }
    for (int o = 0; o < kOperands; ++o)
      if (place[o] == o) memory[o].emplace(c, static_cast<Operand>(o), written[o]);
  }
  TestTensor* tensor(int o) { return place[o] == kNoOperand ? nullptr : &*memory[place[o]]; }

  Operand place[kOperands] = {};                // whose memory an operand has
  bool written[kOperands] = {};                 // that operand's memory is written
  std::optional<TestTensor> memory[kOperands];  // of the operands that have their own
};

// Calls of more elements take so long that they are not run for a check that other calls serve as well.
constexpr int64_t kFewElements = 100000;

class Generator {
 public:
  Generator(const Case& c) : c_(c), random_(c.seed) {}

  Packed operand(Operand operand, int64_t rows) {
    const DType dtype = c_.dtype_of(operand);
    Packed elements(rows * c_.hidden * size_of(dtype));
    const int64_t row_bytes = c_.hidden * size_of(dtype);
    for (int64_t row = 0; row < rows; ++row) {
      const Values values = c_.values == Values::kMixedRows ? of_mixed_row(row) : c_.values;
      uint8_t* const first = &elements[row * row_bytes];
      if (operand != kGate && are_normal(values, operand))
        draw_row(dtype, 0, 1, first);
      else
        for (int64_t i = 0; i < row_bytes; i += size_of(dtype))
          round_to(dtype, operand == kGate ? gate() : value(values, dtype, operand), first + i);
    }
    const double special = c_.values == Values::kNan ? NAN : c_.values == Values::kInfinity ? INFINITY : 0;
    if (special != 0) round_to(dtype, sign() * special, &elements[any(rows * c_.hidden) * size_of(dtype)]);
    return elements;
  }

  // Around zero for gemma, so that a kernel that forgets to add 1 leaves next to nothing of the result.
  Packed weight() {
    Packed elements(c_.hidden * size_of(c_.weight_dtype));
    c_.gemma ? draw_row(c_.weight_dtype, 0, 0.02, elements.data()) : draw_row(c_.weight_dtype, 1, 0.3, elements.data());
    if (c_.values == Values::kSpecialWeight)
      for (const double special : std::initializer_list<double>{NAN, INFINITY, -1.0, 0.0, 1e-7})
        round_to(c_.weight_dtype, special, &elements[any(c_.hidden) * size_of(c_.weight_dtype)]);
    return elements;
  }

 private:
  // Numbers come from tables, since computing and rounding each anew would take most of the tests' time.
  static constexpr size_t kTable = 1 << 14;

  // A sum of four uniform numbers is close to a normal one.
  static const std::vector<double>& normal_numbers() {
    static const auto table = [] {
      std::mt19937 random(1);
      std::vector<double> values(kTable);
      for (double& v : values) v = (random() + random() + random() + random() - 2.0 * 4294967296.0) / 2479700524.0;
      return values;
    }();
    return table;
  }

  // A row of mean + deviation * normal().
  void draw_row(DType dtype, double mean, double deviation, uint8_t* row) {
    static thread_local std::map<std::tuple<DType, double, double>, std::vector<uint32_t>> tables;
    std::vector<uint32_t>& bits = tables[{dtype, mean, deviation}];
    if (bits.empty())
      for (const double v : normal_numbers()) bits.push_back(rounded_bits(dtype, mean + deviation * v));
    const size_t item = size_of(dtype);
    for (int64_t i = 0; i < c_.hidden; ++i) std::memcpy(row + i * item, &bits[random_() % kTable], item);
  }

  double uniform() { return random_() / 4294967296.0; }
  double normal() { return normal_numbers()[random_() % kTable]; }
  double sign() { return random_() % 2 ? 1 : -1; }
  int64_t any(int64_t count) { return static_cast<int64_t>(random_() % count); }

  // Mostly where the activation is a number like any other, and sometimes up to where it underflows to 0.
  double gate() {
    const double number = normal();
    return random_() % 4 ? 2 * number : 260 * uniform() - 130;
  }

  Values of_mixed_row(int64_t row) const {
    constexpr Values kOfRow[] = {Values::kNormal, Values::kMixedRows, Values::kHuge, Values::kZeros};
    return kOfRow[(row + c_.seed) % std::size(kOfRow)];
  }

  bool are_normal(Values values, Operand operand) const {
    switch (values) {
      case Values::kMixedRows: return false;
      case Values::kWide:
      case Values::kSubnormal:
      case Values::kHuge:
      case Values::kZeros:  // Only x decides how large n is, and only x and dout how large the sum of g * x is.
        return is_backward(c_.operands) && operand != kX;
      default: return true;
    }
  }

  // One that is not normal().
  double value(Values values, DType dtype, Operand operand) {
    switch (values) {
      case Values::kWide: return sign() * std::exp2(24 * uniform() - 12);
      case Values::kSubnormal: return normal() * power(format(dtype).least);
      case Values::kHuge:
        return sign() * largest(dtype) * (1 + uniform()) / 2;  // whose squares overflow, except float16's
      case Values::kZeros: return sign() * 0.0;
      case Values::kMixedRows:  // x^2 can be added up in float32, and dout * x is beyond it.
        return normal() * (dtype == DType::kFloat16 || operand == kDSum ? 1 : power(operand == kX ? 50 : 85));
      default: std::abort();
    }
  }

  const Case& c_;
  std::mt19937 random_;
};

Packed reversed(const Packed& rows, size_t row_bytes) {
  Packed result;
  for (size_t at = rows.size(); at > 0; at -= row_bytes)
    result.insert(result.end(), &rows[at - row_bytes], &rows[at - row_bytes] + row_bytes);
  return result;
}

// The memory that a call asks for. It begins with NaNs, as if another call had used it, and has a line of canaries on
// the side on which no page is guarded.
class Scratch {
 public:
  Scratch(Target& target, Guard guard) : target_(target), guard_(guard) {}

  // Call::scratch, of which the context is the Scratch.
  static void* allocate(void* context, int64_t bytes) { return static_cast<Scratch*>(context)->allocate(bytes); }

  // "" if no canary has changed, and the memory was asked for once at most.
  std::string error() const {
    if (calls_ > 1) return "scratch memory was asked for more than once";
    if (calls_ == 0) return "";
    std::vector<uint8_t> image(size_);
    target_.read(image.data(), memory_, size_);
    for (size_t i = 0; i < size_; ++i)
      if ((i < first_ || i >= first_ + bytes_) && image[i] != kCanary)
        return "a byte was written beside the scratch memory of " + std::to_string(bytes_) + " bytes";
    return "";
  }

 private:
  static constexpr size_t kLine = 64;
  static constexpr uint8_t kCanary = 0xff;

  void* allocate(int64_t bytes) {
    ++calls_;
    bytes_ = bytes;
    first_ = guard_ == Guard::kBefore ? 0 : kLine;
    size_ = (bytes_ + kLine - 1) / kLine * kLine + kLine;
    memory_ = target_.allocate(size_, guard_);
    target_.write(memory_, std::vector<uint8_t>(size_, kCanary).data(), size_);
    return static_cast<uint8_t*>(memory_) + first_;
  }

  Target& target_;
  const Guard guard_;
  int calls_ = 0;
  size_t bytes_ = 0, first_ = 0, size_ = 0;
  void* memory_ = nullptr;
};

// The inputs of a case in which x has a norm of its own, with that norm in x's place: the target's own plain norm,
// which is compared with the reference here. The fused kernel must not differ from it by a bit, so that
// compare_with_reference, given the result, expects the exact sum of it and the residual.
Tensors with_normed_x(Target& target, const Case& c, const Tensors& inputs, std::string* error) {
  const Case plain = plain_case(c, c.row_count());
  Tensors plain_inputs, normed = inputs;
  plain_inputs[kX] = inputs[kX];
  plain_inputs[kWeight] = inputs[kPostWeight];
  const Tensors outputs = run_case(target, plain, plain_inputs, error);
  if (error->empty()) *error = compare_with_reference(plain, plain_inputs, outputs);
  if (!error->empty()) *error = "the norm of x: " + *error;
  normed[kX] = outputs[kOut];
  return normed;
}

}  // namespace

Tensors make_inputs(const Case& c) {
  Generator generator(c);
  CaseTensors tensors(c);
  Tensors inputs;
  if (c.has(kWeight)) inputs[kWeight] = generator.weight();
  if (c.has(kPostWeight)) inputs[kPostWeight] = generator.weight();
  for (const OperandRule& rule : c.op()) {
    TestTensor* const tensor = tensors.tensor(rule.operand);
    if (!tensor || rule.written() || !rule.has_rows()) continue;
    tensor->set(generator.operand(rule.operand, c.row_count()));
    inputs[rule.operand] = tensor->get();
  }
  return inputs;
}

Tensors run_case(Target& target, const Case& c, const Tensors& inputs, std::string* error) {
  CaseTensors tensors(c);
  Call call{&c.op(), {}, c.options()};
  Tensor views[kOperands];
  for (int o = 0; o < kOperands; ++o) {
    if (!tensors.memory[o]) continue;
    if (!inputs.of[o].empty()) tensors.memory[o]->set(inputs.of[o]);
    tensors.memory[o]->send(target);
    views[o] = tensors.memory[o]->tensor();
  }
  for (const OperandRule& rule : c.op())
    if (tensors.tensor(rule.operand)) call.tensors[rule.operand] = &views[tensors.place[rule.operand]];

  Scratch scratch(target, c.placements[kDWeight].guarded_after ? Guard::kAfter : Guard::kBefore);
  call.scratch = &Scratch::allocate;
  call.context = &scratch;
  Message message{};
  if (target.run(call, c.variation, &message) != Status::kOk) *error = message.text;
  if (error->empty()) *error = scratch.error();
  for (int o = 0; o < kOperands; ++o)
    if (tensors.memory[o] && !tensors.memory[o]->receive(target, tensors.written[o]))
      *error = std::string("a byte was written in or beside ") + kOperandNames[o] + " that is no element of an output";
  Tensors outputs;
  for (const OperandRule& rule : c.op())
    if (rule.written()) outputs[rule.operand] = tensors.tensor(rule.operand)->get();
  target.free_all();
  return outputs;
}

std::string compare_outputs(const Case& c, const Tensors& want, const Tensors& got) {
  for (const OperandRule& rule : c.op()) {
    if (!rule.written()) continue;
    const Operand o = rule.operand;
    const std::string error = compare_bits(c.dtype_of(o), c.hidden, want[o], got[o]);
    if (!error.empty()) return std::string(kOperandNames[o]) + "'s " + error;
  }
  return "";
}

Call make_call(const OpInfo* op, std::initializer_list<std::pair<Operand, const Tensor*>> tensors,
               const Options& options) {
  Call call{op, {}, options};
  for (const auto& [operand, tensor] : tensors) call.tensors[operand] = tensor;
  return call;
}

std::string check_case(Target& target, const Case& c, Target* alike) {
  const Tensors inputs = make_inputs(c);
  std::string error;
  const Tensors outputs = run_case(target, c, inputs, &error);
  if (alike) {
    const Tensors others = run_case(*alike, c, inputs, &error);
    if (error.empty()) error = compare_outputs(c, others, outputs);
    if (!error.empty()) error = "not as on " + alike->name() + ": " + error;
  } else {
    const Tensors summed = norms_x(c.operands) ? with_normed_x(target, c, inputs, &error) : inputs;
    if (error.empty()) error = compare_with_reference(c, summed, outputs);
  }
  if (!error.empty()) return error;

  // A row's bits depend on that row alone: compare with the same rows in the opposite order, then with one of them
  // alone.
  Tensors rows;
  for (const Operand o : {kX, kGate}) rows[o] = reversed(inputs[o], c.hidden * size_of(c.dtype));
  rows[kWeight] = inputs[kWeight];
  Operand s = kX;
  if (has_residual(c.operands)) {
    if (c.float32_residual) {  // The sum goes to the residual, and x becomes -0: any number plus -0 is that number, bit
                               // for bit.
      for (size_t i = 0; i < rows[kX].size(); i += size_of(c.dtype)) round_to(c.dtype, -0.0, &rows[kX][i]);
      s = kResidual;
    }
    rows[s] = reversed(outputs[kResidualOut], c.hidden * size_of(c.dtype_of(s)));
  }
  const Packed want = reversed(outputs[kOut], c.hidden * size_of(c.dtype));
  const auto compare = [&](const Case& plain, const Tensors& inputs, const char* what) {
    const Tensors got = run_case(target, plain, inputs, &error);
    const Packed first(want.begin(), want.begin() + got[kOut].size());
    if (error.empty()) error = compare_bits(c.dtype, plain.hidden, first, got[kOut]);
    return error.empty() ? "" : what + (": " + error);
  };
  if (const std::string difference = compare(plain_case(c, c.row_count()), rows, "rows reversed and plain");
      !difference.empty())
    return difference;

  // A group of a row has the bits of a row of its size that has the group's weights.
  Case one = plain_case(c, 1);
  one.hidden = c.normed();
  one.group_size = kWholeRow;
  for (int o = 0; o < kOperands; ++o)
    if (!rows.of[o].empty()) rows.of[o].resize(one.hidden * size_of(c.dtype_of(static_cast<Operand>(o))));
  if (is_gated(c.operands) && !c.gate && c.norm_before_gate) one.operands = Operands::kPlain;  // which it must equal
  return compare(one, rows, "one row, plain");
}

std::string check_gradients(Target& target, const Case& c, Target* alike) {
  const Tensors inputs = make_inputs(c);
  std::string error;
  const Tensors outputs = run_case(target, c, inputs, &error);
  if (error.empty() && !alike) error = compare_gradients_with_reference(c, inputs, outputs);
  if (!error.empty()) return error;

  Case again = c;
  ++again.variation.order;
  again.variation.pieces = again.variation.pieces ? 0 : c.seed | 1;
  Target& other = alike ? *alike : target;
  error = compare_outputs(c, outputs, run_case(other, again, inputs, &error));
  if (!error.empty()) return (alike ? "not as on " + alike->name() : "not the same when repeated") + ": " + error;

  // A frozen weight changes nothing for x.
  if (!has_dweight(c.operands) || c.row_count() * c.hidden > kFewElements) return "";
  again.operands = c.gate ? Operands::kGatedInputGradients : Operands::kInputGradients;
  error = compare_outputs(again, outputs, run_case(target, again, inputs, &error));
  return error.empty() ? "" : "not the same without dweight: " + error;
}

std::string check_repeated(Target& target, const Case& c, int64_t times) {
  const auto repeated = [&](const Packed& rows) {
    Packed all;
    for (int64_t i = 0; i < times; ++i) all.insert(all.end(), rows.begin(), rows.end());
    return all;
  };
  const Tensors once = make_inputs(c);
  Tensors inputs = once;
  for (const Operand o : {kX, kResidual, kPost, kGate}) inputs[o] = repeated(once[o]);
  Case many = c;
  many.rows.sizes[0] *= times;
  std::string error;
  const Tensors want = run_case(target, c, once, &error), got = run_case(target, many, inputs, &error);
  if (!error.empty()) return error;
  Tensors wanted;
  for (const Operand o : {kResidualOut, kOut}) wanted[o] = repeated(want[o]);
  return compare_outputs(c, wanted, got);
}

void add_to_hash(DType dtype, const Packed& elements, uint64_t* hash) {
  for (size_t i = 0; i < elements.size(); i += size_of(dtype)) {
    const uint32_t bits = bits_at(dtype, &elements[i]);
    *hash = (*hash ^ (std::isnan(element(dtype, bits)) ? 0xffffffff : bits)) * 0x100000001b3;
  }
}

}  // namespace gemma_norm
