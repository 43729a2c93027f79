// The emulated device's entry of the C interface: as gemma_norm_cuda, with the kind of GPU to be.
#pragma once

#include "gemma_norm.h"

namespace gemma_norm {

struct EmulatedGpu {
  int32_t wave_width;      // 32 or 64
  int64_t max_threads;     // of a launch in all: a call with more rows takes several launches
  int32_t max_cluster;     // blocks of a thread block cluster: 1, or 8 as on Hopper
  uint32_t order;          // 0: blocks, waves and lanes run first to last; else in the random order of this seed
  int32_t processors = 0;  // multiprocessors; 0: rows are never spread
};

}  // namespace gemma_norm

extern "C" {
gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* gpu,
                                       gemma_norm::Message* message);
}
