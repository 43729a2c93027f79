"""The suite qk-rope: q and k of one layer, each head normalised and rotated. Its tensors, who has it, and its check.

A call takes (q, k, cos, sin) and returns (q, k). q's weight is the point's, and k's is another of as many bytes. cos
and sin have q's dtype and a number for each element that is rotated, as the models of transformers pass them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference

if TYPE_CHECKING:
    from .cases import Point

EPS = 1e-6
Call = Callable[..., tuple[Tensor, ...]]
ROUNDINGS = 4.0
"""By how many roundings of its two products a result may be off, of providers that round each step."""


@dataclass(frozen=True)
class Rotation:
    """The heads of a model's layer, and how many of a head's elements are rotated."""

    name: str
    q_heads: int
    k_heads: int
    rotary: int
    gate: bool = False
    """Each head of q is followed by its gate in memory."""

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads

    def __str__(self) -> str:
        gate = ", a gate beside each head of q" if self.gate else ""
        return f"{self.name}: {self.q_heads} + {self.k_heads} heads, {self.rotary} rotated{gate}"


ROTATIONS = {128: Rotation("Qwen3", 32, 8, 128), 256: Rotation("Qwen3.5", 16, 4, 64, gate=True)}
"""By head_dim."""
TOKENS = (1, 16, 64, 8192)


def empty(point: Point) -> tuple[Tensor, ...]:
    """q, k, cos and sin. q and k are parts of two projections' results."""
    r = point.rotation
    assert r is not None
    tokens, size = point.rows // r.heads, point.hidden
    make: dict[str, Any] = {"dtype": point.dtype, "device": point.device}
    q = torch.empty(tokens, r.q_heads, size * (2 if r.gate else 1), **make)[..., :size]
    k = torch.empty(tokens, r.k_heads, size, **make)
    return (q, k, *(torch.empty(tokens, r.rotary, **make) for _ in range(2)))


def values(point: Point, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The values of q, k, cos and sin."""
    q, k, cos, sin = (normal(*t.shape) for t in empty(point))
    return q, k, cos.cos(), sin.sin()


def k_weight(weight: Tensor) -> Tensor:
    return weight.flip(0).contiguous()


# --- Providers


def ours(op: str, weight: Tensor, gemma: bool) -> Call:
    function, second = gemma_norm.qk_norm_rope, k_weight(weight)
    return lambda q, k, cos, sin: function(q, k, weight, second, cos, sin, eps=EPS, gemma=gemma)


def ours_rounded(op: str, weight: Tensor, gemma: bool) -> Call:
    """With transformers' roundings."""
    function, second = gemma_norm.qk_norm_rope, k_weight(weight)
    options: dict[str, Any] = {"gemma": gemma, "round_each_step": not gemma, "round_rotation": True}
    return lambda q, k, cos, sin: function(q, k, weight, second, cos, sin, eps=EPS, **options)


def ours_norms(op: str, weight: Tensor, gemma: bool) -> Call:
    """Two norms of ours, then the rotation in eager PyTorch."""
    norm, second = gemma_norm.rms_norm, k_weight(weight)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(norm(q, weight, EPS, gemma), cos, sin), rotated(norm(k, second, EPS, gemma), cos, sin)

    return call


def copy(op: str, weight: Tensor, gemma: bool) -> Call:
    return lambda q, k, cos, sin: (q.clone(memory_format=torch.contiguous_format), k.clone())


def eager(op: str, weight: Tensor, gemma: bool) -> Call:
    """As Qwen3.5 and, with a plain weight, Qwen3 in transformers."""
    second = k_weight(weight)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return (y * (1.0 + w.float())).type_as(x) if gemma else w * y.type_as(x)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(norm(q, weight), cos, sin), rotated(norm(k, second), cos, sin)

    return call


def compiled(op: str, weight: Tensor, gemma: bool) -> Call:
    torch._dynamo.reset()  # as for the other operators
    call: Call = torch.compile(eager(op, weight, gemma), fullgraph=True, dynamic=False)
    return call


def liger(op: str, weight: Tensor, gemma: bool) -> Call:
    """Its norm of q and of k, then its rotation of both, which takes [batch, heads, tokens, head_dim] and writes in
    place. It rotates whole heads.
    """
    norm = importlib.import_module("liger_kernel.ops").LigerRMSNormFunction.apply
    rope = importlib.import_module("liger_kernel.ops").LigerRopeFunction.apply
    options = (EPS, 1.0, "gemma", False) if gemma else (EPS, 0.0, "llama", False)
    second = k_weight(weight)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != q.shape[-1]:
            raise ValueError("liger's rotation has no partial form")
        q, k = (norm(x, w, *options)[None].transpose(1, 2) for x, w in ((q, weight), (k, second)))
        q, k = rope(q, k, cos[None], sin[None])
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return call


def rotated(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary_pos_emb of transformers, for n of [tokens, heads, head_dim]."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = n[..., : cos.shape[-1]], n[..., cos.shape[-1] :]
    turned = turned * cos + reference.rotate_half(turned, False) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


# --- The check


def error(y: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, gemma: bool) -> float:
    """How far y is from the exact answer, in units in the last place of its two products, which may cancel each other.

    A result of rounded steps may be off by half a unit of each product, of the norm before it and of the sum.
    """
    n = reference.oracle(x, weight, EPS, gemma)
    exact = rotated(n, cos.double(), sin.double())
    size = n.abs()
    rotary = cos.shape[-1]
    other = reference.rotate_half(n[..., :rotary], False).abs() * sin.double().unsqueeze(-2).abs()
    size[..., :rotary] = size[..., :rotary] * cos.double().unsqueeze(-2).abs() + other
    unit = torch.finfo(y.dtype).eps * size.clamp_min(torch.finfo(y.dtype).tiny)
    return float(((y.double() - exact).abs() / unit).max())
