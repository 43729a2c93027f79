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
  Status run(const Call& call, uint32_t seed, Message* message) override {
    // Half of the runs on a GPU that takes so few threads, though at least a block or cluster, that there must be several launches;
    // half with processors, where few rows are spread if there are clusters.
    const int64_t few = max_cluster_ * kMaxBlockThreads;
    const EmulatedGpu gpu{wave_width_, seed % 2 ? few : int64_t{1} << 32, max_cluster_, seed / 2 % 4, seed / 8 % 2 ? 132 : 0};
    return gemma_norm_emulated(&call, &gpu, message);
  }

 private:
  const char* name_;
  int wave_width_, max_cluster_;
};

// The library's entry, its rows split at random and done in another order.
class CpuTarget : public HostTarget {
 public:
  std::string name() const override { return "cpu"; }
  Status run(const Call& call, uint32_t seed, Message* message) override {
    random_.seed(seed);
    return gemma_norm_cpu(&call, seed % 4 ? &parallel_for : nullptr, message);
  }

 private:
  static void parallel_for(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    for (int64_t end = count; end > 0;) {
      const int64_t begin = end - 1 - static_cast<int64_t>(random_() % end);
      body(context, begin, end);
      end = begin;
    }
  }
  static inline std::mt19937 random_;
};

// One instruction set's row kernel.
class IsaTarget : public HostTarget {
 public:
  explicit IsaTarget(Isa isa) : isa_(isa) {}
  std::string name() const override { return std::string("cpu_") + isa_name(isa_); }
  std::string missing() const override {
    return isa_supported(isa_) ? "" : std::string("needs a processor with ") + isa_name(isa_);
  }
  Status run(const Call& call, uint32_t, Message* message) override {
    RowParams params;
    RowSlices slices;
    const Status status = check(call, &params, &slices, message);
    for (int64_t i = 0; status == Status::kOk && i < slices.count; ++i)
      cpu_rows(isa_, call.op)(select_slice(params, slices, i), 0, params.rows);
    return status;
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
