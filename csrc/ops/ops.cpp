#include "ops.h"

#include <cstdio>
#include <cstring>

namespace gemma_norm {

Status no_such_operator(const Call& call, Message* message) {
  std::snprintf(message->text, sizeof message->text, "there is no operator %s", call.op->torch_name);
  return Status::kInvalidArgument;
}

}  // namespace gemma_norm

const gemma_norm::OpInfo* gemma_norm_op(const char* name) {
  const gemma_norm::OpInfo* found = nullptr;
  gemma_norm::Ops::each_info([&](const gemma_norm::OpInfo& info) {
    if (std::strcmp(info.torch_name, name) == 0) found = &info;
  });
  return found;
}
