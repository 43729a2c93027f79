#include <algorithm>
#include <random>

#include "core/check.h"
#include "cpu/isa.h"
#include "emulated.h"
#include "gpu/plan.h"
#include "target.h"

namespace gemma_norm {
namespace {

class EmulatedTarget : public HostTarget {
 public:
  EmulatedTarget(const char* name, int wave_width, int max_cluster)
      : name_(name), wave_width_(wave_width), max_cluster_(max_cluster) {}
  std::string name() const override { return name_; }
  Status run(const Call& call, const Variation& variation, Message* message) override {
    const int64_t one_cluster = max_cluster_ * kMaxBlockThreads, any_number = int64_t{1} << 32;
    const EmulatedGpu gpu{wave_width_, variation.few_threads ? one_cluster : any_number, max_cluster_, variation.order,
                          variation.processors ? 132 : 0};
    return gemma_norm_emulated(&call, &gpu, message);
  }

 private:
  const char* name_;
  int wave_width_, max_cluster_;
};

// The library's entry for CPUs.
class CpuTarget : public HostTarget {
 public:
  std::string name() const override { return "cpu"; }
  Status run(const Call& call, const Variation& variation, Message* message) override {
    random_.seed(variation.pieces);
    return gemma_norm_cpu(&call, variation.pieces ? &parallel_for : nullptr, message);
  }

 private:
  // Divides the rows into pieces of random length, and runs the last first.
  static void parallel_for(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    for (int64_t end = count; end > 0;) {
      const int64_t begin = end - 1 - static_cast<int64_t>(random_() % end);
      body(context, begin, end);
      end = begin;
    }
  }
  static inline std::mt19937 random_;
};

// The CPU kernel of one instruction set.
class IsaTarget : public HostTarget {
 public:
  explicit IsaTarget(Isa isa) : isa_(isa) {}
  std::string name() const override { return std::string("cpu_") + isa_name(isa_); }
  std::string missing() const override {
    return isa_supported(isa_) ? "" : std::string("needs a processor with ") + isa_name(isa_);
  }
  Status run(const Call& call, const Variation&, Message* message) override {
    return run_cpu(isa_, call, nullptr, message);
  }

 private:
  Isa isa_;
};

}  // namespace

const std::vector<std::unique_ptr<Target>>& targets() {
  static const auto all = [] {
    std::vector<std::unique_ptr<Target>> list;
    list.push_back(std::make_unique<EmulatedTarget>("emulated32", 32, 1));
    list.push_back(std::make_unique<EmulatedTarget>("emulated64", 64, 1));
    list.push_back(std::make_unique<EmulatedTarget>("emulated_clusters", 32, 8));
    list.push_back(std::make_unique<CpuTarget>());
    for (const Isa isa : kIsas) list.push_back(std::make_unique<IsaTarget>(isa));
    list.push_back(make_cuda_target());
    return list;
  }();
  return all;
}

Target& find_target(const std::string& name) {
  return **std::find_if(targets().begin(), targets().end(), [&](const auto& t) { return t->name() == name; });
}

}  // namespace gemma_norm
