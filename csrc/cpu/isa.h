// The instruction sets that the kernels are compiled for, each in a file of its own, and the choice between them.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "../core/row_params.h"
#include "../ops/ops.h"

namespace gemma_norm {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kNeon };

constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kNeon};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // its kernels are in this library, and the processor has it
Isa best_isa();

// Computes rows [begin, end) of `params` on the calling thread.
using RowsFunction = void (*)(const RowParams& params, int64_t begin, int64_t end);

// The functions of an instruction set, one for each of ForwardOps. All instruction sets give the same bits (see
// row_kernel.h).
struct CpuKernels {
  RowsFunction rows[ForwardOps::kCount];
};
extern const CpuKernels kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kNeonKernels;

// The function for an operator of the table, with an instruction set that is supported.
RowsFunction cpu_rows(Isa isa, const OpInfo* op);

}  // namespace gemma_norm
