// The device layer. Everything that differs between platforms is behind these names, in namespace gemma_norm::device.
//
//   GEMMA_NORM_DEVICE                qualifier of functions
//   GEMMA_NORM_KERNEL(max_threads, min_blocks)  qualifier of kernels
//   thread_index()                   an int
//   block_index()                    a uint32_t, less than 2^31
//   wave_width()                     lanes of a wave (NVIDIA: warp): 32 or 64
//   block_barrier()                  orders the block's accesses to shared memory, but not those to global memory
//   shared_memory<T>()               a T in the block's shared memory, uninitialised; a kernel has one for each
//                                    type T
//   sum_over_lanes(v, lanes)         in every lane, the sum over its aligned group of `lanes` lanes (a power of
//                                    two, at most wave_width()), added as a balanced binary tree, neighbours first
//   wave_barrier()                   no lane of the wave goes on before all have come here, and the order of their
//                                    accesses to memory before and after is kept; all lanes must call it
//   value_of_lane(distance, v)       the v of the lane whose index is this lane's ^ distance; all lanes must call
//                                    it
//   value_in_group(k, v, lanes)      the v of lane number k % lanes of this lane's aligned group of `lanes` lanes (a
//                                    power of two); k and lanes are the same in all lanes, and all must call it
//   kSwapsInRegisters                those two are as cheap as arithmetic; otherwise they go through shared memory
//   multiply_pairs<T>(a, b) add_pairs<T>(a, b)  for words of two 16-bit elements of type T: the bits of the float32
//                                    operation, rounded to T
//   load_once(p) store_once(p, v)    for a Vector16 or Vector8 that the kernel accesses once: not worth a place in
//                                    the caches
//   load(p)                          for one that will be read again
//   kPrefetches prefetch(p)          brings the vector at p closer, into a cache that the whole GPU shares; where
//                                    kPrefetches is false, nothing
//   kLoadsBeforeStores               if true, a load that follows a store may have to wait for it, so kernels load
//                                    first
//   wait_for_load(v)                 whoever uses v later waits for its load here, hence not for a store after this
//                                    point
//   keep_packed(v)                   makes the compiler forget what v was unpacked to, so that it frees those
//                                    registers and unpacks v again later
//   leave_unset(v)                   for a Vector16 that is copied before it is set, though nothing uses its value.
//                                    Nothing on GPUs; on the host v is set to 0, since compilers would warn
//   in_all_lanes(condition)          the condition of a branch; it may be false in a lane whose own condition is
//                                    true: on some devices it is true only if the condition is true in all lanes of
//                                    the wave
//   any_lane(condition)              whether the condition is true in any lane of the wave; all lanes must call it
//   as_float(bits) as_bits(f)        the same bits as another type
//   fma(a, b, c)                     a * b + c, rounded once, to nearest even
//   add(a, b)                        a + b, rounded by itself though a or b is a product; a plain + may become an fma
//   clamp(v, low, high)              min(max(v, low), high); for a NaN, either bound
//   reciprocal_root<kQuick>(v)       1 / sqrt(v) for v >= 0: the root is rounded to nearest even, then its
//                                    reciprocal; kQuick may be faster and takes more registers
//   Arithmetic                       the arithmetic that exponential.h needs, on Arithmetic::kCount floats at a
//                                    time
//   unpack<T>(word, f) pack<T>(f)    converts a 32-bit word of T (float, float16, bfloat16) to its one or two
//                                    floats, and back
//   quantize(f, format)              a word of four floats, each rounded to 8 bits as quantized::bits_of does
//   max_over_lanes(v, lanes)         the largest uint32_t of an aligned group of lanes, as sum_over_lanes sums
//   max_magnitude(a, b)              max(|a|, |b|); a NaN without a sign if one of them is NaN
//   max_in_block(p, v)               *p = max(*p, v), without interruption, for a variable in shared memory
//   keep_nan(v)                      v, with any NaN replaced by one that pack<bfloat16> keeps; without this,
//                                    pack<bfloat16> may turn a NaN whose lower 16 bits are not 0 into another value
//   need_together(values...)         where a kernel's arguments are loaded by instructions, loads those that the values
//                                    of successive calls are made of here, all at once
//   wait_for_previous_kernel(p...)   waits until the previous kernel's writes are visible, if launches overlap; the
//                                    pointers p are computed before the wait
//   allow_next_kernel()              the next kernel may start, if launches overlap
//   load_early(p)                    a load before wait_for_previous_kernel(), of memory that the previous kernel does
//                                    not write; that kernel must have waited before it allowed this one to start
//
//   kHasClusters                     some target of this toolkit has thread block clusters
//   kTargetHasClusters               the target being compiled for has them; only then the following are called, by
//                                    every thread of every block of a cluster
//   cluster_index()                  the index of the cluster in the grid, a uint32_t
//   cluster_rank()                   the index of the block in its cluster
//   cluster_blocks()                 how many blocks the cluster has
//   open_inbox(inbox, numbers)       before anything else: in each exchange, every block will receive this many
//                                    numbers from every block, itself included
//   wait_for_inboxes()               until all blocks have opened theirs; before the first exchange
//   send(number, inbox, rank, v)     called by one thread: writes v to the variable `number` of the block of that
//                                    rank
//   wait_for_numbers(inbox, n)       until all numbers of exchange n have arrived; exchanges count from 0
//   expect_numbers(inbox, numbers)   after that, if another exchange follows
//
// The host side has Stream, launch(kernel, grid, stream, facts, args...), facts(), Error and error_text().
#pragma once

#if defined(__HIP__)
#include "hip.h"
#elif defined(__CUDACC__)
#include "cuda.h"
#else
#include "emulated.h"
#endif
