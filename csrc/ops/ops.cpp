#include "ops.h"

#include <cstring>

const gemma_norm::OpInfo* gemma_norm_op(const char* name) {
  const gemma_norm::OpInfo* found = nullptr;
  gemma_norm::Ops::each_info([&](const gemma_norm::OpInfo& info) {
    if (std::strcmp(info.torch_name, name) == 0) found = &info;
  });
  return found;
}
