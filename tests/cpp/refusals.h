// What check() says to a call, and lists of calls with what it has to say.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "test_call.h"

namespace gemma_norm {

// "" for a call that is let through, else the message.
inline std::string answer(const TestCall& call) {
  RowParams params;
  RowSlices slices;
  Message message{};
  const Status status = call.check(&params, &slices, &message);
  EXPECT_EQ(status == Status::kOk, message.text[0] == 0);
  return status == Status::kOk ? "" : message.text;
}

struct Refusal {
  std::function<void(TestCall&)> change;
  const char* message;
};

inline void expect_refusals(const std::vector<Refusal>& refusals) {
  for (const Refusal& refusal : refusals) {
    TestCall call;
    refusal.change(call);
    EXPECT_EQ(refusal.message, answer(call));
  }
}

}  // namespace gemma_norm
