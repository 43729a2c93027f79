"""The gradients of RMSNorm: the operators, and the formula in plain PyTorch.

These operators record no derivative themselves. The derivative of a gradient is that of :func:`formula`, which consists
of differentiable operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._calls import is_compiled
from .._checks import OPTIONAL_LIKE_X, OPTIONAL_WEIGHT, WEIGHT, DTypes, Extent, Rule, X, has_tangent
from .._registry import Operator, bare, register

_DOUT = Rule(Extent.LIKE_X, DTypes.X_OR_NARROWER)


def formula(
    dout: Tensor, s: Tensor, weight: Tensor | None, eps: float, gemma: bool, needs_s: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of s and weight. ``n = s * rstd`` and ``g = dout * w``, where w is as in :func:`rms_norm`::

        ds      = rstd * (g - n * mean(g * n))
        dweight = sum over rows of dout * n

    ``dout`` and ``s`` are in float32, and so is ``ds``. dweight is rounded once, to the weight's dtype. The weight may
    also have two dimensions, groups and their elements.
    """
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    n = s * rstd
    ds = dweight = None
    if needs_s:
        g = dout if weight is None else dout * (1 + weight.float() if gemma else weight.float())
        ds = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    if needs_weight and weight is not None:
        leading = list(range(s.dim() - weight.dim()))
        dweight = cast((dout * n).sum(leading) if leading else dout * n, weight)
    return ds, dweight


def cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)


def differentiable(
    dout: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    dsum: Tensor | None,
    eps: float,
    gemma: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`gradients` in plain PyTorch, with derivatives of its own."""
    if dout is None:
        return dsum, torch.zeros_like(weight) if weight is not None and needs_weight else None
    dx, dweight = formula(dout.float(), x.float(), weight, eps, gemma, needs_x, needs_weight)
    if dx is not None and dsum is not None:
        dx = dx + dsum
    return cast(dx, x), dweight


def gradients(
    dout: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    dsum: Tensor | None,
    eps: float,
    gemma: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, by the operators.

    Args:
        dout: the gradient of the norm, or None if it is zero.
        x: what was normalised: the norm's input, or the sum that add_rms_norm returned.
        dsum: the gradient of that sum, which is added to x's. None if it is zero.

    Returns:
        None for a gradient that is not needed.
    """
    if weight is None:
        needs_weight = False
    if dout is None:
        return dsum, torch.zeros_like(weight) if weight is not None and needs_weight else None
    if torch.is_grad_enabled() or has_tangent(dout, x, weight, dsum):
        return differentiable(dout, x, weight, dsum, eps, gemma, needs_x, needs_weight)
    dout, dsum = rows(dout), None if dsum is None else rows(dsum)
    if needs_weight:
        operator = RMS_NORM_BACKWARD.overload if is_compiled() else _backward
        dx, dweight = operator(dout, x, weight, dsum, eps, gemma)
        return dx, dweight
    if not needs_x:
        return None, None
    operator = RMS_NORM_BACKWARD_INPUT.overload if is_compiled() else _backward_input
    return operator(dout, x, weight, dsum, eps, gemma), None


def rows(t: Tensor) -> Tensor:
    """``t`` with a contiguous last dimension. An expanded gradient, such as that of a sum, has none."""
    if not is_compiled() and t._is_zerotensor():  # PyTorch would expand a single zero for an operator
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        return t
    return t.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of what has no elements


def _reference(
    dout: Tensor, x: Tensor, weight: Tensor, dsum: Tensor | None = None, eps: float = 1e-6, gemma: bool = False
) -> tuple[Tensor, Tensor]:
    dx, dweight = differentiable(dout, x, weight, dsum, eps, gemma, True, True)
    assert dx is not None and dweight is not None
    return dx, dweight


def _reference_input(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    dsum: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> Tensor:
    dx, _ = differentiable(dout, x, weight, dsum, eps, gemma, True, False)
    assert dx is not None
    return dx


RMS_NORM_BACKWARD = Operator(
    "rms_norm_backward",
    _reference,
    {"x": X, "weight": WEIGHT, "dout": _DOUT, "dsum": OPTIONAL_LIKE_X},
    "rms_norm",
    more_results=("weight",),
)
RMS_NORM_BACKWARD_INPUT = Operator(
    "rms_norm_backward_input",
    _reference_input,
    {"x": X, "weight": OPTIONAL_WEIGHT, "dout": _DOUT, "dsum": OPTIONAL_LIKE_X},
    "rms_norm",
)
register(RMS_NORM_BACKWARD, RMS_NORM_BACKWARD_INPUT)

_backward = bare(RMS_NORM_BACKWARD.overload)
_backward_input = bare(RMS_NORM_BACKWARD_INPUT.overload)
