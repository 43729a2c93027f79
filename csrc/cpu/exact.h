// Products and sums are rounded one by one: a fused multiply-add rounds once where an instruction set without it rounds twice. To
// be included before any code. (Clang's -ffp-contract=fast overrules this.)
#pragma once

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
