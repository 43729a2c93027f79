// For targets without thread block clusters: the names, so that the kernels compile. No plan for such a device has clusters.
#pragma once

namespace gemma_norm::device {

GEMMA_NORM_DEVICE void cluster_arrive() {}
GEMMA_NORM_DEVICE void cluster_wait() {}
GEMMA_NORM_DEVICE int cluster_rank() { return 0; }
GEMMA_NORM_DEVICE int cluster_blocks() { return 1; }
GEMMA_NORM_DEVICE void store_in_block(float* shared, int, float v) { *shared = v; }

}  // namespace gemma_norm::device
