"""A block with each functional operator once, for the tests of programs and packages."""

from __future__ import annotations

from torch import Tensor, nn

import gemma_norm
from support import randn

HIDDEN = 32


class Block(nn.Module):
    """Each functional operator once, through the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = gemma_norm.GemmaRMSNorm(HIDDEN)
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.second = gemma_norm.RMSNorm(HIDDEN)
        self.gated = gemma_norm.GatedRMSNorm(HIDDEN)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=seed) / 4

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, s = self.first(x, residual)
        return self.gated(self.second(self.linear(y)), s), s


def inputs(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return randn(rows, HIDDEN, device=device), randn(rows, HIDDEN, device=device, seed=1)
