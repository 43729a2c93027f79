"""RMSNorm with a gate: the operator, the public function and its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .. import reference
from .._calls import check_eps, check_size, differentiable, explain, is_compiled, is_exported, overridden
from .._checks import LIKE_X, OPTIONAL_LIKE_X, WEIGHT, X
from .._registry import Operator, bare, register
from .gated_rms_norm_backward import gradients

_RULES = {"x": X, "weight": WEIGHT, "gate": OPTIONAL_LIKE_X}
_is_grad_enabled = torch.is_grad_enabled


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each_step: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm with a gate, as in linear attention (Qwen3-Next, Qwen3.5) and state space models (Mamba 2)::

        y = round(x * rstd(x) * weight * act(gate))                      with norm_before_gate
        y = round(s * rstd(s) * weight),   s = x * act(gate)             without

    with rstd as in :func:`gemma_norm.rms_norm`. All arithmetic is in float32, and the result is rounded once.

    Args:
        x: ``[..., hidden]``, float32, float16 or bfloat16; last dimension contiguous, any other strides.
        gate: x's shape, dtype and device, strides of its own; or ``[..., hidden]`` with as many elements as x, if x can
            be viewed in that shape. With None, act is 1.
        weight: ``[hidden]``, contiguous, x's dtype or float32; if x is float32, float16 and bfloat16 as well.
        eps: a number, finite and not negative; used as a float32. There is no derivative of it.
        sigmoid: act is the logistic function; otherwise silu, ``g / (1 + exp(-g))``, which is also called swish.
        norm_before_gate: if False, x is gated and the product is normalised, as in Mamba 2, Bamba, Zamba 2 and
            Nemotron-H.
        group_size: this many elements of the last dimension are normalised together. It must divide hidden. None
            stands for all.
        round_each_step: round each product to x's dtype, as the classes of transformers do:
            ``round(round(round(x * rstd) * weight) * act(gate))`` and ``round(round(s * rstd) * weight)``. The weight
            must then have x's dtype. Derivatives ignore the roundings.
        out: written instead of a new tensor. It must have x's shape, dtype and device and a contiguous last dimension,
            and must be x or gate itself or overlap neither. No derivative is recorded, and tensors of which a
            derivative is expected are refused.

    Returns:
        ``out``, or a new row-major tensor of x's shape and dtype. Derivatives of any order and mode with respect to x,
        gate and weight are supported, and so are the transforms of ``torch.func``.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
        torch.OutOfMemoryError: if a GPU has no memory for the result. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    options = (eps, sigmoid, norm_before_gate, group_size, round_each_step)
    op = GATED_RMS_NORM if out is None else GATED_RMS_NORM_OUT
    if has_torch_function((x, gate, weight, out)):
        named = {
            "sigmoid": sigmoid,
            "norm_before_gate": norm_before_gate,
            "group_size": group_size,
            "round_each_step": round_each_step,
        }
        extra = {} if out is None else {"out": out}
        tensors = (x, gate, weight, out)
        result: Tensor = overridden(gated_rms_norm, op, tensors, x, gate, weight, eps, **named, **extra)
        return result
    try:
        if type(eps) is not float:
            check_eps(op, eps)
        if group_size is not None:
            check_size(op, "group_size", group_size)
        if out is not None:
            result = _gated_rms_norm_out(x, gate, weight, *options, out=out)
        else:
            shape = x.shape if isinstance(x, Tensor) else None
            if isinstance(gate, Tensor) and shape is not None and _is_other_view(shape, gate.shape):
                x = x.view(gate.shape)
            if _is_grad_enabled() or forward_ad._current_level >= 0 or is_compiled() or is_exported():
                result = differentiable(_gated_rms_norm, GATED_RMS_NORM, x, gate, weight, *options)
            else:
                result = _gated_rms_norm(x, gate, weight, *options)
            result = result if result.shape == shape else result.view(shape)
    except RuntimeError as error:
        names = ("eps", "sigmoid", "norm_before_gate", "group_size", "round_each_step")
        explain(error, op, x=x, gate=gate, weight=weight, out=out, **dict(zip(names, options, strict=True)))
        raise
    return result


def _is_other_view(x: torch.Size, gate: torch.Size) -> bool:
    return x != gate and len(gate) > 0 and x[-1:] == gate[-1:] and x.numel() == gate.numel()


class GatedRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gate, weight, ctx.eps, ctx.sigmoid, ctx.norm_before_gate, ctx.group_size, _ = inputs
        ctx.save_for_backward(x, gate, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        options = (ctx.eps, ctx.sigmoid, ctx.norm_before_gate, ctx.group_size)
        return *gradients(dy, x, gate, weight, *options, *ctx.needs_input_grad[:3]), None, None, None, None, None


GATED_RMS_NORM = Operator(
    "gated_rms_norm", reference.gated_rms_norm, _RULES, "gated_rms_norm", derivative=GatedRMSNormFunction
)
GATED_RMS_NORM_OUT = Operator(
    "gated_rms_norm.out", reference.gated_rms_norm, {**_RULES, "out": LIKE_X}, "gated_rms_norm"
)
register(GATED_RMS_NORM, GATED_RMS_NORM_OUT)

_gated_rms_norm = bare(GATED_RMS_NORM.twin)
_gated_rms_norm_out = GATED_RMS_NORM_OUT.overload
