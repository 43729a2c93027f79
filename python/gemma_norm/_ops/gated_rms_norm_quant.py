"""RMSNorm with a gate that gives 8 bits to the next matrix product: the operator and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checks import OPTIONAL_LIKE_X, WEIGHT, X
from .quantising import QuantisingOperators


def gated_rms_norm_quant(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    *,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each_step: bool = False,
    dtype: torch.dtype | None = None,
    scale_group_size: int | None = None,
    scale_ub: Tensor | None = None,
    round_first: bool = False,
    scale_ue8m0: bool = False,
    column_major_scale: bool = False,
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
    return_y: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`gemma_norm.gated_rms_norm`, quantised in the same kernel: ``(q, scale)`` or, with return_y, also y.

    What is quantised is y before it is rounded to x's dtype, or with round_first after it.

    Args:
        x, weight, eps, sigmoid, norm_before_gate, group_size, round_each_step: as for
            :func:`gemma_norm.gated_rms_norm`.
        gate: x's shape, dtype and device, strides of its own. With None, act is 1.
        scale, dtype, scale_group_size, scale_ub, round_first, scale_ue8m0, column_major_scale, scale_dtype,
            global_scale, return_y: as for :func:`gemma_norm.rms_norm_quant`. With a group_size less than hidden,
            scale_group_size must divide it, or a scale must be given. Where x is ``[tokens, heads, size]``, as in
            linear attention, its scales ``[tokens, heads, 1]`` are those of groups of ``size`` elements of the token.

    Results, derivatives and errors are those of :func:`gemma_norm.rms_norm_quant`.
    """
    return GATED_RMS_NORM_QUANT.call(
        scale,
        return_y,
        x=x,
        gate=gate,
        weight=weight,
        eps=eps,
        sigmoid=sigmoid,
        norm_before_gate=norm_before_gate,
        group_size=group_size,
        round_each_step=round_each_step,
        dtype=dtype,
        scale_group_size=scale_group_size,
        scale_ub=scale_ub,
        round_first=round_first,
        scale_ue8m0=scale_ue8m0,
        column_major_scale=column_major_scale,
        scale_dtype=scale_dtype,
        global_scale=global_scale,
    )


GATED_RMS_NORM_QUANT = QuantisingOperators(
    gated_rms_norm_quant,
    reference.gated_rms_norm_quant,
    {"x": X, "weight": WEIGHT, "gate": OPTIONAL_LIKE_X},
    "gated_rms_norm",
)
