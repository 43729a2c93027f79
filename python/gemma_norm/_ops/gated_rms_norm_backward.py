"""The gradients of the gated RMSNorm: the operators, and the formula in plain PyTorch.

These operators record no derivative themselves. The derivative of a gradient is that of :func:`differentiable`, which
consists of differentiable operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._calls import is_compiled
from .._checks import LIKE_X, WEIGHT, X, has_tangent
from .._registry import Operator, bare, register
from . import rms_norm_backward
from .rms_norm_backward import cast, formula, rows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_RULES = {"x": X, "weight": WEIGHT, "dout": LIKE_X, "gate": LIKE_X}


def differentiable(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    sigmoid: bool,
    norm_before_gate: bool,
    group_size: int | None,
    needs_x: bool,
    needs_gate: bool,
    needs_weight: bool,
) -> Gradients:
    """:func:`gradients` in plain PyTorch, with derivatives of its own.

    It is :func:`formula` of s and of the upstream gradient, one of which is multiplied by the activation before.
    """
    dout, x32 = dout.float(), x.float()
    activation = slope = None
    if gate is not None:
        logistic = torch.sigmoid(gate.float())
        activation = logistic if sigmoid else gate.float() * logistic
        slope = logistic * (1 - logistic)
        slope = slope if sigmoid else logistic + gate.float() * slope

    def groups(t: Tensor) -> Tensor:
        return t if group_size is None else t.reshape(*t.shape[:-1], x.shape[-1] // group_size, group_size)

    def joined(t: Tensor) -> Tensor:
        return t if group_size is None else t.reshape(*t.shape[:-2], x.shape[-1])

    gates_x = gate is not None and not norm_before_gate
    s = x32 * activation if gates_x and activation is not None else x32
    upstream = dout * activation if activation is not None and norm_before_gate else dout
    needs_s = needs_x or (needs_gate and gates_x)
    ds, dweight = formula(groups(upstream), groups(s), groups(weight), eps, False, needs_s, needs_weight)
    ds = None if ds is None else joined(ds)
    dgate = None
    if needs_gate and gate is not None and slope is not None:
        if gates_x and ds is not None:
            dgate = ds * x32 * slope
        else:
            rstd = torch.rsqrt(groups(x32).square().mean(-1, keepdim=True) + eps)
            dgate = dout * joined(groups(x32) * rstd) * weight.float() * slope
        dgate = cast(dgate, gate)
    dx = ds * activation if ds is not None and gates_x and activation is not None else ds
    dweight = None if dweight is None else joined(dweight)
    return cast(dx, x) if needs_x else None, dgate, dweight


def gradients(
    dout: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    sigmoid: bool,
    norm_before_gate: bool,
    group_size: int | None,
    needs_x: bool,
    needs_gate: bool,
    needs_weight: bool,
) -> Gradients:
    """The gradients of x, gate and weight, by the operators. None for one that is not needed."""
    if gate is None and group_size in (None, x.shape[-1]):
        dx, dweight = rms_norm_backward.gradients(dout, x, weight, None, eps, False, needs_x, needs_weight)
        return dx, None, dweight
    # The operators have no groups without a gate.
    if gate is None or torch.is_grad_enabled() or has_tangent(dout, x, gate, weight):
        options = (eps, sigmoid, norm_before_gate, group_size)
        return differentiable(dout, x, gate, weight, *options, needs_x, needs_gate, needs_weight)
    arguments = (rows(dout), x, gate, weight, eps, sigmoid, norm_before_gate, group_size)
    if needs_weight:
        operator = GATED_RMS_NORM_BACKWARD.overload if is_compiled() else _backward
        dx, dgate, dweight = operator(*arguments)
        return dx, dgate, dweight
    operator = GATED_RMS_NORM_BACKWARD_INPUT.overload if is_compiled() else _backward_input
    dx, dgate = operator(*arguments)
    return dx, dgate, None


def _reference(
    dout: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (eps, sigmoid, norm_before_gate, group_size)
    dx, dgate, dweight = differentiable(dout, x, gate, weight, *options, True, True, True)
    assert dx is not None and dgate is not None and dweight is not None
    return dx, dgate, dweight


def _reference_input(
    dout: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    options = (eps, sigmoid, norm_before_gate, group_size)
    dx, dgate, _ = differentiable(dout, x, gate, weight, *options, True, True, False)
    assert dx is not None and dgate is not None
    return dx, dgate


GATED_RMS_NORM_BACKWARD = Operator(
    "gated_rms_norm_backward", _reference, _RULES, "gated_rms_norm", more_results=("gate", "weight")
)
GATED_RMS_NORM_BACKWARD_INPUT = Operator(
    "gated_rms_norm_backward_input", _reference_input, _RULES, "gated_rms_norm", more_results=("gate",)
)
register(GATED_RMS_NORM_BACKWARD, GATED_RMS_NORM_BACKWARD_INPUT)

_backward = bare(GATED_RMS_NORM_BACKWARD.overload)
_backward_input = bare(GATED_RMS_NORM_BACKWARD_INPUT.overload)
