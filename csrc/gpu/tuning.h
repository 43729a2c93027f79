// The kernels that exist, and for each the choices that were measured to be fast. None of them changes a bit of a
// result (shapes.h does). T1, T2, ... are the rows of docs/tuning-log.md that justify the choices; they were measured
// on an H200 and on H100s. A GPU that needs other values should get a table of its own here.
#pragma once

#include <cstdint>

#include "../device/facts.h"
#include "shapes.h"

namespace gemma_norm {

enum class Scope : int32_t {
  kWave,       // a wave has one row or several; needs no barrier
  kBlock,      // a block has one row and holds it in registers
  kCluster,    // several blocks have one row and hold it in registers
  kTwoPasses,  // a block has one row, too large for its registers, and reads it twice (from L2 the second time)
};

constexpr int32_t kMaxBlockThreads = 1024;

// The groups of a row whose largest elements a block keeps at a time, when it quantises.
constexpr int32_t kMaxGroups = 1024;

// What a thread holds for each vector of s that it owns. This determines how many registers it needs.
enum class Held : int32_t {
  kRow,                  // a row, and weights as wide as its elements
  kRowWideWeights,       // a row, and weights twice as wide as its elements
  kTwoRows,              // two rows, such as x and residual
  kRowAndGates,          // a row and its gates, whose activations take many operations
  kTwoRowsTwoWeights,    // two rows, x and residual, and a weight for the norm of x beside that for the norm of the sum
  kQuantizedRow,         // a row and weights as wide as its elements, and then its norm in float32
  kTwoQuantizedRows,     // two rows, and then the norm of their sum in float32
  kQuantizedRowAndMore,  // a row, its gates or weights twice as wide as its elements, and then its norm in float32
};

// A kernel, except for its types.
struct KernelTuning {
  // The largest row, in vectors. 0: only for few rows, which are spread over more threads (see spread() in plan.h).
  int64_t row_vectors;
  Scope scope;
  int32_t vectors;  // that a thread holds
  int32_t max_block_threads;
  // How many threads should be resident on one multiprocessor, for each value of Held. This goes into
  // __launch_bounds__, so a thread may use 65536 / resident_threads registers (an NVIDIA multiprocessor has 65536). 0
  // means that there is no such kernel. With many rows, these values keep 48 to 96 KB of rows in flight on a
  // multiprocessor and give it at least three blocks. With fewer blocks, all of them load and then all of them store,
  // and memory is not kept busy.
  int32_t resident_threads[8];
};

// The first entry that fits the row is used. Entries with kCluster are skipped on GPUs without clusters. Entries whose
// row_vectors is 0 are used only by spread().
constexpr KernelTuning kKernels[] = {
    {64, Scope::kWave, 2, 128, {1536, 1024, 1024, 1024, 1024, 1024, 1024, 768}},  // T9
    {0, Scope::kWave, 1, 128, {0, 0, 0, 1024, 0, 0, 0, 1024}},                    // T54, T157
    {128, Scope::kWave, 4, 64, {1024, 1024, 512, 512, 512, 640, 512, 512}},
    {512, Scope::kBlock, 2, 256, {1536, 1024, 1024, 1024, 1024, 1280, 1024, 768}},  // T6, T8
    {1024, Scope::kBlock, 4, 256, {1024, 1024, 512, 512, 512, 768, 512, 512}},      // T32
    {1536, Scope::kBlock, 8, 192, {768, 576, 384, 384, 384, 384, 384, 384}},        // T33
    {2048, Scope::kBlock, 8, 256, {768, 512, 512, 512, 512, 512, 512, 512}},        // T31
    {16384, Scope::kCluster, 8, 256, {768, 512, 512, 512, 512, 256, 256, 256}},     // T25
    // In the next kernel a thread has 64 registers, which are too few for two rows, so these would be loaded in
    // batches. With at most 512 threads a thread has 128 registers, and both rows are loaded at once.
    {4096, Scope::kBlock, 8, 512, {0, 0, 512, 512, 512, 512, 512, 512}},
    {8192, Scope::kBlock, 8, 1024, {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024}},
    {65536, Scope::kCluster, 8, 1024, {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024}},  // T19
    {0, Scope::kCluster, 2, 256, {1536, 1024, 1024, 1024, 1024, 1280, 1024, 768}},        // T34
    {0, Scope::kCluster, 4, 256, {1024, 1024, 512, 512, 512, 768, 512, 512}},
    {INT64_MAX, Scope::kTwoPasses, 1, kTwoPassSlots, {512, 512, 512, 512, 512, 512, 512, 512}},
};
constexpr int kKernelCount = sizeof kKernels / sizeof kKernels[0];

constexpr int find_kernel(Scope scope, int vectors, int max_block_threads) {
  int i = 0;
  while (kKernels[i].scope != scope || kKernels[i].vectors != vectors ||
         kKernels[i].max_block_threads != max_block_threads)
    ++i;
  return i;
}

// Whether a slot of each row has as many vectors (shapes.h) as the kernel that the row gets. That is so if it holds for
// the largest row of each kernel, and if every shape's largest row is also a kernel's.
constexpr bool kernels_have_the_shapes() {
  for (const KernelTuning& kernel : kKernels)
    if (kernel.row_vectors && kernel.scope != Scope::kTwoPasses &&
        find_shape(kernel.row_vectors, true)->vectors != kernel.vectors)
      return false;
  for (const Shape& shape : kShapes) {
    bool changes = false;
    for (const KernelTuning& kernel : kKernels) changes = changes || kernel.row_vectors == shape.row_vectors;
    if (!changes) return false;
  }
  return true;
}
static_assert(kernels_have_the_shapes());

// The order in which a kernel that holds rows in registers loads, computes and stores.
template <int kVectors, int kMaxThreads, Held kHeld, int kItemBytes, bool kWideWeights, bool kGated,
          bool kRoundEachStep, bool kAligned>
struct LoadOrder {
  static constexpr bool kHasRegisters = kMaxThreads < kMaxBlockThreads;
  // Load the second row at once; otherwise in batches.
  static constexpr bool kWholeRows = kHasRegisters;
  // Load the weights before the sum is known, so that they arrive while the threads exchange. Not if a thread would
  // hold eight vectors each of x, of gates and of weights: there are not enough registers for those.
  static constexpr bool kEarlyWeights = kVectors <= 2 || (kHasRegisters && !kWideWeights && !(kGated && kVectors == 8));
  // Load those weights after the second row was used, but still before the sum: after it was slower (T20).
  static constexpr bool kWeightsAfterRows = (kHeld == Held::kTwoRows || kHeld == Held::kRowAndGates ||
                                             kHeld == Held::kTwoRowsTwoWeights || kHeld == Held::kTwoQuantizedRows) &&
                                            (kVectors == 8 || (kHeld == Held::kTwoRowsTwoWeights && kWideWeights));
  // Load the weights of x's own norm together with the rows. A thread has no registers for eight vectors of two rows
  // and of weights; then they are loaded after x's sum is known, this many vectors together.
  static constexpr bool kEarlyPostWeights = kEarlyWeights && kVectors < 8;
  static constexpr int kPostBatch = kWideWeights ? 2 : 4;
  // With eight vectors, the norm of each vector is in a branch of its own if it is held: that of x, and what is
  // quantised (T145, T147). Without it, nvcc loads or unpacks all weights at once and spills. (Not that of x where sums
  // are computed before one is stored: behind the branches, compilers for AMD wait for stores too early.)
  static constexpr bool kNormOneByOne = kVectors == 8;
  // Compute the activations of the gates before the sum is known, while the thread waits anyway; they take registers
  // (T51).
  static constexpr bool kEarlyGate = kVectors <= 4;
  // Put a branch around each store, so that a vector is stored before the next is computed. Without it compilers
  // compute all vectors first (T17). With 2 vectors, or with 1024 threads, it was slower (T18).
  static constexpr bool kStoreOneByOne = kAligned && kVectors > 2 && kEarlyWeights;
  // Unpack s twice, for the sum and for the output, instead of keeping it in float32. A block of 1024 threads has
  // registers for the 16-bit form only, and so has a thread that holds eight vectors of gates. A thread that holds
  // eight vectors of x and of residual keeps x as it is until it is normalised, vector by vector, even if it is
  // float32.
  static constexpr bool kKeepPacked = ((!kHasRegisters || (kGated && kVectors == 8)) && kItemBytes == 2) ||
                                      (kHeld == Held::kTwoRowsTwoWeights && kVectors == 8);
  // If kEarlyWeights is false, the weights of this many vectors are loaded together; if kWholeRows is false, so are
  // their gates.
  static constexpr int kBatch =
      !kHasRegisters && kGated ? 1 : (kHasRegisters || !kRoundEachStep ? 4 : 2) / (kWideWeights ? 2 : 1);
  // Take the faster reciprocal root, which needs more registers (T29). With 8 vectors it spilled some (T30).
  static constexpr bool kQuickRoot = kVectors <= 4;
};

// The same for a kernel that holds one vector at a time.
struct TwoPassOrder {
  static constexpr bool kWholeRows = true, kStoreOneByOne = false, kKeepPacked = false;
};

// Few rows leave most of a GPU idle, so each is spread over the blocks of a cluster (T34). It must read and write more
// than kWorthSpreading bytes (T35): one multiprocessor moves that much in about the time that a cluster needs to
// exchange sums. A multiprocessor may get at most two such blocks (T36), or one if the row is small, because starting
// blocks takes time as well.
constexpr int64_t kWorthSpreading = 24 * 1024;
constexpr int blocks_a_processor(int64_t row_bytes) { return row_bytes < 2 * kWorthSpreading ? 1 : 2; }

// Few small rows with gates get two threads a slot, as long as that needs no more than this many blocks a
// multiprocessor (T56, T157). Without gates there is too little work to share (T55).
constexpr int kWorthSharing = 2;

// The threads of a block of a cluster. There are more if kMaxCluster such blocks are too few for the row.
constexpr int32_t kClusterBlockThreads = 256;

}  // namespace gemma_norm
