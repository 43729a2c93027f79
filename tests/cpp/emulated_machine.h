// The machine beneath the emulated device (csrc/device/emulated.h): it has the threads, blocks and barriers.
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

// Whether kernels run, as they do at first, or launches are only checked and noted.
void run_kernels(bool run);

}  // namespace gemma_norm::device

namespace gemma_norm {

// The kernels that a plan names for some row of up to so many elements.
std::set<const void*> reachable_kernels(int64_t most_hidden);

// Every kernel of the backward operators.
std::set<const void*> backward_kernels();

}  // namespace gemma_norm
