// Makes compilers round each product and each sum. If they contracted one with the other, the instruction sets that
// have a fused multiply-add would give other bits than those that have none. Include this before any code. (Clang's
// -ffp-contract=fast overrides it.)
#pragma once

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
