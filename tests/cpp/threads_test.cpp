// Calls on CPUs from several threads at once, each of which spreads its rows over threads of its own, as PyTorch's pool
// does. The results must be right; `make test-sanitizers` also runs this under ThreadSanitizer, which sees what two
// threads write without an order between them.
#include <gtest/gtest.h>

#include <functional>
#include <mutex>
#include <thread>

#include "gradient_cases.h"
#include "rope_cases.h"
#include "runner.h"

namespace gemma_norm {
namespace {

class ThreadedTarget : public HostTarget {
 public:
  std::string name() const override { return "cpu, from threads"; }
  Status run(const Call& call, const Variation&, Message* message) override {
    return gemma_norm_cpu(&call, &parallel_for, message);
  }

 private:
  static void parallel_for(int64_t count, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    constexpr int64_t kThreads = 3;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < kThreads; ++i) {
      const int64_t begin = i * count / kThreads, end = (i + 1) * count / kThreads;
      if (begin < end) threads.emplace_back(body, context, begin, end);
    }
    for (std::thread& t : threads) t.join();
  }
};

// One of `step` cases, small enough to be many.
template <class Check>
void add_checks(const std::vector<Case>& cases, size_t step, const Check& check,
                std::vector<std::function<std::string(Target&)>>* checks) {
  for (size_t i = 0; i < cases.size(); i += step)
    if (const Case c = cases[i]; c.row_count() * c.hidden < 10000)
      checks->push_back([=](Target& target) {
        const std::string error = check(target, c);
        return error.empty() ? error : describe(c) + "\n  " + error;
      });
}

// The first call of all is among them, since it is the one that looks for the processor's instruction sets.
TEST(CpuThreads, CallsFromSeveralThreadsAreRight) {
  std::vector<std::function<std::string(Target&)>> checks;
  add_checks(all_cases(), 41, [](Target& t, const Case& c) { return check_case(t, c); }, &checks);
  add_checks(gradient_cases(), 17, [](Target& t, const Case& c) { return check_gradients(t, c); }, &checks);
  const std::vector<RopeCase> ropes = rope_cases();
  for (size_t i = 0; i < ropes.size(); i += 29)
    checks.push_back([c = ropes[i]](Target& target) { return check_rope(target, c); });
  ASSERT_LE(50u, checks.size());

  std::vector<std::string> errors;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (size_t first = 0; first < 4; ++first)
    threads.emplace_back([&, first] {
      ThreadedTarget target;
      for (size_t i = 0; i < checks.size(); ++i) {
        const std::string error = checks[(i + first) % checks.size()](target);
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error.empty()) errors.push_back(error);
      }
    });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(std::vector<std::string>{}, errors);
}

}  // namespace
}  // namespace gemma_norm
