// The kernels that exist, and what was measured to be quick for each. None of this changes a bit (shapes.h does). All of it was
// chosen on an H200; in quotation marks are the rows of docs/performance.md, "What was tried", that justify it. A GPU that wants
// other values gets a table of its own here.
#pragma once

#include <cstdint>

#include "../device/facts.h"
#include "shapes.h"

namespace gemma_norm {

enum class Scope : int32_t {
  kWave,     // several rows a wave, or one: no barrier
  kBlock,    // a block a row, held in registers
  kCluster,  // several blocks a row, held in registers
  kStream,   // a block a row that is too large for registers, read twice (from L2 the second time)
};

constexpr int32_t kMaxBlockThreads = 1024;

// What a thread holds of each vector that it owns, which is what takes its registers.
enum class Held : int32_t {
  kRow,             // one row, and weights as wide as its elements
  kRowWideWeights,  // one row, and weights twice as wide
  kTwoRows,         // two rows, such as x and residual
  kRowAndGates,     // a row and its gates, whose activations take many operations
};

// A kernel. Its threads hold so many vectors each, its blocks have at most so many threads.
struct KernelTuning {
  int64_t row_vectors;  // rows of up to so many vectors; 0: only few rows, which are spread over more threads (plan.h)
  Scope scope;
  int32_t vectors;
  int32_t max_block_threads;
  // How many threads should be resident on one multiprocessor, for each of Held. It goes into __launch_bounds__, so that a thread
  // has 65536 / resident_threads registers (an NVIDIA multiprocessor has 65536). 0: no such kernel. For many rows these keep 48 to
  // 96 KB of rows in flight on a multiprocessor, by three blocks or more, which saturates memory: with fewer blocks, all load and
  // then all store.
  int32_t resident_threads[4];
};

// The first that fits is taken. On GPUs without clusters, and for rows that are not spread, the kernels with clusters are passed
// over.
constexpr KernelTuning kKernels[] = {
    // "blocks of 128 for 64 threads, 2 vectors for 4; hidden 128, 256, 512"
    {64, Scope::kWave, 2, 128, {1536, 1024, 1024, 1024}},
    // "few gated rows of up to 32 vectors: two threads a slot, a vector each"
    {0, Scope::kWave, 1, 128, {0, 0, 0, 1024}},
    {128, Scope::kWave, 4, 64, {1024, 1024, 512, 512}},
    // "2 vectors a thread for 4, up to 4096"; "2 vectors a thread, six blocks of 256 for five"
    {512, Scope::kBlock, 2, 256, {1536, 1024, 1024, 1024}},
    // "4 vectors, fused, two blocks of 256 for three; five (not kept)"
    {1024, Scope::kBlock, 4, 256, {1024, 1024, 512, 512}},
    // "8 vectors, four blocks of 192 for three"
    {1536, Scope::kBlock, 8, 192, {768, 576, 384, 384}},
    // "8 vectors, three blocks of 256 for two"
    {2048, Scope::kBlock, 8, 256, {768, 512, 512, 512}},
    // "the same, three blocks a multiprocessor for two (80 registers for 90)"
    {16384, Scope::kCluster, 8, 256, {768, 512, 512, 512}},
    // Two rows do not fit into the 64 registers that a thread of the next kernel has and would be loaded in batches. With at most
    // 512 threads there are 128 registers, and both are loaded at once.
    {4096, Scope::kBlock, 8, 512, {0, 0, 512, 512}},
    {8192, Scope::kBlock, 8, 1024, {1024, 1024, 1024, 1024}},
    // "8 vectors by 1024 threads for a cluster of 8 x 256, 512 x 65536"
    {65536, Scope::kCluster, 8, 1024, {1024, 1024, 1024, 1024}},
    // "few rows by clusters of eight blocks of one warp (32768: of two)"
    {0, Scope::kCluster, 2, 256, {1536, 1024, 1024, 1024}},
    {0, Scope::kCluster, 4, 256, {1024, 1024, 512, 512}},
    {INT64_MAX, Scope::kStream, 1, kStreamSlots, {512, 512, 512, 512}},
};
constexpr int kKernelCount = sizeof kKernels / sizeof kKernels[0];

constexpr int find_kernel(Scope scope, int vectors, int max_block_threads) {
  int i = 0;
  while (kKernels[i].scope != scope || kKernels[i].vectors != vectors || kKernels[i].max_block_threads != max_block_threads) ++i;
  return i;
}

// Every row that a kernel may be given has the kernel's number of vectors a slot, by shapes.h: so it has at the largest row of each
// kernel, and kernels change wherever shapes do.
constexpr bool kernels_have_the_shapes() {
  for (const KernelTuning& kernel : kKernels)
    if (kernel.row_vectors && kernel.scope != Scope::kStream && find_shape(kernel.row_vectors, true)->vectors != kernel.vectors)
      return false;
  for (const Shape& shape : kShapes) {
    bool changes = false;
    for (const KernelTuning& kernel : kKernels) changes = changes || kernel.row_vectors == shape.row_vectors;
    if (!changes) return false;
  }
  return true;
}
static_assert(kernels_have_the_shapes());

// When a kernel that holds rows in registers asks for what.
template <int kVectors, int kMaxThreads, Held kHeld, int kItemBytes, bool kWideWeights, bool kGated, bool kRoundEachStep,
          bool kAligned>
struct LoadOrder {
  static constexpr bool kHasRegisters = kMaxThreads < kMaxBlockThreads;
  // All of the second row at once; else in batches.
  static constexpr bool kWholeRows = kHasRegisters;
  // The weights before the sum is known, so that they arrive meanwhile; not where eight vectors of x, of gates and of weights would
  // be held at once, which take more registers than there are.
  static constexpr bool kEarlyWeights = kVectors <= 2 || (kHasRegisters && !kWideWeights && !(kGated && kVectors == 8));
  // But after the second row: "weights asked for after the sum, 8 vectors, fused (not kept)".
  static constexpr bool kWeightsAfterRows = kHeld >= Held::kTwoRows && kVectors == 8;
  // The activations of the gates before the sum is known: a thread computes them while it waits, if it has registers for them.
  // "activations of up to 4 vectors computed before the sum is known ..."
  static constexpr bool kEarlyGate = kVectors <= 4;
  // With a branch around each store, a vector is stored before the next is computed; else compilers compute all of them first. "a
  // vector stored before the next is computed", and not "the same with 2 vectors, or with 1024 threads (not kept)".
  static constexpr bool kStoreOneByOne = kAligned && kVectors > 2 && kEarlyWeights;
  // A block of 1024 threads has registers for s in 16 bits, not for s in 32 bits too: it is unpacked twice. So has a thread that
  // holds eight vectors of gates.
  static constexpr bool kKeepPacked = (!kHasRegisters || (kGated && kVectors == 8)) && kItemBytes == 2;
  // Where kEarlyWeights is false, the weights of so many vectors are loaded together; where kWholeRows is false, their gates too.
  static constexpr int kBatch = !kHasRegisters && kGated ? 1 : (kHasRegisters || !kRoundEachStep ? 4 : 2) / (kWideWeights ? 2 : 1);
  // "the reciprocal root by Newton's steps", and not "the same with 8 vectors a thread (not kept: spills)".
  static constexpr bool kQuickRoot = kVectors <= 4;
};

// The same of a kernel that holds one vector at a time.
struct StreamOrder {
  static constexpr bool kWholeRows = true, kStoreOneByOne = false, kKeepPacked = false;
};

// Where few rows leave most of a GPU idle, each is spread over the blocks of a cluster ("few rows by clusters ..."): rows of which
// more than kWorthSpreading bytes are read and written ("the same for fewer bytes a row (not kept)"), as one multiprocessor moves
// that much in about the time of a cluster's exchange of sums; by two blocks a multiprocessor at most ("the same for more rows, 64
// (not kept)"), by one where a row is small, since starting blocks takes time as well.
constexpr int64_t kWorthSpreading = 24 * 1024;
constexpr int blocks_a_processor(int64_t row_bytes) { return row_bytes < 2 * kWorthSpreading ? 1 : 2; }

// Few small rows with gates get two threads a slot: no more than so many blocks a multiprocessor ("the same for 8192 x 128 (not
// kept)"). Without gates there is too little to share ("the same without gates (not kept)").
constexpr int kWorthSharing = 2;

// Threads of a block of a cluster; more where a cluster has too few blocks for that.
constexpr int32_t kClusterBlockThreads = 256;

}  // namespace gemma_norm
