// The emulated device's entry of the C interface. It is as gemma_norm_cuda, and is told what kind of GPU to be.
#pragma once

#include "gemma_norm.h"

namespace gemma_norm {

struct EmulatedGpu {
  int32_t wave_width;      // 32 or 64
  int64_t max_threads;     // of a launch in all: a call with more rows takes several launches
  int32_t max_cluster;     // blocks of a thread block cluster: 1, or 8 as on Hopper
  uint32_t order;          // of blocks, waves and lanes: 0 is first to last, else random by this seed
  int32_t processors = 0;  // multiprocessors; with 0, rows are never spread
};

}  // namespace gemma_norm

extern "C" {
gemma_norm::Status gemma_norm_emulated(const gemma_norm::Call* call, const gemma_norm::EmulatedGpu* gpu,
                                       gemma_norm::Message* message);
}
