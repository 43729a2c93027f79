// The instruction sets that the kernels are compiled for, each in a file of its own, and the choice between them.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "../core/check.h"
#include "../ops/ops.h"
#include "backward.h"

namespace gemma_norm {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kNeon };

constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kNeon};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // its kernels are in this library, and the processor has it
Isa best_isa();

// Computes rows [begin, end) of `params` on the calling thread.
using RowsFunction = void (*)(const RowParams& params, int64_t begin, int64_t end);

// Computes all heads of tokens [begin, end), for QkNormRope, and copies those that are copied.
using HeadsFunction = void (*)(const RowParams& params, const HeadParams& heads, const CopiedHeads& copied,
                               int64_t begin, int64_t end);

// The functions of an instruction set: one for each of ForwardOps, those of the backward operators, and that of
// QkNormRope. All instruction sets give the same bits (see row_kernel.h).
struct CpuKernels {
  RowsFunction rows[ForwardOps::kCount];
  BackwardKernels backward;
  HeadsFunction heads;
};
extern const CpuKernels kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kNeonKernels;

const CpuKernels& kernels_of(Isa isa);  // which must be supported

// The least number of elements for which another thread is worth its start: about 4 us of work, a few times as long as
// waking a thread takes. PyTorch itself uses the same number.
constexpr int64_t kGrain = 32768;

// Runs a checked call of a backward operator.
void run_backward(const BackwardKernels& kernels, const Call& call, const RowParams& params, const RowSlices& slices,
                  ParallelFor parallel_for);

// gemma_norm_cpu with an instruction set that is supported.
Status run_cpu(Isa isa, const Call& call, ParallelFor parallel_for, Message* message);

}  // namespace gemma_norm
