"""RMSNorm that gives 8 bits to the next matrix product: the operators and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._calls import is_compiled, is_exported
from .._checks import OPTIONAL_WEIGHT, RESIDUAL, Extent, X
from .quantising import QuantisingOperators


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
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
    """:func:`gemma_norm.rms_norm`, quantised in the same kernel: ``(q, scale)`` with ``q * scale`` close to y::

        y = x * rstd * w                                        in float32, not rounded
        scale = max(|y|) / largest                              of each group of elements, or of the row
        q = round(limit(y * (1 / scale)))                       to nearest even

    largest is the largest number of the dtype: 448 (float8_e4m3fn), 240 (float8_e4m3fnuz), 57344 (float8_e5m2), 127
    (int8) or 6 (float4). Results beyond the range become its ends. All arithmetic is in float32.

    Args:
        x, weight, eps, gemma, round_each_step: as for :func:`gemma_norm.rms_norm`.
        scale: one float32, on x's device: the scale of all elements ("static, per tensor"). None: scales are computed,
            one a row ("dynamic, per token"), or with scale_group_size one a group.
        dtype: ``torch.float8_e4m3fn`` (None), ``torch.float8_e5m2``, ``torch.int8``, ``torch.float8_e4m3fnuz``, the
            float8 of AMD's gfx942, or ``torch.float4_e2m1fn_x2``, which has two elements in a byte, the first in the
            low bits, and needs a scale_group_size that is a multiple of 16: MXFP4 has 32 and scales in
            float8_e8m0fnu, NVFP4 16 and scales in float8_e4m3fn.
        scale_group_size: that many neighbouring elements have a scale of their own; it must divide hidden. 128 is what
            DeepSeek's models and DeepGEMM take.
        scale_ub: one float32, on x's device: max(abs(y)) counts as at most this much.
        round_first: round y to x's dtype before it is quantised, as a norm followed by a quantisation does.
        scale_ue8m0: round each scale up to a power of two.
        column_major_scale: the last dimension of the new scale is the outermost in memory, so that the scales of one
            group of all rows are neighbours.
        scale_dtype: of the new scale. ``torch.float32`` (None); ``torch.float8_e8m0fnu``, for powers of two, as the MX
            formats have them; ``torch.int32``, in which four such exponents of neighbouring groups are one element,
            the first in the low bits, and which is column-major with columns at multiples of 16 bytes, as DeepGEMM
            takes them; or ``torch.float8_e4m3fn``, as NVFP4 has them.
        global_scale: one float32, on x's device, by which scales in float8_e4m3fn are multiplied: they are rounded
            after a division by it. None stands for 1.
        return_y: return y as well, rounded to x's dtype, with the bits of :func:`gemma_norm.rms_norm`. A mixture of
            experts gives it to the router, and q to the experts.

    The scale of a group of zeros is that of max(abs(y)) = 1e-10. A NaN makes the scale of its group a NaN, and itself
    a NaN, which in int8 is 0 and in float4 is 6.

    A smooth-quant vector is a part of the weight: pass the product of both as a float32 weight. float4 inside
    ``torch.func.vmap`` needs a PyTorch that knows ``Tensor.view(dtype)`` there: 2.13 does, 2.11 does not.

    Returns:
        q, row-major, x's shape, in float4 ``[..., hidden / 2]``; the scale: ``[..., 1]``, or ``[..., hidden /
        scale_group_size]``, in int32 a fourth of that, rounded up, or the one that was given; and with return_y y,
        row-major.

    No derivative exists. Tensors that require a gradient while grad mode is on, dual tensors, and calls inside
    ``torch.func.grad`` and the like are refused.

    Raises:
        RuntimeError: if an argument breaks a rule above. Nothing has been written then.
        torch.OutOfMemoryError: if a GPU has no memory for the results. On the CPU, as in PyTorch, it is a RuntimeError.
    """
    return RMS_NORM_QUANT.call(
        scale,
        return_y,
        x=x,
        weight=weight,
        eps=eps,
        gemma=gemma,
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


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
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
    """``(q, scale, s)``: :func:`rms_norm_quant` of ``s = round(x + residual)``, and that sum.

    With return_y the results are ``(q, scale, y, s)``. residual has x's shape and device and x's dtype or float32,
    which is also that of s, as for :func:`gemma_norm.add_rms_norm`. All other arguments and the errors are those of
    :func:`rms_norm_quant`.
    """
    return ADD_RMS_NORM_QUANT.call(
        scale,
        return_y,
        x=x,
        residual=residual,
        weight=weight,
        eps=eps,
        gemma=gemma,
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


def fused_add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    *,
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
    """Overwrite residual with ``s = round(x + residual)``, and return :func:`rms_norm_quant` of s.

    x is only read, because q does not fit its dtype, unless it is residual itself. Otherwise residual must not overlap
    x. The bits are those of :func:`add_rms_norm_quant`, and so are the other arguments and the errors. Inductor of
    PyTorch 2.13 cannot compile ``torch.ops.gemma_norm.fused_add_rms_norm_quant`` itself with
    ``scale_dtype=torch.float8_e8m0fnu``; this function, compiled, calls the functional operator instead.
    """
    arguments: dict[str, Any] = dict(
        x=x,
        residual=residual,
        weight=weight,
        eps=eps,
        gemma=gemma,
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
    if scale_dtype is torch.float8_e8m0fnu and (is_compiled() or is_exported()):
        # Inductor of PyTorch 2.13 fails at operators that write to an argument and have a result of this dtype.
        *results, s = ADD_RMS_NORM_QUANT.call(scale, return_y, **arguments)
        residual.copy_(s)
        return tuple(results)
    return FUSED_ADD_RMS_NORM_QUANT.call(scale, return_y, **arguments)


torch.fx.node.has_side_effect(fused_add_rms_norm_quant)

_RULES = {"x": X, "weight": OPTIONAL_WEIGHT}
_ADD_RULES = {**_RULES, "residual": RESIDUAL}
RMS_NORM_QUANT = QuantisingOperators(rms_norm_quant, reference.rms_norm_quant, _RULES, "rms_norm")
ADD_RMS_NORM_QUANT = QuantisingOperators(
    add_rms_norm_quant, reference.add_rms_norm_quant, _ADD_RULES, "add_rms_norm", Extent.LIKE_X
)
FUSED_ADD_RMS_NORM_QUANT = QuantisingOperators(
    fused_add_rms_norm_quant, reference.add_rms_norm_quant, _ADD_RULES, "add_rms_norm"
)
