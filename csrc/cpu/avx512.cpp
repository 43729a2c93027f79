// The kernels for AVX-512 (F, BW, DQ, VL: Skylake-X and later).

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "avx512_vector.h"
#include "isa.h"
#include "kernels.h"

namespace gemma_norm {

const CpuKernels kAvx512Kernels = cpu_kernels<F32x32<false>>(ForwardOps());

}  // namespace gemma_norm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
