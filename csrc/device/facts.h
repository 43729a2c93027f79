// What the host must know of a GPU to plan and launch a kernel.
#pragma once

#include <cstdint>

namespace gemma_norm {

constexpr int32_t kMaxCluster = 8;  // blocks of a thread block cluster

struct DeviceFacts {
  int32_t wave_width;      // 32, or 64 on AMD CDNA
  int64_t max_threads;     // the largest number of threads in a launch (HIP: 2^32 - 1)
  bool overlap_launch;     // the next kernel may start before this one ends (programmatic dependent launch)
  int32_t max_cluster;     // blocks of the largest thread block cluster; 1 if the GPU has no clusters
  int32_t processors = 0;  // streaming multiprocessors or compute units
};

// How many threads a launch starts.
struct Grid {
  int64_t groups;  // clusters; blocks if there are no clusters
  int32_t block_threads;
  int32_t cluster;  // blocks of a cluster; 1 if there are no clusters
};

}  // namespace gemma_norm
