"""The derivatives that are measured: their tensors, their calls, and each provider's function that has a derivative.

All providers are called in the same way, with ``torch.autograd.grad``, whose gradients are new tensors. The forward
pass has run before, and its graph is kept, so a call is the backward pass alone. In a CUDA graph nothing else is left
of it: autograd takes the host's time only. Two things follow from keeping the graph. PyTorch must not let
torch.compile's backward pass overwrite what the forward pass saved ("donated buffers"), which saves memory and no time.
And a provider that overwrites the incoming gradient, as Liger does by default, gets a gradient whose values are not the
original ones from its second call on; they are restored before a replay is timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gemma_norm

from .cases import ADD_RMS_NORM, BACKWARD, GATED_RMS_NORM, RMS_NORM, Inputs, Point
from .formula import EPS

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]
Call = Callable[..., tuple[Tensor, ...]]


class GradientInputs(Inputs):
    """The tensors of a backward pass: ``count`` times what is derived for, and the incoming gradients; one weight.

    A call's arguments are the number of a set and its incoming gradients. The gradient of y is made of noise and of a
    part that is parallel to the normalised row, so that neither of the two terms of x's gradient vanishes beside the
    other.
    """

    def __init__(self, point: Point, count: int) -> None:
        generator = torch.Generator(point.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=point.device).to(point.dtype)

        shape = (point.rows, point.hidden)
        self.point, self.written = point, True
        self.sources = tuple(normal(*shape) for _ in range(1 if point.op == RMS_NORM else 2))
        s = self.sources[0] + self.sources[1] if point.op == ADD_RMS_NORM else self.sources[0]
        self.original = (normal(*shape) + s / 2, *(normal(*shape) for _ in range(point.op == ADD_RMS_NORM)))
        self.weight = normal(point.hidden).mul_(0.1).requires_grad_()
        self.leaves = [tuple(t.clone().requires_grad_() for t in self.sources) for _ in range(count)]
        self.sets = [(i, *(t.clone() for t in self.original)) for i in range(count)]
        self.exact: dict[bool, Any] = {}  # what check_gradients found, by whether the weight is zero-centred

    def restore(self) -> None:
        for _, *gradients in self.sets:
            for gradient, original in zip(gradients, self.original, strict=True):
                gradient.copy_(original)


def call_of(function: Function, inputs: GradientInputs) -> Call:
    """What is timed: the backward pass of ``function``, or the forward pass and the backward pass."""
    sources = [(*leaves, inputs.weight) for leaves in inputs.leaves]
    if inputs.point.work == BACKWARD:
        outputs = [function(*leaves) for leaves in inputs.leaves]

        def backward(index: int, *gradients: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs[index], sources[index], gradients, retain_graph=True)

        return backward

    def both(index: int, *gradients: Tensor) -> tuple[Tensor, ...]:
        leaves = inputs.leaves[index]
        return torch.autograd.grad(function(*leaves), sources[index], gradients)

    return both


def ours(op: str, weight: Tensor, gemma: bool) -> Function:
    if op == RMS_NORM:
        return lambda x: gemma_norm.rms_norm(x, weight, EPS, gemma)
    if op == GATED_RMS_NORM:
        return lambda x, gate: gemma_norm.gated_rms_norm(x, gate, weight, EPS)
    return lambda x, residual: gemma_norm.add_rms_norm(x, residual, weight, EPS, gemma)


def compiled(make: Callable[[str, Tensor, bool], Function]) -> Callable[[str, Tensor, bool], Function]:
    """``make``, which compiles, with a backward pass that may run more than once."""

    def make_repeatable(op: str, weight: Tensor, gemma: bool) -> Function:
        config: Any = importlib.import_module("torch._functorch.config")
        config.donated_buffer = False
        return make(op, weight, gemma)

    return make_repeatable


def liger(in_place: bool, op: str, weight: Tensor, gemma: bool) -> Function:
    """``in_place`` writes x's gradient into that of y. It is Liger's default, except with the addition."""
    ops: Any = importlib.import_module("liger_kernel.ops")
    options = (weight, EPS, 1.0, "gemma", in_place) if gemma else (weight, EPS, 0.0, "llama", in_place)
    if op == RMS_NORM:
        norm = ops.LigerRMSNormFunction.apply
        return lambda x: norm(x, *options)
    add_norm = ops.LigerFusedAddRMSNormFunction.apply
    return lambda x, residual: add_norm(x, residual, *options)


liger_new = functools.partial(liger, False)
liger_in_place = functools.partial(liger, True)


def copy_traffic(inputs: GradientInputs) -> Call:
    """Reads half of the bytes that the backward pass moves, and writes as many."""
    x = inputs.sources[0].flatten()
    half = inputs.point.bytes // inputs.point.dtype.itemsize // 2
    sources = [x.repeat(-(-half // x.numel()))[:half].clone() for _ in inputs.sets]
    return lambda index, *_: (torch.empty_like(sources[index]).copy_(sources[index]),)


def add_traffic(inputs: GradientInputs) -> Call:
    """Elementwise kernels of PyTorch with the same traffic as the backward pass, but for the weight."""
    leaves = [tuple(t.detach() for t in tensors) for tensors in inputs.leaves]
    if inputs.point.op == RMS_NORM:
        return lambda index, dy: (torch.add(leaves[index][0], dy),)
    return lambda index, dy, dsum: (torch.addcmul(dsum, leaves[index][0], dy),)
