"""The operators of torch.ops.gemma_norm: what each takes and writes, and a call of it that is right.

A new operator is a line of OPERATORS, and the tests of what all operators have in common (test_bad_input.py) run on it.
What is its own, its values above all, is in a file of its own: test_gated.py has gated_rms_norm's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import ones

from gemma_norm import _registry

Arguments = dict[str, Any]

SHAPE = (4, 6, 16)
POSITIONAL = ("x", "residual", "gate", "post_weight", "weight")  # in this order, those that an operator has


@dataclass(frozen=True)
class Operator:
    name: str
    call_instead: str  # what is recommended where a gradient is expected
    like_x: tuple[str, ...]  # the tensors of x's shape beside x
    written: tuple[str, ...] = ()  # of the arguments
    like_weight: tuple[str, ...] = ()  # the tensors of the weight's shape beside the weight
    gemma: bool = True  # it has that option
    needs_weight: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def prefix(self) -> str:
        """What its messages begin with."""
        return f"{self.name.partition('.')[0]}: "

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("x", "weight", *self.like_x, *self.like_weight)

    @property
    def native(self) -> Callable[..., Any]:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.gemma_norm, packet), overload or "default")

    @property
    def below_autograd(self) -> Callable[..., Any]:
        """The native implementation, which records no derivative: that of the twin, where the operator has one."""
        return self.native if self.written else getattr(torch.ops.gemma_norm, f"_{self.name}").default

    @property
    def plain(self) -> Callable[..., Any]:
        """The implementation in plain PyTorch, which serves devices without a native one."""
        return _registry.OPERATORS[self.name].plain

    def good(self) -> Arguments:
        """Arguments that are right. Tensors are made on torch's default device."""
        shapes = dict.fromkeys(self.like_x, SHAPE) | dict.fromkeys(self.like_weight, SHAPE[-1:])
        return {"x": ones(SHAPE), "weight": 2 * ones(16), "eps": 1e-6} | {name: ones(s) for name, s in shapes.items()}


def call(kernel: Callable[..., Any], arguments: Arguments) -> Any:
    arguments = dict(arguments)
    positional = [arguments.pop(name) for name in POSITIONAL if name in arguments]
    return kernel(*positional, **arguments)


RMS_NORM = Operator("rms_norm", "rms_norm", ())
RMS_NORM_OUT = Operator("rms_norm.out", "rms_norm without out", ("out",), written=("out",))
ADD_RMS_NORM = Operator("add_rms_norm", "add_rms_norm", ("residual", "post_residual_addition"))
FUSED_ADD_RMS_NORM = Operator(
    "fused_add_rms_norm", "add_rms_norm", ("residual", "post_residual_addition"), written=("x", "residual")
)
GATED_RMS_NORM = Operator("gated_rms_norm", "gated_rms_norm", ("gate",), gemma=False, needs_weight=True)
GATED_RMS_NORM_OUT = Operator(
    "gated_rms_norm.out",
    "gated_rms_norm without out",
    ("gate", "out"),
    written=("out",),
    gemma=False,
    needs_weight=True,
)
RMS_NORM_ADD_RMS_NORM = Operator(
    "rms_norm_add_rms_norm", "rms_norm_add_rms_norm", ("residual",), like_weight=("post_weight",), needs_weight=True
)
FUSED_RMS_NORM_ADD_RMS_NORM = Operator(
    "fused_rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm",
    ("residual",),
    written=("x", "residual"),
    like_weight=("post_weight",),
    needs_weight=True,
)
OPERATORS = (
    RMS_NORM,
    RMS_NORM_OUT,
    ADD_RMS_NORM,
    FUSED_ADD_RMS_NORM,
    GATED_RMS_NORM,
    GATED_RMS_NORM_OUT,
    RMS_NORM_ADD_RMS_NORM,
    FUSED_RMS_NORM_ADD_RMS_NORM,
)


def with_tensor(*names: str) -> tuple[Operator, ...]:
    """The operators that have these tensors."""
    return tuple(op for op in OPERATORS if set(names) <= set(op.tensors))


def that_write(name: str) -> tuple[Operator, ...]:
    return tuple(op for op in OPERATORS if name in op.written)
