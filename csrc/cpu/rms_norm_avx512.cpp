// The row kernel for AVX-512 (F, BW, DQ, VL: Skylake-X and later).
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "row_kernel.h"

#include "avx512.h"  // after row_kernel.h, which says that products and sums are rounded one by one

namespace gemma_norm {

void rows_avx512(const RowParams& params, int64_t begin, int64_t end) { run<F32x32<false>>(params, begin, end); }

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
