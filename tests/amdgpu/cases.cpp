// The C++ tests' cases (tests/cpp) for a HIP library that an emulator runs: called from Python, knows nothing of it.
#include <cstdio>

#include "emulated.h"
#include "formats.h"
#include "gradient_cases.h"
#include "rope_cases.h"
#include "runner.h"
#include "target.h"

namespace gemma_norm {
namespace {

using Entry = Status (*)(const Call* call, void* stream, Message* message);

class HipTarget : public HostTarget {
 public:
  explicit HipTarget(Entry entry) : entry_(entry) {}
  std::string name() const override { return "hip"; }
  Status run(const Call& call, const Variation& variation, Message* message) override {
    last_order = variation.order;
    return entry_(&call, nullptr, message);
  }
  static inline uint32_t last_order;

 private:
  Entry entry_;
};

// The same kernels compiled for the host, where division and root are IEEE's.
class OracleTarget : public HostTarget {
 public:
  std::string name() const override { return "oracle"; }
  Status run(const Call& call, const Variation&, Message* message) override {
    const EmulatedGpu gpu{32, int64_t{1} << 32, 1, 0};
    return gemma_norm_emulated(&call, &gpu, message);
  }
};

const std::vector<Case>& cases() {
  static const auto all = [] {
    std::vector<Case> list = all_cases();
    for (const bool gated : {false, true}) {
      // These take longer than the forward ones do, and are fewer.
      const std::vector<Case> few = few_rows_gradient_cases(gated);
      for (size_t i = 0; i < few.size(); i += 3) list.push_back(few[i]);
    }
    // Blocks with several steps of their loop: rows of a wave, the only ones that take less than a minute.
    list.push_back(many_rows_gradient_cases(false)[0]);
    return list;
  }();
  return all;
}

// After those come the cases of qk_norm_rope.
const std::vector<RopeCase>& ropes() {
  static const std::vector<RopeCase> all = rope_cases();
  return all;
}
bool is_rope(int64_t index) { return index >= static_cast<int64_t>(cases().size()); }
const RopeCase& rope(int64_t index) { return ropes()[index - cases().size()]; }

}  // namespace
}  // namespace gemma_norm

extern "C" {

int64_t case_count() { return static_cast<int64_t>(gemma_norm::cases().size() + gemma_norm::ropes().size()); }

const char* describe_case(int64_t index) {
  using namespace gemma_norm;
  static std::string text;
  text = is_rope(index) ? describe(rope(index)) : describe(cases()[index]);
  return text.c_str();
}

// Whether the latest call should run its blocks and waves last to first, which must not change the result.
bool runs_backwards() { return gemma_norm::HipTarget::last_order % 2; }

// Whether one case in so many includes this one. The last one is always included.
bool is_chosen(int64_t index, int64_t stride) { return index % stride == 0 || index + 1 == case_count(); }

// "" if the case passes, else what is wrong; `bits` is a hash of the results.
const char* check_case(gemma_norm::Entry entry, int64_t index, uint64_t* bits) {
  using namespace gemma_norm;
  static std::string error;
  HipTarget target(entry);
  OracleTarget oracle;
  *bits = kHashOfNothing;
  if (is_rope(index)) {
    error = check_rope(target, rope(index));
    if (error.empty()) error = compare_ropes(oracle, target, rope(index), bits);
    return error.c_str();
  }
  const Case& c = cases()[index];
  error = is_backward(c.operands) ? check_gradients(target, c) : check_case(target, c);
  if (!error.empty()) return error.c_str();
  const Tensors inputs = make_inputs(c);
  const Tensors got = run_case(target, c, inputs, &error), want = run_case(oracle, c, inputs, &error);
  if (error.empty()) error = compare_outputs(c, want, got);
  for (const Operand o : {kResidualOut, kOut, kDX, kDGate, kDWeight}) add_to_hash(c.dtype_of(o), got[o], bits);
  return error.c_str();
}
}
