"""What the tests of qk_norm_rope share: arguments, and the rotation as transformers computes it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, ones

from support import make_weight, randn

Arguments = dict[str, Any]


def rotate_half(x: Tensor) -> Tensor:
    """That of transformers' models."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_neighbours(x: Tensor) -> Tensor:
    """rotate_half of transformers' Cohere."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotated(n: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """apply_rotary_pos_emb of transformers' Qwen3.5, for n of [..., heads, head_dim]."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = n[..., : cos.shape[-1]], n[..., cos.shape[-1] :]
    turn = rotate_neighbours if interleaved else rotate_half
    return torch.cat((turned * cos + turn(turned) * sin, rest), dim=-1)


def tensors(
    tokens: tuple[int, ...] = (5,),
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    rotary: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gemma: bool = False,
    angles_dtype: torch.dtype | None = None,
) -> Arguments:
    """The cosines and sines are those of no angle, and differ between the halves: none can be taken for another."""
    make = functools.partial(randn, device=device)
    return {
        "q": make(*tokens, heads[0], head_dim, dtype=dtype, seed=0),
        "k": make(*tokens, heads[1], head_dim, dtype=dtype, seed=1),
        "q_weight": make_weight(head_dim, dtype, device, gemma),
        "k_weight": make_weight(head_dim, dtype, device, gemma).flip(0),
        "cos": make(*tokens, rotary, dtype=angles_dtype or dtype, seed=2),
        "sin": make(*tokens, rotary, dtype=angles_dtype or dtype, seed=3),
    }


def in_turn(a: Arguments) -> tuple[Tensor, ...]:
    return tuple(a.values())


def with_cache(a: Arguments, cache: Tensor, positions: Tensor) -> Arguments:
    return {n: t for n, t in a.items() if n not in ("cos", "sin")} | {"cos_sin_cache": cache, "positions": positions}


def good() -> Arguments:
    return {
        "q": ones(3, 4, 16),
        "k": ones(3, 2, 16),
        "q_weight": ones(16),
        "k_weight": ones(16),
        "cos": ones(3, 8),
        "sin": ones(3, 8),
    }
