"""CUDA graphs of the forward and the backward pass. A replay sees weights that were updated in place since."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gemma_norm
from support import assert_same_bits, randn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

SHAPE = (24, 256)


class Block(nn.Module):
    """Each functional operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gemma_norm.GemmaRMSNorm(SHAPE[-1]), gemma_norm.RMSNorm(SHAPE[-1])
        self.gated = gemma_norm.GatedRMSNorm(SHAPE[-1])

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y, s = self.first(x, residual)
        return self.gated(self.second(y), s)


def make(dtype: torch.dtype) -> Block:
    block = Block()
    for seed, parameter in enumerate(block.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed) / 4
    return block.to("cuda", dtype)


def inputs(dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [randn(*SHAPE, dtype=dtype, device="cuda", seed=seed + n).requires_grad_() for n in (0, 50)]


def change(block: Block, step: int) -> None:
    """As an optimizer does: in place."""
    with torch.no_grad():
        for n, parameter in enumerate(block.parameters()):
            parameter.add_(randn(SHAPE[-1], dtype=parameter.dtype, device="cuda", seed=100 * step + n))


def upstream(dtype: torch.dtype, seed: int) -> Tensor:
    return randn(*SHAPE, dtype=dtype, device="cuda", seed=seed)


def assert_same_step(block: Block, given: list[Tensor], dy: Tensor, y: Tensor, gradients: list[Tensor]) -> None:
    """y and the gradients are those of the block as it is now, without a graph."""
    eager = copy.deepcopy(block)
    leaves = [t.detach().clone().requires_grad_() for t in given]
    want = eager(*leaves)
    assert_same_bits(y.detach(), want.detach())
    wanted = torch.autograd.grad(want, [*leaves, *eager.parameters()], dy)
    for got, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, gradient)


def test_a_training_step(dtype: torch.dtype) -> None:
    block, given, dy = make(dtype), inputs(dtype, 1), upstream(dtype, 2)
    leaves = [*given, *block.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # PyTorch asks for a few calls before a capture, on another stream
        for _ in range(3):
            torch.autograd.grad(block(*given), leaves, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(*given)
        gradients = torch.autograd.grad(y, leaves, dy)
    seen = []
    for step in range(1, 4):
        change(block, step)
        with torch.no_grad():
            for static, new in zip(given, inputs(dtype, 10 * step), strict=True):
                static.copy_(new)
            dy.copy_(upstream(dtype, 10 * step + 1))
        graph.replay()
        assert_same_step(block, given, dy, y, list(gradients))
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])


def test_graphed_callables(dtype: torch.dtype) -> None:
    """PyTorch's own capture of a module's forward and backward pass."""
    block = make(dtype)
    reference = copy.deepcopy(block)
    graphed = torch.cuda.make_graphed_callables(block, tuple(inputs(dtype, 1)))
    for step in range(1, 4):
        for module in (block, reference):
            change(module, step)
        given, dy = inputs(dtype, 10 * step), upstream(dtype, 10 * step + 1)
        y = graphed(*given)
        gradients = torch.autograd.grad(y, [*given, *block.parameters()], dy)
        assert_same_step(reference, given, dy, y, list(gradients))
