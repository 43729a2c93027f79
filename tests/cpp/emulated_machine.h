// What gives the emulated device (csrc/device/emulated.h) its threads, blocks and barriers.
#pragma once

#include <cstddef>
#include <set>

#include "device/emulated.h"
#include "emulated.h"

namespace gemma_norm::device {

// For the launches to come.
void set_machine(const EmulatedGpu& gpu);

// Every kernel that was launched since the program began.
const std::set<const void*>& launched_kernels();

}  // namespace gemma_norm::device

namespace gemma_norm {

// The kernels that rows of up to so many elements can ask for.
std::set<const void*> reachable_kernels(int64_t most_hidden);

}  // namespace gemma_norm
