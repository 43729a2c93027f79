// The qualifier of functions that GPU kernels and CPU kernels both call.
#pragma once

#if defined(__CUDACC__) || defined(__HIP__)
#define GEMMA_NORM_ANYWHERE __device__ __attribute__((always_inline)) inline
#else
#define GEMMA_NORM_ANYWHERE __attribute__((always_inline)) inline
#endif
