// The row kernel for AVX-512 with its bfloat16 operations (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "row_kernel.h"

#include "avx512.h"  // after row_kernel.h, which says that products and sums are rounded one by one

namespace gemma_norm {

void rows_avx512_bf16(const RowParams& params, int64_t begin, int64_t end) { run<F32x32<true>>(params, begin, end); }

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
