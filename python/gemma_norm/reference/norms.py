"""The definitions of the norms: plain, of a sum, and gated."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, gemma: bool = False, round_each_step: bool = False
) -> Tensor:
    """``round(x * rstd * (gemma ? 1 + weight : weight))`` with ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    All arithmetic is in float32, and the result is rounded once, to x's dtype. If the sum of squares overflows float32,
    it is infinite, so rstd and y are 0. With ``round_each_step``, y is ``round(round(x * rstd) * weight)``. Without a
    weight, the factor is 1.
    """
    return _norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)


def _norm(
    s: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool
) -> Tensor:
    return unrounded_norm(s, dtype, weight, eps, gemma, round_each_step).to(dtype)


def unrounded_norm(
    s: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool
) -> Tensor:
    rstd = 1 / torch.sqrt(s.square().mean(-1, keepdim=True) + eps)
    n = s * rstd
    if round_each_step:
        n = n.to(dtype).float()
    if weight is not None:
        n = n * (1 + weight.float() if gemma else weight.float())
    return n


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

    s has the residual's dtype, and its norm has x's dtype.
    """
    if post_residual_addition is not None:
        residual = residual + post_residual_addition
    s = (x + residual).to(residual.dtype)
    return _norm(s.float(), x.dtype, weight, eps, gemma, round_each_step), s


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s, weight), s)`` with ``s = residual + rms_norm(x, post_weight)``."""
    n = rms_norm(x, post_weight, eps, gemma, round_each_step)
    return add_rms_norm(n, residual, weight, eps, gemma, None, round_each_step)


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

    ``s = x * act(gate)`` in float32. act is silu, or with ``sigmoid`` the logistic function; without a gate it is 1.
    Each group of ``group_size`` elements has its own rstd. With ``round_each_step`` the results are
    ``round(round(round(x * rstd) * weight) * act(gate))`` and ``round(round(s * rstd) * weight)``.
    """
    y = unrounded_gated_norm(x, gate, weight, eps, sigmoid, norm_before_gate, group_size, round_each_step)
    return y.to(x.dtype)


def unrounded_gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    sigmoid: bool,
    norm_before_gate: bool,
    group_size: int | None,
    round_each_step: bool,
) -> Tensor:
    s, dtype = x.float(), x.dtype
    activation = None
    if gate is not None:
        activation = torch.sigmoid(gate.float()) if sigmoid else torch.nn.functional.silu(gate.float())
    if activation is not None and not norm_before_gate:
        s = s * activation
    size = group_size or s.shape[-1]
    groups = s.reshape(*s.shape[:-1], s.shape[-1] // size, size)
    n = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).reshape(s.shape)
    n = (n.to(dtype).float() if round_each_step else n) * weight.float()
    if norm_before_gate and round_each_step:
        n = n.to(dtype).float()
    if activation is not None and norm_before_gate:
        n = n * activation
    return n
