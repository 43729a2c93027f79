#include "bind.h"

namespace gemma_norm::binding {
namespace {

struct CpuEntry {
  static Status call(const Call& call, int32_t, Message* message) {
    return gemma_norm_cpu(&call, &parallel_for, message);
  }

  // Uses PyTorch's own thread pool with its settings.
  static void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    struct Range {
      void (*body)(void*, int64_t, int64_t);
      void* context;
    } range{body, context};
    const auto call = [](int64_t begin, int64_t end, void* r) {
      const auto* range = static_cast<const Range*>(r);
      range->body(range->context, begin, end);
    };
    require_success(torch_parallel_for(0, count, grain, call, &range), "parallel_for");
  }
};

}  // namespace
}  // namespace gemma_norm::binding

STABLE_TORCH_LIBRARY_IMPL(gemma_norm, CPU, m) { gemma_norm::binding::register_ops<gemma_norm::binding::CpuEntry>(m); }
