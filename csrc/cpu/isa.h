// The instruction sets that the row kernel is compiled for, one file each, and the choice between them.
#pragma once

#include <cstdint>

#include "../core/row_params.h"

namespace gemma_norm {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kNeon };

constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kNeon};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // compiled in, and the processor has it
Isa best_isa();

// Normalises rows [begin, end) of `params` on the calling thread. The instruction set must be supported; the bits do not depend
// on which (see row_kernel.h).
void cpu_rows(Isa isa, const RowParams& params, int64_t begin, int64_t end);

// What cpu_rows chooses from.
void rows_generic(const RowParams& params, int64_t begin, int64_t end);
void rows_avx2(const RowParams& params, int64_t begin, int64_t end);
void rows_avx512(const RowParams& params, int64_t begin, int64_t end);
void rows_avx512_bf16(const RowParams& params, int64_t begin, int64_t end);
void rows_neon(const RowParams& params, int64_t begin, int64_t end);

}  // namespace gemma_norm
