"""The definition of the norm of heads with their rotation, and how the angles are found."""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import unrounded_norm


def norm_of_heads(
    x: Tensor, weight: Tensor | None, eps: float, gemma: bool, round_each_step: bool, round_rotation: bool
) -> Tensor:
    """What :func:`qk_norm_rope` rotates, in float32."""
    n = unrounded_norm(x.float(), x.dtype, weight, eps, gemma, round_each_step)
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
