"""The numerical contract in plain PyTorch, the exact answer, and the distance of a result from it.

``rms_norm``, ``add_rms_norm``, ``gated_rms_norm``, ``rms_norm_add_rms_norm``, ``qk_norm_rope``, ``rms_norm_quant``,
``add_rms_norm_quant`` and ``gated_rms_norm_quant`` are the operators' definitions. They also run on devices without a
native kernel. ``oracle`` computes the exact answer in float64. ``ulp_error`` says how far a result is from it, and
``max_ulp_error`` how far it may be. The tests and ``python -m gemma_norm`` use these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    return _unrounded_norm(s, dtype, weight, eps, gemma, round_each_step).to(dtype)


def _unrounded_norm(
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
    y = _unrounded_gated_norm(x, gate, weight, eps, sigmoid, norm_before_gate, group_size, round_each_step)
    return y.to(x.dtype)


def _unrounded_gated_norm(
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


def norm_of_heads(
    x: Tensor, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool, round_rotation: bool
) -> Tensor:
    """What :func:`qk_norm_rope` rotates, in float32."""
    n = _unrounded_norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)
    return n.to(x.dtype).float() if round_rotation else n


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    round_each_step: bool = False,
    round_rotation: bool = False,
    interleaved: bool = False,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rotate(rms_norm(q, q_weight))`` and the same of k, by the angles of each token.

    The first elements of each head are rotated, as many as ``cos`` has: ``n * cos + rotate_half(n) * sin``. All
    arithmetic is in float32 and rounded once. With ``round_rotation``, the norm is rounded before and, if the angles
    have q's dtype, so are both products.
    """
    if cos is None or sin is None:
        assert cos_sin_cache is not None
        assert positions is not None
        cos, sin = angles(cos_sin_cache, positions, interleaved, mrope_section, mrope_interleaved)
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    rotary, angles_dtype = c.shape[-1], cos.dtype

    def rounded(t: Tensor) -> Tensor:
        return t.to(angles_dtype).float() if round_rotation else t

    def normed_and_rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        n = norm_of_heads(x, weight, eps, gemma, round_each_step, round_rotation)
        turned, rest = n[..., :rotary], n[..., rotary:]
        turned = rounded(turned * c) + rounded(rotate_half(turned, interleaved) * s)
        return torch.cat((turned, rest), dim=-1).to(x.dtype)

    return normed_and_rotated(q, q_weight), normed_and_rotated(k, k_weight)


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
    y = _unrounded_norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)
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
    y = _unrounded_norm(s.float(), x.dtype, weight, eps, gemma, round_each_step)
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
    y = _unrounded_gated_norm(x, gate, weight, eps, sigmoid, norm_before_gate, group_size, round_each_step)
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


def rotate_half(n: Tensor, interleaved: bool) -> Tensor:
    """What is multiplied by the sines: ``(-second, first)`` of each pair.

    The elements of a pair are half of the last dimension apart, or, interleaved, neighbours.
    """
    if interleaved:
        return torch.stack((-n[..., 1::2], n[..., ::2]), dim=-1).flatten(-2)
    first, second = n.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def angles(
    cos_sin_cache: Tensor,
    positions: Tensor,
    interleaved: bool = False,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of the tokens at ``positions``, one for each element that is rotated.

    A row of the cache is the cosines of all pairs, then their sines. With ``mrope_section`` a token has three
    positions, and each pair takes one of them. A position that is not in the cache is brought into its range, as on a
    GPU; the native kernels of a CPU refuse it.
    """
    index = positions.long().clamp(0, cos_sin_cache.shape[0] - 1)
    # Not cos_sin_cache[index]: inside vmap, PyTorch 2.13 gives that another shape where there are no tokens.
    rows = cos_sin_cache.index_select(0, index.flatten()).view(*index.shape, cos_sin_cache.shape[-1])
    if mrope_section is not None:
        axis = mrope_axes(mrope_section, mrope_interleaved, rows.device).repeat(2)
        rows = torch.gather(rows, 0, axis.expand(rows.shape[1:]).unsqueeze(0)).squeeze(0)
    cos, sin = rows.chunk(2, dim=-1)
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def mrope_axes(mrope_section: list[int], mrope_interleaved: bool, device: torch.device | None = None) -> Tensor:
    """Which of a token's three positions each pair takes: 0 (temporal), 1 (height) or 2 (width)."""
    temporal, height, width = mrope_section
    axes = [0] * temporal + [1] * height + [2] * width
    if mrope_interleaved:
        size = {1: height, 2: width}
        axes = [pair % 3 if pair // 3 < size.get(pair % 3, 0) else 0 for pair in range(len(axes))]
    return torch.tensor(axes, device=device)


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
