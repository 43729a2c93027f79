"""The numerical contract in plain PyTorch, the exact answer, and the distance between an answer and the exact one.

``rms_norm`` and ``add_rms_norm`` are the operators' definition, and run where there is no native kernel. ``oracle``
computes in float64. ``ulp_error`` and ``max_ulp_error`` say how far a result is from it and how far it may be: the
tests and ``python -m gemma_norm`` share them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False, round_each_step: bool = False
) -> Tensor:
    """``round(x * rstd * (gemma ? 1 + weight : weight))`` with ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    All in float32, rounded once, to x's dtype. A sum of squares beyond float32 is infinite, hence rstd and y are 0.
    ``round_each_step``: ``round(round(x * rstd) * weight)``. Without a weight it is 1.
    """
    return _norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)


def _norm(
    s: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool
) -> Tensor:
    rstd = 1 / torch.sqrt(s.square().mean(-1, keepdim=True) + eps)
    n = s * rstd
    if round_each_step:
        n = n.to(dtype).float()
    if weight is not None:
        n = n * (1 + weight.float() if gemma else weight.float())
    return n.to(dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` with ``s = x + residual`` or ``x + (residual + post_residual_addition)``.

    s has the residual's dtype, and the norm of it x's.
    """
    if post_residual_addition is not None:
        residual = residual + post_residual_addition
    s = (x + residual).to(residual.dtype)
    return _norm(s.float(), x.dtype, weight, eps, gemma, round_each_step), s


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each_step: bool = False,
) -> Tensor:
    """``round(x * rstd * weight * act(gate))``, or with ``norm_before_gate=False`` ``round(s * rstd * weight)``.

    ``s = x * act(gate)``, in float32. act is silu, or the logistic function; without a gate it is 1. rstd is each
    group's own. ``round_each_step``: ``round(round(round(x * rstd) * weight) * act(gate))``, and
    ``round(round(s * rstd) * weight)``.
    """
    s, dtype = x.float(), x.dtype
    activation = None
    if gate is not None:
        activation = torch.sigmoid(gate.float()) if sigmoid else torch.nn.functional.silu(gate.float())
    if activation is not None and not norm_before_gate:
        s = s * activation
    groups = s.reshape(*s.shape[:-1], -1, group_size or s.shape[-1])
    n = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    n = (n.to(dtype).float() if round_each_step else n) * weight.float()
    if activation is not None and norm_before_gate:
        n = (n.to(dtype).float() if round_each_step else n) * activation
    return n.to(dtype)


def oracle(
    s: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False, each_step: Any = None
) -> Tensor:
    """:func:`rms_norm` in float64 and not rounded, ``s`` being x or the (rounded) sum.

    Two properties of float32 are part of the contract and hence of the oracle: eps is a float32, and a sum of squares
    beyond float32 is infinite. Two more are not: squares and products that are subnormal in float32 have fewer bits
    there, or none (docs/contract.md, "Where float32 shows"). ``each_step``: the dtype to which ``s * rstd`` is rounded.
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
    """The largest distance of ``y`` from the float64 ``exact``, in units in the last place of y's dtype.

    A correctly rounded result is at most 0.5 away. NaN must meet NaN (else the distance is infinite). Infinity counts
    as the first power of two that the dtype cannot hold.
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
    """The largest :func:`ulp_error` that the contract allows: half a unit for the rounding, and the float32 arithmetic.

    A float32 operation is off by 2^-24 of its result at most, which is worth up to one float32 unit of y, or up to half
    a unit if it comes before the square root.

    - 5 come after: the root, the division, the product with s, 1 + w, and the product with that.
    - 3 come before: 1 / hidden, the mean, and adding eps.
    - So does the sum of squares. Each square is rounded, becomes part of a chain of additions and then of a tree, which
      is no deeper than log2(hidden). A chain's partial sums are half of its last one on average, so n additions count
      as n / 2. On the CPU a chain is 64 squares long, of every 64th element, and another one adds up the chains, one
      for 4096 elements. On a GPU it is a thread's vectors: 8 where a row fits into registers, else a vector of 4 or 8
      elements for each 512 threads, hence at most hidden / 2048.

    In 16 bits all that is next to nothing, so truncating instead of rounding, or rounding ``1 + w``, exceeds the bound.
    """
    additions = math.log2(max(hidden, 1)) + (min(hidden / 64, 64) + hidden / 2048) / 2
    float32_units = 5 + (3 + 1 + additions) / 2
    return 0.5 + float32_units * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
