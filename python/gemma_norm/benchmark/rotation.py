"""The suite qk-rope: q and k of one layer, each head normalised and rotated. Its tensors, who has it, and its check.

A call takes (q, k, cos, sin, cache, positions), and the gate and v where these are copied, and returns (q, k) and the
copies. q's weight is the point's, and k's is another of as many bytes. cos and sin have q's dtype and a number for each
element that is rotated, as the models of transformers pass them. The cache, in float32, and each token's row in it have
the same angles, as serving engines do. Other libraries are in :mod:`.rotation_peers`.
"""

from __future__ import annotations

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


COPIED = ("gate", "v")


@dataclass(frozen=True)
class Rotation:
    """The heads of a model's layer, and how many of a head's elements are rotated."""

    name: str
    size: int
    """Of a head."""
    q_heads: int
    k_heads: int
    rotary: int
    gate: bool = False
    """Each head of q is followed by its gate in memory."""
    fused: bool = False
    """q, k and v are parts of one projection's result, and not of three."""
    copies: tuple[str, ...] = ()
    """What of COPIED becomes contiguous as well."""

    @property
    def heads(self) -> int:
        return self.q_heads + self.k_heads

    @property
    def copied_heads(self) -> int:
        return sum({"gate": self.q_heads, "v": self.k_heads}[name] for name in self.copies)

    def __str__(self) -> str:
        gate = ", a gate beside each head of q" if self.gate else ""
        fused = ", in one qkv" if self.fused else ""
        copies = f", {' and '.join(self.copies)} copied" if self.copies else ""
        return f"{self.name}: {self.q_heads} + {self.k_heads} heads, {self.rotary} rotated{gate}{fused}{copies}"


_QWEN3, _QWEN3_5 = ("Qwen3", 128, 32, 8, 128), ("Qwen3.5", 256, 16, 4, 64)
ROTATIONS = (
    Rotation(*_QWEN3),
    Rotation(*_QWEN3, fused=True),
    Rotation(*_QWEN3_5, gate=True),
    Rotation(*_QWEN3_5, gate=True, copies=("gate",)),
    Rotation(*_QWEN3_5, gate=True, fused=True, copies=("gate", "v")),
)
TOKENS = (1, 16, 64, 8192)


def empty(point: Point) -> tuple[Tensor, ...]:
    """The arguments of a call."""
    r = point.rotation
    assert r is not None
    tokens, size = point.rows // r.heads, point.hidden
    make: dict[str, Any] = {"dtype": point.dtype, "device": point.device}
    heads = [r.q_heads * (2 if r.gate else 1), r.k_heads, r.k_heads]
    if r.fused:
        q, k, v = torch.split(torch.empty(tokens, sum(heads), size, **make), heads, dim=1)
    else:
        q, k, v = (torch.empty(tokens, n, size, **make) for n in heads)
    gate = None
    if r.gate:
        q, gate = q.view(tokens, r.q_heads, 2, size).unbind(2)
    copied = [t for name, t in zip(COPIED, (gate, v), strict=True) if name in r.copies and t is not None]
    cos, sin = (torch.empty(tokens, r.rotary, **make) for _ in range(2))
    cache = torch.empty(tokens, r.rotary, device=point.device)
    return q, k, cos, sin, cache, torch.empty(tokens, dtype=torch.int64, device=point.device), *copied


def values(point: Point, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The values of the arguments."""
    q, k, cos, _, _, positions, *copied = (t.shape for t in empty(point))
    angles = normal(cos[0], cos[1] // 2)
    c, s = angles.cos(), angles.sin()
    cache, rows = torch.cat((c, s), dim=-1).float(), torch.arange(positions[0], device=point.device)
    both = [torch.cat((t, t), dim=-1) for t in (c, s)]
    return normal(*q), normal(*k), *both, cache, rows, *(normal(*shape) for shape in copied)


def sources(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the results are like: q, k and what is copied."""
    return (*arguments[:2], *arguments[6:])


def k_weight(weight: Tensor) -> Tensor:
    return weight.flip(0).contiguous()


# --- Providers


def ours(op: str, weight: Tensor, gemma: bool) -> Call:
    return _ours(weight, gemma, {})


def ours_rounded(op: str, weight: Tensor, gemma: bool) -> Call:
    """With transformers' roundings."""
    return _ours(weight, gemma, {"round_each_step": not gemma, "round_rotation": True})


def _ours(weight: Tensor, gemma: bool, options: dict[str, Any]) -> Call:
    function, second = gemma_norm.qk_norm_rope, k_weight(weight)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        copied = _named(others[2:])
        return function(q, k, weight, second, cos, sin, eps=EPS, gemma=gemma, **options, **copied)

    return call


def ours_cache(op: str, weight: Tensor, gemma: bool) -> Call:
    """With the angles that serving engines have, and their roundings: the norm is rounded."""
    function, second = gemma_norm.qk_norm_rope, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        options = {"gemma": gemma, "round_rotation": True, **_named(copied)}
        return function(q, k, weight, second, cos_sin_cache=cache, positions=rows, eps=EPS, **options)

    return call


def ours_in_place(op: str, weight: Tensor, gemma: bool) -> Call:
    """In q's and k's memory, with a cache."""
    function, second = gemma_norm.fused_qk_norm_rope, k_weight(weight)

    def call(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, rows: Tensor, *copied: Tensor
    ) -> tuple[Tensor, ...]:
        packed(q, k, copied)
        function(q, k, weight, second, cos_sin_cache=cache, positions=rows, eps=EPS, gemma=gemma)
        return q, k

    return call


def _named(copied: tuple[Tensor, ...]) -> dict[str, Any]:
    return dict(zip(COPIED, copied, strict=False))


def packed(q: Tensor, k: Tensor, copied: tuple[Tensor, ...]) -> Tensor:
    """The fused projection's result, ``[tokens, heads * head_dim]``, whose first heads are q's and whose next are k's.

    Raises ValueError where there is none, or more is wanted than what can be done in it.
    """
    size = q.shape[-1]
    together = k.data_ptr() == q.data_ptr() + q.shape[1] * size * q.element_size() and q.stride(1) == size
    if copied or not together:
        raise ValueError("works in place, in a fused qkv without a gate")
    return q.as_strided((len(q), q.stride(0)), (q.stride(0), 1))


def contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)


def ours_norms(op: str, weight: Tensor, gemma: bool) -> Call:
    """Two norms of ours, then the rotation in eager PyTorch."""
    norm, second = gemma_norm.rms_norm, k_weight(weight)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        y, z = norm(q, weight, EPS, gemma), norm(k, second, EPS, gemma)
        return rotated(y, cos, sin), rotated(z, cos, sin), *contiguous(others[2:])

    return call


def copy(op: str, weight: Tensor, gemma: bool) -> Call:
    return lambda *arguments: contiguous(sources(arguments))


def eager(op: str, weight: Tensor, gemma: bool) -> Call:
    """As Qwen3.5 and, with a plain weight, Qwen3 in transformers."""
    second = k_weight(weight)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return (y * (1.0 + w.float())).type_as(x) if gemma else w * y.type_as(x)

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return rotated(norm(q, weight), cos, sin), rotated(norm(k, second), cos, sin), *contiguous(others[2:])

    return call


def compiled(op: str, weight: Tensor, gemma: bool) -> Call:
    torch._dynamo.reset()  # as for the other operators
    call: Call = torch.compile(eager(op, weight, gemma), fullgraph=True, dynamic=False)
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
