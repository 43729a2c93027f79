"""The exact answer, how far a result is from it, and how far it may be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def oracle(
    s: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False, each_step: Any = None
) -> Tensor:
    """:func:`rms_norm` in float64, not rounded. ``s`` is x or the rounded sum of x and residual.

    Two properties of float32 are part of the contract, and the oracle has them: eps is rounded to float32, and a sum of
    squares that overflows float32 is infinite. Two others are not: squares and products that are subnormal in float32
    lose some of their bits there, or all (docs/contract.md, C6). ``each_step`` is the dtype to which
    ``s * rstd`` is rounded with ``round_each_step``, or None.
    """
    s64 = s.double()
    total = s64.square().sum(-1, keepdim=True)
    total = torch.where(total > torch.finfo(torch.float32).max, math.inf, total)
    eps32 = torch.tensor(eps, dtype=torch.float32).item()
    n = s64 / torch.sqrt(total / s.shape[-1] + eps32)
    if each_step is not None:
        n = n.to(each_step).double()
    if weight is None:
        return n
    return n * (1 + weight.double() if gemma else weight.double())


def ulp_error(y: Tensor, exact: Tensor) -> float:
    """The largest distance of an element of ``y`` from the float64 ``exact``, in units in the last place of y's dtype.

    A correctly rounded result is at most 0.5 units away. Two NaN have distance 0, and a NaN and a number are infinitely
    far apart. Infinity counts as the first power of two that the dtype cannot hold.
    """
    if y.numel() == 0:
        return 0.0
    info = torch.finfo(y.dtype)
    beyond = 2.0 ** math.frexp(info.max)[1]
    got, want = y.double().clamp(-beyond, beyond), exact.clamp(-beyond, beyond)
    _, exponent = torch.frexp(want.abs().clamp(info.tiny, info.max))  # want = m * 2^exponent with m in [0.5, 1)
    ulp = torch.ldexp(torch.full_like(want, info.eps), exponent - 1)
    error = torch.where(got == want, 0.0, (got - want).abs() / ulp)
    error = torch.where(got.isnan() & want.isnan(), 0.0, error.nan_to_num(nan=math.inf))
    return float(error.max())


def max_ulp_error(dtype: torch.dtype, hidden: int) -> float:
    """The largest :func:`ulp_error` that the contract allows.

    It is half a unit for the rounding of y, plus the error of the float32 arithmetic. Each float32 operation is off by
    at most 2^-24 of its result. That changes y by up to one float32 unit, or by up to half a unit if the operation
    comes before the square root.

    - 5 operations come after the sum: the root, the division, the product with s, 1 + w, and the product with that.
    - 3 operations come before the root: 1 / hidden, the mean, and adding eps.
    - The sum of squares comes before the root as well. Each square is rounded, then goes through a chain of additions,
      then through a tree, which is at most log2(hidden) deep. The partial sums of a chain are on average half of its
      last one, so n additions count as n / 2. On the CPU a chain adds 64 squares, of every 64th element, and another
      chain adds up these chains, of which there is one for each 4096 elements. On a GPU a chain is the vectors of a
      thread: 8 of them if the row fits into registers, otherwise a vector of 4 or 8 elements for each 512 threads, so
      at most hidden / 2048.

    In 16-bit dtypes all this is next to nothing, so a result that is truncated instead of rounded, or computed with a
    rounded ``1 + w``, exceeds the bound.
    """
    additions = math.log2(max(hidden, 1)) + (min(hidden / 64, 64) + hidden / 2048) / 2
    float32_units = 5 + (3 + 1 + additions) / 2
    return 0.5 + float32_units * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
