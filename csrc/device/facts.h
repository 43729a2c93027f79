// What the host knows of a GPU.
#pragma once

#include <cstdint>

namespace gemma_norm {

constexpr int32_t kMaxCluster = 8;  // blocks of a thread block cluster

struct DeviceFacts {
  int32_t wave_width;      // 32, or 64 on AMD CDNA
  int64_t max_threads;     // the most threads a launch may have in all (HIP: 2^32 - 1)
  bool overlap_launch;     // the next kernel may start before this one ends (programmatic dependent launch)
  int32_t max_cluster;     // blocks that can exchange sums directly (thread block clusters); 1 where there is no such thing
  int32_t processors = 0;  // streaming multiprocessors; needed where there are clusters or overlap_launch
};

// How many threads to start.
struct Grid {
  int64_t groups;  // blocks, or clusters
  int32_t block_threads;
  int32_t cluster;  // blocks of a group
};

}  // namespace gemma_norm
