// Stands in for the emulated device's kernels in a build that runs the CPU's cases alone: compiling the kernels takes a
// minute.
#include <cstdio>
#include <set>

#include "cases.h"
#include "emulated.h"
#include "emulated_machine.h"

namespace gemma_norm {

std::set<const void*> reachable_kernels(int64_t) { return {}; }
std::set<const void*> backward_kernels() { return {}; }
std::set<const void*> rope_kernels() { return {}; }

}  // namespace gemma_norm

gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call*, const gemma_norm::EmulatedGpu*,
                                       gemma_norm::Message* message) {
  std::snprintf(message->text, sizeof message->text, "this build has no kernels for the emulated device");
  return gemma_norm::Status::kDeviceError;
}
