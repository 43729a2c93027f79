"""What is measured: a point of a suite, and the tensors that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import quantised, rotation

RMS_NORM = "rms_norm"
ADD_RMS_NORM = "fused_add_rms_norm"
GATED_RMS_NORM = "gated_rms_norm"
NORM_ADD_NORM = "fused_rms_norm_add_rms_norm"
QK_NORM_ROPE = "qk_norm_rope"
IN_PLACE = (ADD_RMS_NORM, NORM_ADD_NORM)
"""What this package and some others compute in the memory of x and residual."""
OPS = (RMS_NORM, ADD_RMS_NORM)
EPS = 1e-6
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
"""What a call does."""
_TENSORS = {
    FORWARD: {RMS_NORM: 2, ADD_RMS_NORM: 4, GATED_RMS_NORM: 3, NORM_ADD_NORM: 4, QK_NORM_ROPE: 2},
    BACKWARD: {RMS_NORM: 3, ADD_RMS_NORM: 4, GATED_RMS_NORM: 5},
}
"""How many tensors of x's size are read or written at least. The backward pass of the norm reads x and the gradient of
y, and writes that of x. With the addition it also reads the gradient of the sum, and reads the sum in place of x. With
the gate it also reads the gate, and writes its gradient."""


@dataclass(frozen=True)
class Heads:
    """Where the heads of one projection are in a fused qkv (+ gate) buffer. Distances are in elements."""

    name: str
    count: int
    first: int
    step: int
    row: int

    def __str__(self) -> str:
        return f"{self.name}: {self.count} heads, step {self.step}, row {self.row}"


@dataclass(frozen=True)
class Point:
    suite: str
    op: str
    rows: int
    hidden: int
    dtype: torch.dtype
    device: str
    cache: str = "hot"
    """hot: each call uses the same buffers. cold: the calls rotate through so many sets of buffers that none of them is
    still in a cache when its turn comes. warm: they rotate through a few sets, which a cache may hold."""
    threads: int = 0
    """Of the CPU; 0 on a GPU."""
    heads: Heads | None = None
    """If None, x is a contiguous matrix. Otherwise x is these heads, and ``rows`` counts the heads of all tokens."""
    work: str = FORWARD
    """FORWARD, BACKWARD or BOTH."""
    rotation: rotation.Rotation | None = None
    """Of the operator that rotates heads. ``rows`` then counts the heads of q and of k of all tokens."""

    @property
    def name(self) -> str:
        """The operator's name. The one that works in place has no derivative, so its functional twin is derived."""
        return "add_rms_norm" if self.op == ADD_RMS_NORM and self.work != FORWARD else self.op

    @property
    def bytes(self) -> int:
        """The least memory traffic, in bytes: each input is read once, and each output is written once."""
        if self.op in quantised.QUANT_OPS:
            return quantised.bytes_of(self.op, self.rows, self.hidden, self.dtype.itemsize)
        passes = [work for work in (FORWARD, BACKWARD) if self.work in (work, BOTH)]
        tensors = sum(_TENSORS[work][self.op] for work in passes)
        weights = sum(1 if work == FORWARD else 2 for work in passes)  # the backward pass writes a gradient too
        weights += self.op in (NORM_ADD_NORM, QK_NORM_ROPE)
        elements = (tensors * self.rows + weights) * self.hidden
        if self.rotation:  # the cosines and sines of each token, and what is copied
            tokens = self.rows // self.rotation.heads
            elements += 2 * tokens * (self.rotation.rotary + self.rotation.copied_heads * self.hidden)
        return elements * self.dtype.itemsize

    @property
    def layout(self) -> str:
        """Where x is."""
        return str(self.heads or self.rotation or "contiguous")

    def empty(self) -> Tensor:
        if self.heads is None:
            return torch.empty(self.rows, self.hidden, dtype=self.dtype, device=self.device)
        h = self.heads
        tokens = self.rows // h.count
        buffer = torch.empty(tokens, h.row, dtype=self.dtype, device=self.device)
        return buffer.as_strided((tokens, h.count, self.hidden), (h.row, h.step, 1), h.first)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        where = f" {self.threads} threads" if self.threads else f" {self.cache}"
        return f"{self.suite}: {self.name} {self.rows} x {self.hidden} {name}{where}"


class Inputs:
    """The arguments of a point: ``sets`` copies of x and, if needed, of residual or gate; and one weight.

    Each copy has memory of its own. The in-place operators add a normalised row to their residual in every call, so the
    values grow. They stay finite for the few hundred calls between two calls of :meth:`restore`, which are not timed.
    """

    sets: list[tuple[Any, ...]]
    """The arguments of a call."""
    original: tuple[Tensor, ...]
    """The values that :meth:`restore` gives them."""

    def __init__(self, point: Point, sets: int) -> None:
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=point.device).to(point.dtype)

        self.point = point
        fused = point.rotation is not None and point.rotation.fused
        self.written = fused or point.op in (*IN_PLACE, *quantised.ADD_NORM)  # by the providers that work in place
        self.weight = normal(point.hidden).mul_(0.1)
        if point.op == QK_NORM_ROPE:
            self.sets = [rotation.empty(point) for _ in range(sets)]
            self.original = rotation.values(point, normal)
            self.restore()
            return
        count = 1 if point.op in (RMS_NORM, *quantised.NORM) else 2
        if point.op == GATED_RMS_NORM:  # x and gate are adjacent, which the provider copy_ needs
            shape = (2, point.rows, point.hidden)
            self.sets = [tuple(torch.empty(shape, dtype=point.dtype, device=point.device)) for _ in range(sets)]
        else:
            self.sets = [tuple(point.empty() for _ in range(count)) for _ in range(sets)]
        self.original = tuple(normal(*self.sets[0][0].shape) for _ in range(count))
        self.restore()

    def restore(self) -> None:
        for arguments in self.sets:
            for tensor, original in zip(arguments, self.original, strict=True):
                tensor.copy_(original)


def post_weight(weight: Tensor) -> Tensor:
    """The weight of the norm of x, which has a norm of its own: as many bytes again, and other values."""
    return weight.flip(0).contiguous()
