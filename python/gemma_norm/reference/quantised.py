"""The definitions of the operators that quantise: codes, scales, and how scales lie in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .norms import unrounded_gated_norm, unrounded_norm

QUANTIZED_LARGEST = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
    torch.int8: 127.0,
    torch.float4_e2m1fn_x2: 6.0,
}
"""What operators quantise to, and the largest number of each."""


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """``(q, scale)``, or ``(q,)`` if a scale is given: :func:`quantize` of the norm before it is rounded.

    With the option ``round_first`` it is rounded. With ``return_y``, the rounded norm is another result. All other
    options are those of :func:`quantize`.
    """
    y = unrounded_norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)
    return _quantized(y, x.dtype, scale, **options)


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The results of :func:`rms_norm_quant` for ``s = x + residual`` in the residual's dtype, and s."""
    s = (x + residual).to(residual.dtype)
    y = unrounded_norm(s.float(), x.dtype, weight, eps, gemma, round_each_step)
    return (*_quantized(y, x.dtype, scale, **options), s.contiguous())


def gated_rms_norm_quant(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    sigmoid: bool = False,
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each_step: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The results of :func:`rms_norm_quant` for the norm of :func:`gated_rms_norm`."""
    y = unrounded_gated_norm(x, gate, weight, eps, sigmoid, norm_before_gate, group_size, round_each_step)
    return _quantized(y, x.dtype, scale, **options)


def _quantized(
    y: Tensor,
    dtype_of_x: torch.dtype,
    scale: Tensor | None,
    round_first: bool = False,
    return_y: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    rounded = y.to(dtype_of_x).contiguous()
    results = quantize(rounded.float() if round_first else y, scale, **options)
    return (*results, rounded) if return_y else results


def quantize(
    y: Tensor,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale_group_size: int | None = None,
    scale_ub: Tensor | None = None,
    scale_ue8m0: bool = False,
    column_major_scale: bool = False,
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``(q, scale)`` of a float32 y, or q alone if a scale is given.

    ``scale = max(|y|) / largest`` of each group of ``scale_group_size`` elements, or of the row, where the maximum is
    at least 1e-10 and at most ``scale_ub``; with ``scale_ue8m0``, or if ``scale_dtype`` holds only exponents, rounded
    up to a power of two. ``q`` is ``y * (1 / scale)``, rounded to nearest even and limited to the range of the dtype.
    With scales in float8_e4m3fn, scale is ``round(max(|y|) / largest / global_scale)``, and q ``y * (1 / (scale *
    global_scale))``.
    """
    dtype = dtype or torch.float8_e4m3fn
    largest = QUANTIZED_LARGEST[dtype]
    size = scale_group_size or y.shape[-1]
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // size, size)
    if scale is not None:
        return (_codes((groups * (1 / scale.reshape(()))).flatten(-2), dtype, largest),)
    bound = groups.abs().amax(-1)
    if scale_ub is not None:
        bound = torch.where(bound > scale_ub.reshape(()), scale_ub.reshape(()), bound)
    # By a tensor: on GPUs, PyTorch multiplies by the rounded reciprocal of a number instead.
    scale = torch.where(bound < 1e-10, 1e-10, bound) / bound.new_full((), largest)
    if scale_dtype is torch.float8_e4m3fn:
        unit = bound.new_ones(()) if global_scale is None else global_scale.reshape(())
        # PyTorch makes NaNs of numbers beyond the largest.
        stored = (scale / unit).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        product = stored.float() * unit
        factor = torch.where(product == 0, 0.0, 1 / product)
    else:
        if scale_ue8m0 or scale_dtype in (torch.float8_e8m0fnu, torch.int32):
            mantissa, exponent = torch.frexp(scale)
            power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
            scale = torch.where(scale < 2.0**127, power, scale)
        stored, factor = scale, 1 / scale
        if scale_dtype is torch.float8_e8m0fnu:
            stored = torch.where(scale.isinf(), torch.nan, scale).to(torch.float8_e8m0fnu)
        if scale_dtype is torch.int32:
            exponents = torch.where(scale.isfinite(), torch.frexp(scale)[1] + 126, 255)
            return _codes((groups * factor.unsqueeze(-1)).flatten(-2), dtype, largest), packed_scales(exponents)
    q = _codes((groups * factor.unsqueeze(-1)).flatten(-2), dtype, largest)
    return q, column_major(stored.contiguous()) if column_major_scale else stored.contiguous()


def _codes(v: Tensor, dtype: torch.dtype, largest: float) -> Tensor:
    """float32 numbers rounded to nearest even and limited to the range of ``dtype``."""
    if dtype is torch.int8:
        return v.round().clamp(-128, 127).nan_to_num(0.0).to(dtype).contiguous()
    if dtype is not torch.float4_e2m1fn_x2:
        return v.clamp(-largest, largest).to(dtype).contiguous()
    magnitude = v.abs()
    codes = torch.where(v.isnan(), 7, torch.where(v.signbit(), 8, 0)).to(torch.uint8)
    # Where the codes 1 to 7 begin. A number in the middle has the even one of two codes.
    for begins, included in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (False, True) * 4, strict=False):
        codes = codes + ((magnitude >= begins) if included else (magnitude > begins))
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous().view(dtype)


def packed_scales(exponents: Tensor) -> Tensor:
    """The exponents of four neighbouring scales in an int32, the first in its low bits, column-major.

    What is left of the last int32 is 0. Columns begin at multiples of 16 bytes.
    """
    fours = torch.nn.functional.pad(exponents, (0, -exponents.shape[-1] % 4))
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=exponents.device)
    fours = fours.reshape(*fours.shape[:-1], fours.shape[-1] // 4, 4)
    return column_major((fours << shifts).sum(-1, dtype=torch.int32), alignment=4)


def column_major(t: Tensor, alignment: int = 1) -> Tensor:
    """The same values with the last dimension outermost in memory, and the others row-major.

    The last dimension's stride is a multiple of ``alignment``.
    """
    columns = t.movedim(-1, 0)
    if alignment == 1:
        return columns.clone(memory_format=torch.contiguous_format).movedim(0, -1)
    strides = column_major_strides(t.shape, alignment)
    padding = strides[-1] - math.prod(t.shape[:-1])
    padded = torch.nn.functional.pad(columns.reshape(t.shape[-1], math.prod(t.shape[:-1])), (0, padding))
    return padded.contiguous().as_strided(t.shape, strides)


def column_major_strides(shape: Sequence[int], alignment: int = 1) -> tuple[int, ...]:
    """Those of :func:`column_major`."""
    largest: Any = torch.sym_max  # of sizes that may be symbolic; not typed
    rows, strides = 1, []
    for size in reversed(shape[:-1]):
        strides.append(rows)
        rows = rows * largest(size, 1)
    return *reversed(strides), -(-rows // alignment) * alignment
