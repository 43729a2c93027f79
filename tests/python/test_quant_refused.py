"""What the operators that quantise refuse, and in which words. Derivatives: test_quant_programs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from support import randn

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": (
        {"dtype": torch.float16},
        "dtype must be float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, int8 or float4_e2m1fn_x2, got float16",
    ),
    "scale dtype": (
        {"scale_dtype": torch.int8},
        "scale_dtype must be float32, float8_e8m0fnu, float8_e4m3fn or int32, got int8",
    ),
    "no scale dtype": ({"scale_dtype": 32}, "scale_dtype must be a torch.dtype or None, got 32"),
    "two kinds of scales": (
        {"scale_dtype": torch.float8_e4m3fn, "scale_ue8m0": True},
        "scale_ue8m0 must be False with scale_dtype=float8_e4m3fn, got True",
    ),
    "global scale": (
        {"global_scale": torch.ones(1)},
        "global_scale must be None unless scale_dtype is float8_e4m3fn, got a tensor",
    ),
    "float4 a row": (
        {"dtype": torch.float4_e2m1fn_x2},
        "scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got None",
    ),
    "float4 in eights": (
        {"dtype": torch.float4_e2m1fn_x2, "scale_group_size": 8},
        "scale_group_size must be a multiple of 16 with float4_e2m1fn_x2, got 8",
    ),
    "float4 with a scale": (
        {"dtype": torch.float4_e2m1fn_x2, "scale": torch.ones(1)},
        "scale must be None with float4_e2m1fn_x2, got a tensor",
    ),
    "return_y": ({"return_y": 1}, "return_y must be a bool, got 1"),
    "a dtype by its number": ({"dtype": 1}, "dtype must be a torch.dtype or None, got 1"),
    "a dtype that PyTorch cannot pass on": (
        {"dtype": torch.quint8},
        "dtype must be float8_e4m3fn, float8_e4m3fnuz, float8_e5m2, int8 or float4_e2m1fn_x2, got quint8",
    ),
    "a scale dtype that PyTorch cannot pass on": (
        {"scale_dtype": torch.uint4},
        "scale_dtype must be float32, float8_e8m0fnu, float8_e4m3fn or int32, got uint4",
    ),
    "group of True": ({"scale_group_size": True}, "scale_group_size must be an integer or None, got True"),
    "group size of 65 bits": (
        {"scale_group_size": 2**64},
        "scale_group_size must be an integer of at most 64 bits, got 18446744073709551616",
    ),
    "the largest group size": (
        {"scale_group_size": 2**63 - 1},
        "scale_group_size must divide x's last dimension, got 9223372036854775807",
    ),
    "eps: requires grad": (
        {"eps": torch.tensor(0.1, requires_grad=True)},
        "eps must be a plain number, since it has no derivative, got a tensor that requires grad",
    ),
    "no dtype": ({"dtype": "float8"}, "dtype must be a torch.dtype or None, got 'float8'"),
    "group size": ({"scale_group_size": 5}, "scale_group_size must divide x's last dimension 64, got 5"),
    "group of none": ({"scale_group_size": 0}, "scale_group_size must divide x's last dimension 64, got 0"),
    "scale: two": ({"scale": torch.ones(2)}, "scale must have one element, got shape [2]"),
    "scale: float64": ({"scale": torch.ones(1).double()}, "scale must have dtype float32, got float64"),
    "scale: number": ({"scale": 0.5}, "scale must be a tensor, got 0.5"),
    "scale_ub: none": ({"scale_ub": torch.ones(0)}, "scale_ub must have one element, got shape [0]"),
    "two scales": (
        {"scale": torch.ones(1), "scale_group_size": 8},
        "scale_group_size must be None with a scale, got 8",
    ),
    "flag": ({"round_first": "yes"}, "round_first must be a bool, got 'yes'"),
    "weight": ({"weight": torch.ones(63)}, "weight must have shape [64], got [63]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(device, name):
    replaced, message = BAD[name]
    replaced = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in replaced.items()}
    x, residual = randn(4, 64, device=device), randn(4, 64, device=device, seed=1)
    for function, extra in (
        (gemma_norm.rms_norm_quant, {}),
        (gemma_norm.add_rms_norm_quant, {"residual": residual}),
        (gemma_norm.fused_add_rms_norm_quant, {"residual": residual}),
    ):
        before = residual.clone()
        with pytest.raises(RuntimeError) as error:
            function(x, **extra, **replaced)
        assert str(error.value).startswith(f"{function.__name__}: {message}")
        assert torch.equal(residual, before)


@pytest.mark.parametrize("size", [None, 256, 96])
def test_a_scale_belongs_to_one_norm(device, size):
    x = randn(3, 768, device=device)
    with pytest.raises(RuntimeError) as error:
        gemma_norm.gated_rms_norm_quant(x, x, x[0].contiguous(), group_size=128, scale_group_size=size)
    assert str(error.value) == f"gated_rms_norm_quant: scale_group_size must divide group_size 128, got {size}"


def test_the_sum_must_not_overlap_x(device):
    x = randn(4, 64, device=device)
    with pytest.raises(RuntimeError, match="overlap"):
        gemma_norm.fused_add_rms_norm_quant(x[:3], x[1:])
