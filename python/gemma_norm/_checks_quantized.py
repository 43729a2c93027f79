"""The rules of operators that quantise: csrc/core/check_quantized.cpp in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks_shared import Arguments, Check, Checked, check_group, dtype_name, require

QUANTIZED_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.int8,
    torch.float4_e2m1fn_x2,
)
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.int32)


def check_dtype(op: str, name: str, dtype: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if type(dtype) is torch.dtype and dtype in dtypes:
        return
    require(isinstance(dtype, torch.dtype), f"{op}: {name} must be a torch.dtype or None, got {dtype!r}")
    *all_but_last, last = map(dtype_name, dtypes)
    require(False, f"{op}: {name} must be {', '.join(all_but_last)} or {last}, got {dtype_name(dtype)}")


def check_quantization(call: Checked, arguments: Arguments) -> None:
    op, dtype, size = call.label, arguments["dtype"], arguments.get("scale_group_size")
    if dtype is not None:
        check_dtype(op, "dtype", dtype, QUANTIZED_DTYPES)
    check_group(call, "scale_group_size", arguments)
    if dtype is torch.float4_e2m1fn_x2:
        require("scale" not in arguments, f"{op}: scale must be None with float4_e2m1fn_x2, got a tensor")
        rule = "scale_group_size must be a multiple of 16 with float4_e2m1fn_x2"
        require(size is not None and size % 16 == 0, f"{op}: {rule}, got {size}")
    if "scale" in arguments:
        return
    scales = arguments["scale_dtype"] or torch.float32
    check_dtype(op, "scale_dtype", scales, SCALE_DTYPES)
    if scales is torch.float8_e4m3fn:
        rule = "scale_ue8m0 must be False with scale_dtype=float8_e4m3fn"
        require(not arguments["scale_ue8m0"], f"{op}: {rule}, got True")
    else:
        rule = "global_scale must be None unless scale_dtype is float8_e4m3fn"
        require("global_scale" not in call.tensors, f"{op}: {rule}, got a tensor")
    norm = arguments.get("group_size")
    if norm is None or norm >= call.x.shape[-1]:
        return
    rule = f"scale_group_size must divide group_size {norm}"
    require(size is not None and norm % size == 0, f"{op}: {rule}, got {size}")
    rule = "scale_dtype must not be int32 unless group_size is a multiple of four times scale_group_size"
    require(scales is not torch.int32 or norm // size % 4 == 0, f"{op}: {rule}, got int32")


def check_one(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    check_dtype()
    require(t.numel() == 1, f"{call.label}: {name} must have one element, got shape {list(t.shape)}")
