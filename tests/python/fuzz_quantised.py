"""Bounds for what operators quantise to, and for the scales (docs/contract.md, C12): the rest of fuzz_oracle.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fuzz_oracle import Arguments, Bounds
from gemma_norm import reference

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
POWERS = (torch.float8_e8m0fnu, torch.int32)  # scales whose exponent alone is stored


def decoded(a: Arguments, got: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results as numbers: q, whose format may have two in a byte, and the scales, if they are new."""
    q, *rest = got
    if q.dtype is torch.float4_e2m1fn_x2:
        codes = q.view(torch.uint8)
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
        q = torch.tensor([*FLOAT4, *(-v for v in FLOAT4)], device=codes.device)[codes]
    if "scale" not in a and a["scale_dtype"] in POWERS:
        size = a["scale_group_size"] or a["x"].shape[-1]
        rest[0] = _powers(rest[0], a["x"].shape[-1] // size)
    return q.double(), *(t.double() if "scale" not in a and i == 0 else t for i, t in enumerate(rest))


def _powers(scales: Tensor, groups: int) -> Tensor:
    if scales.dtype is torch.int32:
        fours = torch.stack([scales >> shift & 255 for shift in (0, 8, 16, 24)], -1).flatten(-2)
        assert not bool(fours[..., groups:].any()), "what is left of the last int32 is not 0"
        exponents = fours[..., :groups]
    else:
        exponents = scales.view(torch.uint8).int()
    powers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents - 127)
    return torch.where(exponents == 255, torch.nan, powers)


def quantised(y: Bounds, a: Arguments, got: tuple[Tensor, ...]) -> list[Bounds]:
    """Bounds for q, of the dtype of ``got[0]``, and for the new scales, if there are any (C12.3, C12.4).

    Each step keeps the order of numbers. The scales of ``got``, once they are between their own, are those of q.
    """
    y = y.rounded(a["x"].dtype if a["round_first"] else torch.float32)
    size, dtype = a.get("scale_group_size") or a["x"].shape[-1], got[0].dtype
    groups = y.mapped(lambda t: t.unflatten(-1, (-1, size)))
    found, unclear = [], torch.zeros((), dtype=torch.bool)
    if "scale" in a:
        factor = _rounded(1 / a["scale"].double().reshape(()))
    else:
        one_sign = (groups.low.sign() == groups.high.sign()) | groups.low.isnan()
        low, high = groups.low.abs(), groups.high.abs()
        largest = Bounds(torch.where(one_sign, low.minimum(high), 0.0).amax(-1), low.maximum(high).amax(-1))
        found = [largest.mapped(lambda t: _scale(t, a, dtype))]
        scale = decoded(a, got)[1].unsqueeze(-1)
        unit = 1.0 if a.get("global_scale") is None else a["global_scale"].double().reshape(())
        product = _rounded(scale * unit)
        factor = _rounded(1 / product)
        if a["scale_dtype"] is torch.float8_e4m3fn:
            factor = torch.where(product == 0, 0.0, factor)
        # Of the largest scales only the exponent is stored, so they may be others than those that are stored.
        unclear = (a["scale_dtype"] in POWERS) & (scale.isnan() | (scale >= 2.0**127))
    # Infinity times what may be 0 may be NaN.
    unclear = unclear | (factor.isinf() & (groups.low <= 0) & (groups.high >= 0))
    v = groups.times(Bounds.of(factor))
    unclear = unclear | (v.low.isnan() != v.high.isnan()) | ((v.low == -torch.inf) & (v.high == torch.inf))
    unclear = unclear.expand_as(v.low).flatten(-2)
    q = v.rounded(torch.float32).mapped(lambda t: _limited(t.flatten(-2), dtype))
    most = 128.0 if dtype is torch.int8 else reference.QUANTIZED_LARGEST[dtype]
    low, high = torch.where(unclear, -most, q.low), torch.where(unclear, most, q.high)
    if dtype.is_floating_point and dtype is not torch.float4_e2m1fn_x2:  # which have NaN
        low = torch.where(unclear, torch.nan, low)
    return [Bounds(low, high), *found]


def _rounded(t: Tensor) -> Tensor:
    return t.float().double()


def _limited(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the format, as numbers."""
    if dtype is torch.int8:
        return v.round().clamp(-128, 127).nan_to_num(0.0)
    largest = reference.QUANTIZED_LARGEST[dtype]
    v = v.clamp(-largest, largest)
    if dtype is not torch.float4_e2m1fn_x2:
        return v.to(dtype).double()
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    return ((v / step).round() * step).nan_to_num(6.0)


def _scale(bound: Tensor, a: Arguments, dtype: torch.dtype) -> Tensor:
    """What is stored as the scale, as a number, of the largest element of a group."""
    if a["scale_ub"] is not None:
        limit = a["scale_ub"].double().reshape(())
        bound = torch.where(bound > limit, limit, bound)
    least = torch.tensor(1e-10).double()
    scale = _rounded(torch.where(bound < 1e-10, least.to(bound.device), bound) / reference.QUANTIZED_LARGEST[dtype])
    if a["scale_dtype"] is torch.float8_e4m3fn:
        unit = 1.0 if a["global_scale"] is None else a["global_scale"].double().reshape(())
        return _rounded(scale / unit).clamp(max=448.0).to(torch.float8_e4m3fn).double()
    mantissa, exponent = torch.frexp(scale)
    if a["scale_ue8m0"] or a["scale_dtype"] in POWERS:
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = torch.where(scale < 2.0**127, power, scale)
    if a["scale_dtype"] in POWERS:
        return torch.where(scale.isfinite(), scale.clamp(max=2.0**127), torch.nan)
    return scale
