"""Rotated heads whose tokens or heads are 2^32 bytes apart, on the GPU kernels compiled for the host.

The kernels for aligned heads have strides in 32 bits. Few pages of the memory are ever touched.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from support import assert_same_bits

TOKENS, HEADS, SIZE = 2, 2, 64
LARGEST = 2**32 // 2  # elements; the largest stride that 32 bits hold is 16 bytes less
STRIDES = {"fits": LARGEST - 8, "2^32 bytes": LARGEST}


def far_apart(values: Tensor, dim: int, stride: int) -> Tensor:
    """A copy of `values` in which neighbours along `dim` are `stride` elements apart."""
    strides = list(values.stride())
    strides[dim] = stride
    memory = torch.empty((values.shape[dim] - 1) * stride + values.numel(), dtype=values.dtype)
    return memory.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(
    ("operand", "dim"),
    [(name, 0) for name in ("q", "k", "gate", "v", "q_out", "k_out", "gate_out", "v_out", "cos")]
    + [(name, 1) for name in ("q", "k", "gate", "v", "q_out", "k_out", "gate_out", "v_out")],
)
def test_strides_beyond_32_bits_are_kept(emulated: ModuleType, operand: str, dim: int, stride: str) -> None:
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(torch.bfloat16)

    call = {name: tensor(TOKENS, HEADS, SIZE) for name in ("q", "k", "gate", "v")}
    call |= {name: tensor(TOKENS, SIZE) for name in ("cos", "sin")}
    outputs = [f"{name}_out" for name in ("q", "k", "gate", "v")]

    def run(changed: dict[str, Tensor]) -> list[Tensor]:
        tensors = call | {name: torch.zeros(TOKENS, HEADS, SIZE, dtype=torch.bfloat16) for name in outputs} | changed
        memories = {
            name: emulated.Memory(t.data_ptr(), list(t.shape), list(t.stride()), "bfloat16")
            for name, t in tensors.items()
        }
        emulated.run("qk_norm_rope.copies", memories, 1e-6, False, emulated.Gpu(32))
        return [tensors[name] for name in outputs]

    want = run({})
    given = call.get(operand, want[0])
    for got, expected in zip(run({operand: far_apart(given, dim, STRIDES[stride])}), want, strict=True):
        assert_same_bits(got, expected)
