#include "runner.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>

#include "formats.h"

namespace gemma_norm {
namespace {

bool in_place(Operands o) { return o == Operands::kInPlace || o >= Operands::kFused; }

// The memory that the results take.
Place place_of_out(Operands o) { return o == Operands::kFusedCrossed ? kResidual : in_place(o) ? kX : kOut; }
Place place_of_sum(Operands o) { return o == Operands::kFusedCrossed ? kX : in_place(o) ? kResidual : kSum; }

struct Call {
  explicit Call(const Case& c) : out(place_of_out(c.operands)), sum(place_of_sum(c.operands)) {
    for (int i = 0; i < kPlaces; ++i) {
      const Place place = static_cast<Place>(i);
      const bool exists = place == kX || place == kWeight || place == out || (place == kResidual && has_residual(c.operands)) ||
                          (place == kPost && has_post(c.operands)) || (place == sum && has_residual(c.operands));
      if (exists) operands[i].emplace(c, place, written(c, place));
    }
  }
  bool written(const Case& c, Place place) const { return place == out || (place == sum && has_residual(c.operands)); }

  Place out, sum;
  std::optional<Operand> operands[kPlaces];
};

class Generator {
 public:
  Generator(const Case& c) : c_(c), random_(c.seed) {}

  Packed operand(int64_t rows) {
    Packed elements(rows * c_.hidden * size_of(c_.dtype));
    for (size_t i = 0; i < elements.size(); i += size_of(c_.dtype)) round_to(c_.dtype, value(), &elements[i]);
    const double special = c_.values == Values::kNan ? NAN : c_.values == Values::kInfinity ? INFINITY : 0;
    if (special != 0) round_to(c_.dtype, sign() * special, &elements[any(rows * c_.hidden) * size_of(c_.dtype)]);
    return elements;
  }

  // Around zero for gemma, so that a 1 + that is missing shows.
  Packed weight() {
    Packed elements(c_.hidden * size_of(c_.weight_dtype));
    const auto set = [&](int64_t i, double v) { round_to(c_.weight_dtype, v, &elements[i * size_of(c_.weight_dtype)]); };
    for (int64_t i = 0; i < c_.hidden; ++i) set(i, c_.gemma ? 0.02 * normal() : 1 + 0.3 * normal());
    if (c_.values == Values::kSpecialWeight)
      for (const double special : std::initializer_list<double>{NAN, INFINITY, -1.0, 0.0, 1e-7}) set(any(c_.hidden), special);
    return elements;
  }

 private:
  double uniform() { return random_() / 4294967296.0; }
  double normal() {
    static const auto table = [] {  // close to it: drawing each anew would take most of the tests' time
      std::mt19937 random(1);
      std::vector<double> values(1 << 14);
      for (double& v : values) v = (random() + random() + random() + random() - 2.0 * 4294967296.0) / 2479700524.0;
      return values;
    }();
    return table[random_() % table.size()];
  }
  double sign() { return random_() % 2 ? 1 : -1; }
  int64_t any(int64_t count) { return static_cast<int64_t>(random_() % count); }

  double value() {
    switch (c_.values) {
      case Values::kWide: return sign() * std::exp2(24 * uniform() - 12);
      case Values::kSubnormal: return normal() * power(format(c_.dtype).least);
      case Values::kHuge: return sign() * largest(c_.dtype) * (1 + uniform()) / 2;  // squares beyond float32, but for float16
      case Values::kZeros: return sign() * 0.0;
      default: return normal();
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

}  // namespace

Inputs make_inputs(const Case& c) {
  Generator generator(c);
  Call call(c);
  Inputs inputs;
  inputs.weight = generator.weight();
  Packed* const to[] = {&inputs.x, &inputs.residual, &inputs.post};
  for (const Place place : {kX, kResidual, kPost}) {
    if (!call.operands[place]) continue;
    call.operands[place]->set(generator.operand(c.row_count()));
    *to[place] = call.operands[place]->get();
  }
  return inputs;
}

Outputs run_case(Target& target, const Case& c, const Inputs& inputs, std::string* error) {
  Call call(c);
  const Packed* const from[] = {&inputs.x, &inputs.residual, &inputs.post, &inputs.weight};
  for (int place = kX; place <= kWeight; ++place)
    if (call.operands[place]) call.operands[place]->set(*from[place]);
  std::optional<Tensor> tensors[kPlaces];
  for (int place = 0; place < kPlaces; ++place)
    if (call.operands[place]) {
      call.operands[place]->send(target);
      tensors[place] = call.operands[place]->tensor();
    }
  const auto pointer = [&](Place place) { return tensors[place] ? &*tensors[place] : nullptr; };
  const Tensor* const sum = has_residual(c.operands) ? pointer(call.sum) : nullptr;
  const NormArgs args{"norm", *tensors[kX], *tensors[kWeight], *tensors[call.out], pointer(kResidual), pointer(kPost), sum,
                      c.eps,  c.gemma};

  Message message{};
  Outputs outputs;
  if (target.run(args, c.seed, &message) != Status::kOk) *error = message.text;
  constexpr const char* kNames[] = {"x", "residual", "post_residual_addition", "weight", "out", "residual_out"};
  for (int place = 0; place < kPlaces; ++place)
    if (call.operands[place] && !call.operands[place]->receive(target, call.written(c, static_cast<Place>(place))))
      *error = std::string("a byte was written in or beside ") + kNames[place] + " that is no element of an output";
  outputs.out = call.operands[call.out]->get();
  if (sum) outputs.sum = call.operands[call.sum]->get();
  target.free_all();
  return outputs;
}

std::string check_case(Target& target, const Case& c) {
  const Inputs inputs = make_inputs(c);
  std::string error;
  const Outputs outputs = run_case(target, c, inputs, &error);
  if (error.empty()) error = compare_with_reference(c, inputs, outputs);
  if (!error.empty()) return error;

  // The same rows in the opposite order, then one of them alone.
  const size_t row_bytes = c.hidden * size_of(c.dtype);
  const auto plain = [&](int64_t rows, const Packed& s, const Packed& want) {
    const Outputs got = run_case(target, plain_case(c, rows), {s, {}, {}, inputs.weight}, &error);
    if (error.empty()) error = compare_bits(c.dtype, c.hidden, want, got.out);
    return error.empty() ? "" : std::to_string(rows) + " rows, plain: " + error;
  };
  const Packed s = reversed(outputs.sum.empty() ? inputs.x : outputs.sum, row_bytes), want = reversed(outputs.out, row_bytes);
  if (const std::string difference = plain(c.row_count(), s, want); !difference.empty()) return difference;
  return plain(1, Packed(s.begin(), s.begin() + row_bytes), Packed(want.begin(), want.begin() + row_bytes));
}

std::string check_repeated(Target& target, const Case& c, int64_t times) {
  const auto repeated = [&](const Packed& rows) {
    Packed all;
    for (int64_t i = 0; i < times; ++i) all.insert(all.end(), rows.begin(), rows.end());
    return all;
  };
  const Inputs once = make_inputs(c);
  const Inputs inputs{repeated(once.x), repeated(once.residual), repeated(once.post), once.weight};
  Case many = c;
  many.rows.sizes[0] *= times;
  std::string error;
  const Outputs want = run_case(target, c, once, &error), got = run_case(target, many, inputs, &error);
  if (error.empty()) error = compare_bits(c.dtype, c.hidden, repeated(want.sum), got.sum);
  if (error.empty()) error = compare_bits(c.dtype, c.hidden, repeated(want.out), got.out);
  return error;
}

}  // namespace gemma_norm
