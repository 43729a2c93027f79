"""What the tests of the operators that quantise share: formats, kinds of scales, arguments, and the comparison.

Their y is that of the operators that do not quantise, bit for bit. In float32, and with round_first in any dtype, that
y can be seen, and the definition (reference.quantize), applied to it, gives every bit of q and of the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from support import bits, make_weight, randn

FORMATS = tuple(dtype for dtype in reference.QUANTIZED_LARGEST if dtype is not torch.float4_e2m1fn_x2)
SCHEMES: dict[str, dict[str, Any]] = {
    "token": {},
    "groups of 64": {"scale_group_size": 64},
    "groups of 128, column-major": {"scale_group_size": 128, "column_major_scale": True},
    "groups of 128, powers of two": {"scale_group_size": 128, "scale_ue8m0": True},
    "bounded": {"scale_ub": 1.25},
    "groups of 32, exponents": {"scale_group_size": 32, "scale_dtype": torch.float8_e8m0fnu},
    "groups of 64, four exponents": {"scale_group_size": 64, "scale_dtype": torch.int32},
    "groups of 128, float8": {"scale_group_size": 128, "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.37},
    "given": {"scale": 0.011},
}
FLOAT4 = {
    "MXFP4": {"scale_group_size": 32, "scale_dtype": torch.float8_e8m0fnu},
    "NVFP4": {"scale_group_size": 16, "scale_dtype": torch.float8_e4m3fn, "global_scale": 0.02},
    "NVFP4, no global scale": {"scale_group_size": 16, "scale_dtype": torch.float8_e4m3fn, "column_major_scale": True},
    "large groups": {"scale_group_size": 128},
    "four exponents": {"scale_group_size": 48, "scale_dtype": torch.int32, "scale_ub": 1.5},
}
NUMBERS = ("scale", "scale_ub", "global_scale")
OVERLOADS = {
    f"{name}{y}.{overload}": (name + y, overload)
    for name in ("rms_norm_quant", "add_rms_norm_quant", "fused_add_rms_norm_quant", "gated_rms_norm_quant")
    for y in ("", "_y")
    for overload in ("default", "static")
}


def on_device(scheme: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: torch.tensor(v, device=device) if k in NUMBERS else v for k, v in scheme.items()}


def strides(t: Tensor) -> list[int]:
    """Those that count: a dimension of one element may have any, and so may a tensor of none."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


def assert_quantised(y: Tensor, q: Tensor, scale: Tensor, format: torch.dtype, scheme: dict[str, Any]) -> None:
    """q and scale have every bit of the definition, applied to y in float32."""
    want = reference.quantize(y.float(), dtype=format, **scheme)
    assert q.dtype is format
    assert q.is_contiguous()
    assert torch.equal(bits(q), bits(want[0]))
    if "scale" in scheme:
        assert scale is scheme["scale"]
    else:
        assert scale.dtype is want[1].dtype is (scheme.get("scale_dtype") or torch.float32)
        assert scale.shape == want[1].shape
        assert strides(scale) == strides(want[1])
        assert torch.equal(bits(scale), bits(want[1]))


def function_of(name: str) -> Callable[..., Any]:
    return getattr(gemma_norm, name.removesuffix("_y"))


def operands(name: str, overload: str, device: str, rows: int = 4) -> dict[str, Any]:
    """Arguments of the overload."""
    given: dict[str, Any] = {"x": randn(rows, 64, dtype=torch.bfloat16, device=device)}
    if "add" in name:
        given["residual"] = randn(rows, 64, device=device, seed=1)
    if "gated" in name:
        given["gate"] = randn(rows, 64, dtype=torch.bfloat16, device=device, seed=2)
    given["weight"] = make_weight(64, torch.bfloat16, device, True)
    if "static" in overload:
        return {**given, "scale": torch.full((1,), 0.02, device=device)}
    return {**given, "scale_group_size": 32, "column_major_scale": True, "dtype": torch.int8}


def arguments(name: str, overload: str, device: str, rows: int = 4) -> dict[str, Any]:
    """Arguments with which the function calls the overload."""
    return {**operands(name, overload, device, rows), "return_y": name.endswith("_y")}
