// The C++ tests' cases (tests/cpp) for a HIP library that an emulator runs: called from Python, knows nothing of it.
#include <cstdio>

#include "emulated.h"
#include "formats.h"
#include "runner.h"
#include "target.h"

namespace gemma_norm {
namespace {

using Entry = Status (*)(const Call* call, void* stream, Message* message);

class HipTarget : public HostTarget {
 public:
  explicit HipTarget(Entry entry) : entry_(entry) {}
  std::string name() const override { return "hip"; }
  Status run(const Call& call, uint32_t seed, Message* message) override {
    last_seed = seed;
    return entry_(&call, nullptr, message);
  }
  static inline uint32_t last_seed;

 private:
  Entry entry_;
};

// The same kernels compiled for the host, where division and root are IEEE's.
class OracleTarget : public HostTarget {
 public:
  std::string name() const override { return "oracle"; }
  Status run(const Call& call, uint32_t, Message* message) override {
    const EmulatedGpu gpu{32, int64_t{1} << 32, 1, 0};
    return gemma_norm_emulated(&call, &gpu, message);
  }
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = all_cases();
  return all;
}

// FNV-1a over the results, any NaN the same.
uint64_t hash(DType dtype, const Packed& elements, uint64_t so_far) {
  for (size_t i = 0; i < elements.size(); i += size_of(dtype)) {
    const double value = element_at(dtype, &elements[i]);
    so_far = (so_far ^ (std::isnan(value) ? 1u : bits_at(dtype, &elements[i]))) * 1099511628211u;
  }
  return so_far;
}

}  // namespace
}  // namespace gemma_norm

extern "C" {

int64_t case_count() { return static_cast<int64_t>(gemma_norm::cases().size()); }

const char* describe_case(int64_t index) {
  static std::string text;
  text = gemma_norm::describe(gemma_norm::cases()[index]);
  return text.c_str();
}

// Of the latest call that was made: what may vary without changing the result.
uint32_t last_seed() { return gemma_norm::HipTarget::last_seed; }

// "" if the case passes, else what is wrong; `bits` is a hash of the results.
const char* check_case(gemma_norm::Entry entry, int64_t index, uint64_t* bits) {
  using namespace gemma_norm;
  static std::string error;
  HipTarget target(entry);
  OracleTarget oracle;
  const Case& c = cases()[index];
  error = check_case(target, c);
  if (!error.empty()) return error.c_str();
  const Tensors inputs = make_inputs(c);
  const Tensors got = run_case(target, c, inputs, &error), want = run_case(oracle, c, inputs, &error);
  if (error.empty()) error = compare_bits(c.dtype_of(kResidualOut), c.hidden, want[kResidualOut], got[kResidualOut]);
  if (error.empty()) error = compare_bits(c.dtype, c.hidden, want[kOut], got[kOut]);
  *bits = hash(c.dtype, got[kOut], hash(c.dtype_of(kResidualOut), got[kResidualOut], 14695981039346656037u));
  return error.c_str();
}
}
