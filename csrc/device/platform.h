// The narrow device layer. Everything that differs between platforms is behind these names, in namespace gemma_norm::device:
//
//   GEMMA_NORM_DEVICE, GEMMA_NORM_KERNEL(max_threads, min_blocks)      qualifiers
//   thread_index() block_threads() block_index()                              ints; the last is an int64_t
//   wave_width()                                                             lanes of a wave (warp): 32 or 64
//   block_barrier()              orders the block's accesses to shared memory, not those to global memory
//   shared_memory<T>()           a T in the block's shared memory, one of each type T in a kernel; at first its bytes are anything
//   sum_over_lanes(v, lanes)     every lane gets the sum over its aligned group of `lanes` (a power of two <= wave_width()),
//                                added as a balanced binary tree, neighbours first
//   value_of_lane(distance, v)   v of the lane whose index is this one's ^ distance, in all lanes at once; where there are clusters
//   load_once(p) store_once(p, v)  a Vector16 or Vector8 that this kernel touches once: not worth a place in the caches
//   load(p)                        one that others will want too
//   kLoadsBeforeStores             a load behind a store may have to wait for it: kernels load first what they can
//   wait_for_load(v)               what waits for v's load waits here, not after a later store
//   keep_packed(v)                 what v was unpacked to before does not stay in registers: it is unpacked again
//   in_all_lanes(condition)        for a branch: where a device gains by it, of the wave as one; elsewhere of this lane alone
//   as_float(bits) as_bits(f) fma(a, b, c)                                   IEEE, round to nearest even
//   reciprocal_root<kQuick>(v)     1 / sqrt(v), v >= 0: the root rounded to nearest even, then its reciprocal; kQuick: for kernels
//                                  with registers to spare
//   Arithmetic                     what exponential.h computes with: of Arithmetic::kCount floats at once, load(f) and store(v, f)
//   unpack<T>(word, f) pack<T>(f)  a 32-bit word of T (float, float16, bfloat16) to its one or two floats and back
//   keep_nan(v)                    v; a NaN as one that pack<bfloat16> keeps: needed where its lower 16 bits may not be 0
//   wait_for_previous_kernel(pointers...) allow_next_kernel()               overlapped launches; nothing where there are none;
//                                                                           the pointers are worked out before the wait
//
//   kHasClusters (some target of this toolkit has thread block clusters) and kTargetHasClusters (the one compiled for now has);
//   where true, called by every thread of every block of a cluster:
//   cluster_index() cluster_rank() cluster_blocks()       of the cluster in the grid, of the block in it; how many there are in it
//   open_inbox(inbox, numbers)    before all else: each block will get so many numbers from each, itself included, in an exchange
//   wait_for_inboxes()            until all blocks have opened theirs; before the first exchange
//   send(number, inbox, rank, v)  (by one thread) v to the same variable of the block of that rank
//   wait_for_numbers(inbox, exchange)  until all numbers of the exchange have come; exchanges count from 0
//   expect_numbers(inbox, numbers)     after that, where there will be another exchange
//
// and for the host side: Stream, launch(kernel, grid, stream, facts, args...), facts(), Error and error_text().
#pragma once

#if defined(__HIP__)
#include "hip.h"
#elif defined(__CUDACC__)
#include "cuda.h"
#else
#include "emulated.h"
#endif
