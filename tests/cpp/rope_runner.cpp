// Runs a case on a target, and computes what its results must be.
#include <cmath>
#include <cstring>
#include <random>

#include "core/head_params.h"
#include "formats.h"
#include "rope_cases.h"

namespace gemma_norm {
namespace {

constexpr uint8_t kCanary = 0xff;

// A tensor in a target's memory, beside canaries, whose elements are numbers.
struct Memory {
  std::vector<int64_t> sizes, strides;
  DType dtype;
  Guard guard;
  int64_t base;  // elements before the first, or after the last
  std::vector<uint8_t> image;
  void* memory = nullptr;

  Memory(std::vector<int64_t> sizes_, std::vector<int64_t> strides_, DType dtype, Guard guard, int64_t base)
      : sizes(std::move(sizes_)), strides(std::move(strides_)), dtype(dtype), guard(guard), base(base) {
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    image.assign((last + 1 + base) * size_of(dtype), kCanary);
  }
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    return n;
  }
  // Where an element is in the image, by its index in row-major order.
  int64_t at(int64_t index) const {
    int64_t offset = guard == Guard::kAfter ? 0 : base;
    for (size_t d = sizes.size(); d-- > 0; index /= sizes[d]) offset += index % sizes[d] * strides[d];
    return offset * size_of(dtype);
  }
  double get(int64_t index) const { return element_at(dtype, &image[at(index)]); }
  uint32_t bits(int64_t index) const { return bits_at(dtype, &image[at(index)]); }
  void set(int64_t index, double value) { round_to(dtype, value, &image[at(index)]); }
  void set_integer(int64_t index, int64_t value) { std::memcpy(&image[at(index)], &value, size_of(dtype)); }
  void send(Target& target) {
    memory = target.allocate(image.size(), guard);
    target.write(memory, image.data(), image.size());
  }
  // Returns false if a byte has changed: any byte, or, with `written`, one that is no element's.
  bool receive(Target& target, bool written) {
    std::vector<uint8_t> want = image;
    target.read(image.data(), memory, image.size());
    for (int64_t i = 0; written && i < count(); ++i) std::memcpy(&want[at(i)], &image[at(i)], size_of(dtype));
    return want == image;
  }
  Tensor tensor() const {
    const int64_t first = guard == Guard::kAfter ? 0 : base * size_of(dtype);
    return {static_cast<uint8_t*>(memory) + first, sizes.data(), strides.data(),
            static_cast<int32_t>(sizes.size()),    dtype,        is_float(dtype) ? dtype_name(dtype) : "integer"};
  }
};

struct Run {
  std::vector<Memory> outputs;  // of q, of k, and the copies
  std::string error;
};

class Runner {
 public:
  explicit Runner(const RopeCase& c) : c_(c), random_(c.seed) {
    for (int i = 0; i < 4; ++i) {
      inputs_.push_back(heads(i, true));
      outputs_.push_back(heads(i, false));
      Memory& x = inputs_[i];
      for (int64_t j = 0; j < x.count(); ++j) x.set(j, c.wide ? wide() : normal());
      if (i >= 2) continue;
      weights_.push_back(Memory({c.head_dim}, {1}, c.weight == DType::kOther ? c.x : c.weight, c.guard, odd()));
      for (int64_t j = 0; j < c.head_dim; ++j) weights_[i].set(j, c.gemma ? 0.1 * normal() : 1 + 0.3 * normal());
    }
    if (c.cache) {
      const int64_t rows = 7, stride = c.rotary + (c.layout == Layout::kOddStrides ? 3 : 0);
      angles_.push_back(Memory({rows, c.rotary}, {stride, 1}, c.angles, c.guard, odd()));
      std::vector<int64_t> sizes = c.tokens;
      if (c.sections) sizes.insert(sizes.begin(), 3);
      angles_.push_back(Memory(sizes, row_major(sizes), c.index, c.guard, 0));
      for (int64_t j = 0; j < angles_[1].count(); ++j) angles_[1].set_integer(j, random_() % rows);
    } else {
      std::vector<int64_t> sizes = c.tokens;
      sizes.push_back(c.rotary);
      std::vector<int64_t> strides = row_major(sizes);
      if (c.shared_angles) strides[0] = 0;
      for (int i = 0; i < 2; ++i) angles_.push_back(Memory(sizes, strides, c.angles, c.guard, odd()));
    }
    for (int i = 0; i < (c.cache ? 1 : 2); ++i)
      for (int64_t j = 0; j < angles_[i].count(); ++j) angles_[i].set(j, normal());
  }

  Run run(Target& target) const {
    Runner r = *this;
    Tensor views[kOperands];
    const bool copies = c_.copied[0] || c_.copied[1];
    Call call{&QkNormRope::kInfos[c_.in_place ? 2 : copies ? 1 : 0], {}, {}};
    const auto give = [&](Operand o, Memory& m) {
      if (!m.memory) m.send(target);
      views[o] = m.tensor();
      call.tensors[o] = &views[o];
    };
    give(kX, r.inputs_[0]);
    give(kKey, r.inputs_[1]);
    give(kOut, c_.in_place ? r.inputs_[0] : r.outputs_[0]);
    give(kKeyOut, c_.in_place ? r.inputs_[1] : r.outputs_[1]);
    for (int i = 0; i < 2; ++i)
      if (c_.copied[i]) give(CopiedHeads::kFrom[i], r.inputs_[2 + i]), give(CopiedHeads::kTo[i], r.outputs_[2 + i]);
    if (c_.weight != DType::kOther) give(kWeight, r.weights_[0]), give(kKeyWeight, r.weights_[1]);
    give(c_.cache ? kCosSinCache : kCos, r.angles_[0]);
    give(c_.cache ? kPositions : kSin, r.angles_[1]);
    Options& options = call.options;
    options.gemma = c_.gemma;
    options.interleaved = c_.interleaved;
    options.round_each_step = c_.round_norm;
    options.round_rotation = c_.round_rotation;
    if (c_.sections) options.mrope_section = sections();
    options.mrope_interleaved = c_.sections == 2;
    Run result;
    Message message{};
    if (target.run(call, c_.variation, &message) != Status::kOk) result.error = message.text;
    for (int i = 0; i < 4; ++i) {
      if (!r.inputs_[i].memory) continue;
      if (!r.inputs_[i].receive(target, c_.in_place)) result.error = "a byte beside q or k was written";
      if (!c_.in_place && !r.outputs_[i].receive(target, true)) result.error = "a byte beside a result was written";
      result.outputs.push_back(c_.in_place ? r.inputs_[i] : r.outputs_[i]);
    }
    for (Memory* m : {&r.weights_[0], &r.weights_[1], &r.angles_[0], &r.angles_[1]})
      if (m->memory && !m->receive(target, false)) result.error = "an input was written";
    target.free_all();
    return result;
  }

  // "" if the results are right.
  std::string check(Target& target) const {
    const Run got = run(target);
    if (!got.error.empty()) return got.error;
    for (size_t i = 2; i < got.outputs.size(); ++i) {
      const Memory& x = inputs_[2 + (i == 3 || !c_.copied[0])];
      for (int64_t j = 0; j < x.count(); ++j)
        if (x.bits(j) != got.outputs[i].bits(j)) return "element " + std::to_string(j) + " of a copy differs";
    }
    for (int i = 0; i < 2; ++i) {
      const Memory &x = inputs_[i], &y = got.outputs[i];
      std::string error;
      const bool exact = c_.x == DType::kFloat32 || c_.round_rotation;
      const std::vector<double> norms = exact ? normed(target, i, &error) : std::vector<double>();
      if (!error.empty()) return error;
      for (int64_t row = 0; row < c_.token_count() * c_.heads[i]; ++row) {
        const int64_t token = row / c_.heads[i], first = row * c_.head_dim;
        double mean = 0, rstd;
        for (int64_t e = 0; e < c_.head_dim; ++e) mean += x.get(first + e) * x.get(first + e) / c_.head_dim;
        rstd = 1 / std::sqrt(mean + 1e-6);
        const auto norm = [&](int64_t e) {
          if (exact) return norms[first + e];
          const double w = c_.weight == DType::kOther ? 1 : weights_[i].get(e) + (c_.gemma ? 1 : 0);
          return x.get(first + e) * rstd * w;
        };
        for (int64_t e = 0; e < c_.head_dim; ++e) {
          double a = norm(e), b = 0;
          if (e < c_.rotary) {
            const int64_t half = c_.rotary / 2;
            const bool is_first = c_.interleaved ? e % 2 == 0 : e < half;
            const int64_t partner = c_.interleaved ? e ^ 1 : is_first ? e + half : e - half;
            a *= angle(0, token, e);
            b = (is_first ? -1 : 1) * norm(partner) * angle(1, token, e);
          }
          const double value = y.get(first + e);
          if (exact) {
            const auto step = [&](double v) { return rounded(c_.angles, rounded(DType::kFloat32, v)); };
            const double want = e < c_.rotary ? rounded(c_.x, step(step(a) + step(b))) : a;
            if (value != want && !(std::isnan(value) && std::isnan(want)))
              return text(i, row, e) + std::to_string(want) + ", got " + std::to_string(value);
          } else if (std::isfinite(a + b)) {
            // Some units for the norm, half of the sum's error, and one for each product and their sum.
            const double off = 24 * power(-24) * (std::fabs(a) + std::fabs(b)) + power(-149);
            const double beyond = power(format(c_.x).greatest + 1);
            const double most = std::fmin(std::fabs(a + b) + off, beyond);
            const double near = std::isinf(value) ? std::copysign(beyond, value) : value;
            if (!(std::fabs(near - std::fmax(std::fmin(a + b, beyond), -beyond)) <= 0.5 * ulp(c_.x, most) + off))
              return text(i, row, e) + std::to_string(a + b) + ", got " + std::to_string(value);
          } else if (std::isfinite(value)) {
            return text(i, row, e) + "no number, got " + std::to_string(value);
          }
        }
      }
    }
    return "";
  }

  // "" if both targets have the same bits.
  std::string compare(Target& a, Target& b, uint64_t* hash) const {
    const Run one = run(a), two = run(b);
    if (!one.error.empty() || !two.error.empty()) return one.error + two.error;
    for (size_t i = 0; i < one.outputs.size(); ++i)
      for (int64_t j = 0; j < one.outputs[i].count(); ++j) {
        const uint32_t number = std::isnan(one.outputs[i].get(j)) ? 0xffffffff : one.outputs[i].bits(j);
        if (hash) *hash = (*hash ^ number) * 0x100000001b3;
        if (one.outputs[i].bits(j) != two.outputs[i].bits(j) &&
            !(std::isnan(one.outputs[i].get(j)) && std::isnan(two.outputs[i].get(j))))
          return "element " + std::to_string(j) + " of result " + std::to_string(i) + " is not as on " + a.name();
      }
    return "";
  }

 private:
  static std::vector<int64_t> row_major(const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0; step *= sizes[d]) strides[d] = step;
    return strides;
  }
  std::string text(int i, int64_t row, int64_t e) const {
    return std::string(i ? "k" : "q") + "'s row " + std::to_string(row) + ", element " + std::to_string(e) +
           " must be ";
  }
  int64_t odd() { return c_.layout == Layout::kOddBase ? 1 + 2 * static_cast<int64_t>(random_() % 3) : 0; }
  Sections sections() const {
    const int64_t pairs = c_.rotary / 2, third = pairs / 3;
    Sections s;
    s.count = 3;
    s.sizes[0] = pairs - third - third / 2, s.sizes[1] = third, s.sizes[2] = third / 2;
    return s;
  }

  Memory heads(int i, bool is_input) {
    std::vector<int64_t> sizes = c_.tokens;
    sizes.push_back(i < 2 ? c_.heads[i] : c_.copied[i - 2]);
    sizes.push_back(c_.head_dim);
    std::vector<int64_t> strides = row_major(sizes);
    const size_t heads = sizes.size() - 2;
    if (sizes[sizes.size() - 2] == 0) sizes[sizes.size() - 2] = 1;  // its memory is not used
    const int64_t gap = c_.layout == Layout::kOddStrides ? 1 + 2 * i : c_.layout == Layout::kGaps ? c_.head_dim : 0;
    if (gap && (is_input || i == 0)) {
      int64_t step = c_.head_dim + gap;
      for (size_t d = heads + 1; d-- > 0; step = step * sizes[d] + gap) strides[d] = step;
    }
    if (c_.layout == Layout::kHeadsFirst) {
      int64_t step = c_.head_dim;
      for (size_t d = heads; d-- > 0; step *= sizes[d]) strides[d] = step;
      strides[heads] = step;
    }
    return Memory(sizes, strides, c_.x, c_.guard, odd());
  }

  // The target's own norm of q's or k's rows.
  std::vector<double> normed(Target& target, int i, std::string* error) const {
    const Memory& in = inputs_[i];
    const int64_t rows = in.count() / c_.head_dim;
    Memory x({rows, c_.head_dim}, {c_.head_dim, 1}, c_.x, Guard::kAfter, 0), y = x;
    for (int64_t j = 0; j < in.count(); ++j) std::memcpy(&x.image[x.at(j)], &in.image[in.at(j)], size_of(c_.x));
    Memory weight = weights_[i];
    x.send(target), y.send(target), weight.send(target);
    const Tensor views[] = {x.tensor(), y.tensor(), weight.tensor()};
    Call call{&RmsNorm::kInfos[0], {}, {}};
    call.tensors[kX] = &views[0];
    call.tensors[kOut] = &views[1];
    if (c_.weight != DType::kOther) call.tensors[kWeight] = &views[2];
    call.options.gemma = c_.gemma;
    call.options.round_each_step = c_.round_norm;
    Message message{};
    if (target.run(call, {}, &message) != Status::kOk) *error = message.text;
    y.receive(target, true);
    target.free_all();
    std::vector<double> values;
    for (int64_t j = 0; j < y.count(); ++j) values.push_back(y.get(j));
    return values;
  }

  double angle(int which, int64_t token, int64_t e) const {
    if (!c_.cache) return angles_[which].get(token * c_.rotary + e);
    const int64_t pairs = c_.rotary / 2, pair = c_.interleaved ? e / 2 : e % pairs;
    int64_t axis = 0;
    if (c_.sections) {
      const Sections s = sections();
      if (c_.sections == 1)
        axis = pair < s.sizes[0] ? 0 : pair < s.sizes[0] + s.sizes[1] ? 1 : 2;
      else if (pair % 3 != 0 && pair < 3 * s.sizes[pair % 3])
        axis = pair % 3;
    }
    int64_t position = 0;
    std::memcpy(&position, &angles_[1].image[angles_[1].at(axis * c_.token_count() + token)], size_of(c_.index));
    return angles_[0].get(position * c_.rotary + which * pairs + pair);
  }

  double uniform() { return random_() / 4294967296.0; }
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.7; }
  double wide() {
    if (random_() % 400 == 0) return random_() % 2 ? NAN : INFINITY;
    return normal() * std::exp2(24 * uniform() - 12);
  }

  RopeCase c_;
  std::mt19937 random_;
  std::vector<Memory> inputs_, outputs_, weights_, angles_;
};

}  // namespace

std::string check_rope(Target& target, const RopeCase& c) { return Runner(c).check(target); }
std::string compare_ropes(Target& a, Target& b, const RopeCase& c, uint64_t* hash) {
  return Runner(c).compare(a, b, hash);
}
std::string run_rope(Target& target, const RopeCase& c) { return Runner(c).run(target).error; }

}  // namespace gemma_norm
