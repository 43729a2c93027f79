"""What the operators return, without computing it: for FakeTensorMode, meta tensors, torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_arguments


@torch.library.register_fake("gemma_norm::rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False) -> Tensor:
    check_arguments("rms_norm", x, weight, eps)
    return x.new_empty(x.shape)


@torch.library.register_fake("gemma_norm::rms_norm.out")
def _rms_norm_out(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor) -> Tensor:
    check_arguments("rms_norm", x, weight, eps, out=out)
    return out


@torch.library.register_fake("gemma_norm::fused_add_rms_norm")
def _fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    check_arguments("fused_add_rms_norm", x, weight, eps, residual, post_residual_addition)


@torch.library.register_fake("gemma_norm::add_rms_norm")
def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_arguments("add_rms_norm", x, weight, eps, residual, post_residual_addition)
    return x.new_empty(x.shape), x.new_empty(x.shape)
