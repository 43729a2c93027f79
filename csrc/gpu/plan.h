// How a row is laid over threads: a pure function of hidden size, dtype and device facts, never of the number of rows, so that a
// row's bits do not depend on what else is in the batch. (How many blocks share those threads may: see spread().) Knows nothing of
// any GPU runtime: tested without one.
#pragma once

#include <cstdint>
#include <string>

#include "../gemma_norm.h"

namespace gemma_norm {

struct DeviceFacts {
  int32_t wave_width;      // 32, or 64 on AMD CDNA
  int64_t max_threads;     // the most threads a launch may have in all (HIP: 2^32 - 1)
  bool overlap_launch;     // the next kernel may start before this one ends (programmatic dependent launch)
  int32_t max_cluster;     // blocks that can exchange sums directly (thread block clusters); 1 where there is no such thing
  int32_t processors = 0;  // streaming multiprocessors; needed where there are clusters or overlap_launch
};

enum class Scope : int32_t {
  kWave,     // several rows a wave, or one: no barrier
  kBlock,    // a block a row, held in registers
  kCluster,  // several blocks a row, held in registers
  kStream,   // a block a row that is too large for registers, read twice (from L2 the second time)
};

constexpr int32_t kVectorBytes = 16;
constexpr int32_t kWaveBlockThreads = 128;  // at most
constexpr int32_t kMaxBlockThreads = 1024;
constexpr int32_t kMaxCluster = 8;

// A row of hidden elements is cut into 16-byte vectors; slot t (a thread) owns vectors t, t + slots, t + 2 slots, ...
// When hidden is no multiple of the vector, rows start at any alignment and a slot owns single elements instead, `slots` apart,
// so that neighbouring threads still touch neighbouring memory.
struct LaunchPlan {
  Scope scope;
  int32_t vectors;        // held in registers by each slot (kStream: owned, of which one is held at a time)
  int32_t slots;          // threads that own part of a row
  int32_t group_threads;  // threads that work on a row: slots rounded up to a power of two (kWave) or to whole waves or blocks
  int32_t block_threads;  // threads of a block
  int32_t most_threads;   // what the kernel is compiled for: the most that any plan of its shape has in a block
  int32_t cluster;        // blocks that work on a row: 1 but for kCluster
  bool whole_vectors;     // hidden is a multiple of the vector
  int32_t rows_per_block() const { return cluster > 1 ? 1 : block_threads / group_threads; }  // of each block, or cluster
};

LaunchPlan make_plan(int64_t hidden, DType dtype, const DeviceFacts& device);

// The plan for this many rows, of `row_bytes` to read and write each. Where they leave most of the GPU idle, a row's threads are
// spread over the blocks of a cluster: the same slots, which own the same elements, in the same tree. The same bits, therefore.
LaunchPlan spread(const LaunchPlan& plan, int64_t rows, int64_t row_bytes, const DeviceFacts& device);

// The most blocks (kCluster: clusters) that one launch may have.
int64_t max_blocks(const LaunchPlan& plan, const DeviceFacts& device);

// "block: 256 threads a row, 2 vectors of 8 elements each".
std::string describe(const LaunchPlan& plan, DType dtype);

}  // namespace gemma_norm
