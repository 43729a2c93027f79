// The instruction sets that the kernels are compiled for, one file each, and the choice between them.
#pragma once

#include <cstdint>

#include "exact.h"  // before any formula

#include "../core/row_params.h"
#include "../ops/ops.h"

namespace gemma_norm {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kNeon };

constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kNeon};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and the processor has it
Isa best_isa();

// Computes rows [begin, end) of `params` on the calling thread.
using RowsFunction = void (*)(const RowParams& params, int64_t begin, int64_t end);

// An instruction set's function for each of Ops. The bits do not depend on the instruction set (see row_kernel.h).
struct CpuKernels {
  RowsFunction rows[Ops::kCount];
};
extern const CpuKernels kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels, kNeonKernels;

// The instruction set must be supported, and the operator in the table.
RowsFunction cpu_rows(Isa isa, const OpInfo* op);

}  // namespace gemma_norm
