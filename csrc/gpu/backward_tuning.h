// The kernels of the backward pass, and how many chunks of rows they have. T1, T2, ... are rows of docs/tuning-log.md.
//
// A chunk is the rows that one block works on, and it has one row of partial sums of dweight. The number of chunks is a
// function of rows, hidden size and dtype. It does not depend on the GPU, so dweight has the same bits on a GPU with
// fewer multiprocessors.
#pragma once

#include <cstdint>

#include "tuning.h"

namespace gemma_norm {

constexpr int32_t kRegisterBytes = 256 * 1024;  // of a multiprocessor, on NVIDIA GPUs

struct BackwardThreads {
  int32_t rows;      // that a thread has at a time
  int32_t resident;  // threads of a multiprocessor; see KernelTuning
};

struct BackwardTuning {
  int64_t row_vectors;  // the largest row, in vectors of x
  Scope scope;          // kWave, kBlock or kTwoPasses
  int32_t vectors;      // that a thread holds of each row
  int32_t max_block_threads;
  BackwardThreads of[2];  // without a gate, and with one
  int32_t chunks;         // at most so many
};

// The first entry that fits the row is used. Registers limit the resident threads, and more blocks than the H100's 132
// multiprocessors hold at a time would run one after another (T107).
constexpr BackwardTuning kBackwardKernels[] = {
    {32, Scope::kWave, 1, 256, {{2, 512}, {1, 512}}, 264},  // T101
    {64, Scope::kWave, 2, 256, {{1, 512}, {1, 256}}, 264},
    {128, Scope::kBlock, 1, 128, {{2, 640}, {1, 512}}, 528},  // T101, T103
    {256, Scope::kBlock, 1, 256, {{2, 512}, {1, 512}}, 264},  // T101
    {512, Scope::kBlock, 1, 512, {{2, 512}, {1, 512}}, 132},  // T101
    {640, Scope::kBlock, 1, 640, {{2, 640}, {1, 640}}, 132},  // T103
    {1024, Scope::kBlock, 2, 512, {{1, 512}, {1, 512}}, 132},
    {2048, Scope::kBlock, 4, 512, {{1, 512}, {1, 512}}, 132},
    {INT64_MAX, Scope::kTwoPasses, 1, kTwoPassSlots, {}, 264},
};
// Whether there is a kernel for blocks whose groups have one row each. With four vectors a thread has too few registers
// for one.
constexpr bool has_one_row_kernel(const BackwardTuning& kernel) {
  return kernel.scope != Scope::kTwoPasses && kernel.vectors < 4;
}
constexpr int kBackwardKernelCount = sizeof kBackwardKernels / sizeof kBackwardKernels[0];

// The columns of dweight that a block of sum_chunks() has, and the threads of a column: at least one for so many
// chunks (T108). With the least number, a block has 64 threads, so that it has whole waves on every GPU.
constexpr int32_t kSumColumns = 32, kLog2MinSumParts = 1, kLog2MaxSumParts = 5, kChunksOfPart = 8;
constexpr int32_t kMaxSumParts = 1 << kLog2MaxSumParts;

// sum_rows(): how many rows a thread has at most, and the threads that share the rows at least. With these, a block has
// at least 64 threads.
constexpr int32_t kRowsOfPart = 4, kMinRowParts = 16;

}  // namespace gemma_norm
