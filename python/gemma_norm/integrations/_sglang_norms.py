"""SGLang's norms, each with the calls that are ours and what computes them, as of SGLang 0.5.23."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops.rms_norm import rms_norm
from ._engine import add_norm, gated_norm, takes, takes_gate

Forward = Callable[..., Any]
_FLA = "sglang.kernels.ops.attention.fla"
_FUSED_FORWARD = "self, x, residual=None, post_residual_addition=None"
batch_invariant: Callable[[], bool] = lambda: False  # noqa: E731  SGLang's own, once installed


class Norm(NamedTuple):
    """A class of SGLang's with backends."""

    name: str
    init: str
    native: str
    serves: Callable[..., bool]
    forward: Forward


class Gated(NamedTuple):
    """A class of SGLang's that has a forward and no backends."""

    module: str
    name: str
    init: str
    parameters: str
    serves: Callable[..., bool]
    forward: Forward


def _serves_rms_norm(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> bool:
    own, weight = self.__dict__, self.weight
    return (
        quant_linear is None  # a quantised result is wanted
        and own.get("_quant_linear") is None
        and own["variance_size_override"] is None
        and own["override_orig_dtype"] is None
        and not own["fp32_residual"]
        and not own.get("x_pad_to_multiple")
        and (weight.dtype is x.dtype or not own["cast_x_before_out_mul"])  # else the result is float32
        and not batch_invariant()
        and takes(x, weight, residual, post_residual_addition)
    )


def _rms_norm(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    weight = self.weight if self.has_weight else None
    eps, each_step = self.variance_epsilon, self.cast_x_before_out_mul
    if residual is None:
        return rms_norm(x, weight, eps, False, each_step)
    return add_norm(x, residual, weight, eps, False, post_residual_addition, each_step, in_place=_writes(x))


def _serves_gemma(
    self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
) -> bool:
    return takes(x, self.weight, residual, post_residual_addition)


def _gemma(self: Any, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None) -> Any:
    if residual is None:
        return rms_norm(x, self.weight, self.variance_epsilon, True)
    eps = self.variance_epsilon
    return add_norm(x, residual, self.weight, eps, True, post_residual_addition, in_place=_writes(x))


def _gemma3(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None:
        return rms_norm(x, self.weight, self.eps, True)
    return add_norm(x, residual, self.weight, self.eps, True, in_place=_writes(x))


def _serves_gemma4(self: Any, x: Tensor) -> bool:
    return (not self.with_scale or self.scale_shift in (0.0, 1.0)) and takes(x, self.weight)


def _gemma4(self: Any, x: Tensor) -> Any:
    if not self.with_scale:
        return rms_norm(x, None, self.eps)
    return rms_norm(x, self.weight, self.eps, self.scale_shift == 1.0)


def _serves_without_scale(self: Any, x: Tensor) -> bool:
    return takes(x, None)


def _without_scale(self: Any, x: Tensor) -> Any:
    return rms_norm(x, None, self.eps)


def _writes(x: Tensor) -> bool:
    """As SGLang itself: its CUDA kernels overwrite x and residual, all that it has on HIP returns new tensors."""
    return x.is_cuda and torch.version.hip is None


def _serves_fla(self: Any, x: Tensor, z: Tensor | None = None) -> bool:
    return self.bias is None and takes_gate(x, z, self.weight, self.activation)


def _fla(self: Any, x: Tensor, z: Tensor | None = None) -> Any:
    return gated_norm(x, z, self.weight, self.eps, self.activation, self.norm_before_gate, self.group_size)


def _serves_fused(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> bool:
    plain = residual is None and not prenorm and self.bias is None
    return plain and g.shape == x.shape and takes_gate(x, g, self.weight, self.activation)


def _fused(self: Any, x: Tensor, g: Tensor, *without: Any, **residual: Any) -> Any:
    return gated_norm(x, g, self.weight, self.eps, self.activation, True, None)


_RMS_NORM_INIT = (
    "self, hidden_size, eps=1e-06, var_hidden_size=None, cast_x_before_out_mul=False, fp32_residual=False, "
    "has_weight=True, weight_dtype=None, override_orig_dtype=None, x_pad_to_multiple=0, force_native=False"
)
NORMS = (
    Norm("RMSNorm", _RMS_NORM_INIT, f"{_FUSED_FORWARD}, quant_linear=None", _serves_rms_norm, _rms_norm),
    Norm("GemmaRMSNorm", "self, hidden_size, eps=1e-06", _FUSED_FORWARD, _serves_gemma, _gemma),
    Norm("Gemma3RMSNorm", "self, dim, eps=1e-06", "self, x, residual=None", _serves_gemma, _gemma3),
    Norm("Gemma4RMSNorm", "self, dim, eps=1e-06, scale_shift=0.0, with_scale=True", "self, x", _serves_gemma4, _gemma4),
    Norm("RMSNormWithoutScale", "self, hidden_size, eps=1e-06", "self, x", _serves_without_scale, _without_scale),
)
GATED = (
    Gated(
        f"{_FLA}.layernorm_gated",
        "RMSNorm",
        "self, hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None, "
        "activation='swish'",
        "self, x, z=None",
        _serves_fla,
        _fla,
    ),
    Gated(
        f"{_FLA}.fused_norm_gate",
        "FusedRMSNormGated",
        "self, hidden_size, elementwise_affine=True, eps=1e-05, activation='swish', device=None, dtype=None",
        "self, x, g, residual=None, prenorm=False, residual_in_fp32=False",
        _serves_fused,
        _fused,
    ),
)
