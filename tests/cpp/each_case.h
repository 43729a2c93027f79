// Runs a check on many cases, and says in which of them a fault happened.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "cases.h"

namespace gemma_norm {

constexpr int kMaxFailures = 10;  // more would say little more

inline char running_case[400];

// A fault is an access beyond an operand. Says in which case it happened, before the program ends.
inline void on_fault(int signal, siginfo_t* info, void*) {
  char text[600];
  const int n =
      std::snprintf(text, sizeof text, "\naccess to %p, outside the operands, in: %s\n", info->si_addr, running_case);
  if (write(STDERR_FILENO, text, n) < 0) _exit(1);
  ::signal(signal, SIG_DFL);
}

class CatchFaults : public testing::Environment {
  void SetUp() override {
    static char stack[1 << 16];  // The stack of a fiber may be what overflowed, so that the handler needs another.
    const stack_t alternative{stack, 0, sizeof stack};
    sigaltstack(&alternative, nullptr);
    struct sigaction action{};
    action.sa_sigaction = &on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
  }
};
inline const auto* const catch_faults = testing::AddGlobalTestEnvironment(new CatchFaults);

// Runs `check(case)` on all cases until there are enough failures. On slow machines, it takes one case in `step`.
template <class Check>
void for_each_case(const std::vector<Case>& cases, const Check& check, int step = GEMMA_NORM_CASE_STEP) {
  int failures = 0, number = 0;
  for (const Case& c : cases) {
    if (number++ % step != 0) continue;
    std::snprintf(running_case, sizeof running_case, "%s", describe(c).c_str());
    const std::string error = check(c);
    if (error.empty()) continue;
    ADD_FAILURE() << describe(c) << "\n  " << error;
    ASSERT_LT(++failures, kMaxFailures) << "and so on";
  }
}

}  // namespace gemma_norm
