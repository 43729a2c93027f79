"""What the operators return, without computing it: for FakeTensorMode, meta tensors, torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_arguments
from ._library import operator_implementations


def _rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False) -> Tensor:
    check_arguments("rms_norm", x, weight, eps)
    return x.new_empty(x.shape)


def _rms_norm_out(x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor) -> Tensor:
    check_arguments("rms_norm", x, weight, eps, out=out)
    return out


def _rms_norm_out_functional(
    x: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False, *, out: Tensor
) -> Tensor:
    """For torch.compile, which cannot by itself make an operator functional that returns one of its arguments."""
    check_arguments("rms_norm", x, weight, eps, out=out)
    return out.copy_(torch.ops.gemma_norm.rms_norm.default(x, weight, eps, gemma))


def _fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> None:
    check_arguments(
        "fused_add_rms_norm", x, weight, eps, residual=residual, post_residual_addition=post_residual_addition
    )


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    gemma: bool = False,
    post_residual_addition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_arguments("add_rms_norm", x, weight, eps, residual=residual, post_residual_addition=post_residual_addition)
    return x.new_empty(x.shape), x.new_empty(x.shape)


_library = operator_implementations(__name__)
_library.impl("rms_norm.out", _rms_norm_out_functional, "Functionalize")
torch.library.register_fake("gemma_norm::rms_norm", _rms_norm, lib=_library)
torch.library.register_fake("gemma_norm::rms_norm.out", _rms_norm_out, lib=_library)
torch.library.register_fake("gemma_norm::fused_add_rms_norm", _fused_add_rms_norm, lib=_library)
torch.library.register_fake("gemma_norm::add_rms_norm", _add_rms_norm, lib=_library)
