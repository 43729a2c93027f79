"""What the tests of RMSNorm and GemmaRMSNorm share."""

from __future__ import annotations

import torch
from torch import Tensor

import gemma_norm
from support import randn


def make(kind: type[gemma_norm.RMSNorm], hidden: int, **options: object) -> gemma_norm.RMSNorm:
    module = kind(hidden, 1e-5, **options)
    with torch.no_grad():
        module.weight.add_(randn(hidden, seed=7).to(module.weight) / 10)
    return module


def inputs(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(7, 128, dtype=dtype, device=device, seed=seed) for seed in range(3)]  # x, residual, post
