"""The argument checks of csrc/check.cpp and csrc/torch/bind.h again, for calls that never reach C++.

Those are calls with fake tensors and on devices without a native library. The rules and the messages are the same.
Sizes may be symbolic: torch._check turns conditions on them into guards or into assertions at run time.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIFFERENTIABLE = {
    "rms_norm": "gemma_norm.rms_norm",
    "add_rms_norm": "gemma_norm.add_rms_norm",
    "fused_add_rms_norm": "gemma_norm.add_rms_norm",
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_name(t: Tensor) -> str:
    if t.is_nested:
        return f"a nested tensor ({t.layout})"
    return "a quantised tensor" if t.is_quantized else f"layout {t.layout}"


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them is a dual tensor of forward-mode differentiation."""
    unpack_dual: Any = forward_ad.unpack_dual  # not typed
    return forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and unpack_dual(t).tangent is not None for t in tensors
    )


def check_arguments(
    op: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    transformed: bool = False,
    **like_x: Tensor | None,
) -> None:
    """All checks but those of memory, see :func:`check_memory`. Raises RuntimeError.

    ``like_x``: the other tensors of the call by name, of which post_residual_addition may be None. ``transformed``: for an
    implementation in plain PyTorch that PyTorch differentiates or batches. Gradients may be required then, and strides,
    which a batch dimension may lie between, are not looked at.
    """
    if like_x.get("post_residual_addition") is None:
        like_x.pop("post_residual_addition", None)
    out = like_x.get("out")
    tensors: dict[str, Any] = {"x": x, "weight": weight, **like_x}
    for name, t in tensors.items():
        _require(isinstance(t, Tensor), f"{op}: {name} must be a tensor, got {t}")
    for name, t in tensors.items():
        dense = t.layout == torch.strided and not t.is_quantized and not t.is_nested
        _require(dense, f"{op}: {name} must be a dense tensor, got {layout_name(t)}")
    for name, t in tensors.items():
        _require(t.device == x.device, f"{op}: {name} must be on x's device {x.device}, got {t.device}")
    if not transformed:
        call = f"call {DIFFERENTIABLE[op]}{' without out' if out is not None else ''}, which is differentiable"
        grad_rule = "must not require grad while grad mode is enabled, got requires_grad=True"
        grad_advice = f"torch.ops.gemma_norm records no gradient: {call}, or use torch.no_grad()"
        tangent_rule = "must not have a tangent, got a dual tensor"
        tangent_advice = f"torch.ops.gemma_norm records no derivative: {call}"
        recording = torch.is_grad_enabled()
        for name, t in tensors.items():
            _require(not (recording and t.requires_grad), f"{op}: {name} {grad_rule}; {grad_advice}")
            _require(not has_tangent(t), f"{op}: {name} {tangent_rule}; {tangent_advice}")

    _require(x.dtype in DTYPES, f"{op}: x must have dtype float32, float16 or bfloat16, got {dtype_name(x.dtype)}")
    _require(x.dim() >= 1, f"{op}: x must have at least one dimension, got shape []")
    _require(x.shape[-1] >= 1, f"{op}: x must have a last dimension of at least 1, got shape {list(x.shape)}")
    if not transformed:
        _check_rows(op, "x", x)
    _check_weight(op, x, weight, transformed)
    for name, t in tensors.items():
        if name in ("x", "weight"):
            continue
        expected = f"{op}: {name} must have x's"
        _require(t.dtype == x.dtype, f"{expected} dtype {dtype_name(x.dtype)}, got {dtype_name(t.dtype)}")
        for same in (t.dim() == x.dim(), *(n == m for n, m in zip(t.shape, x.shape, strict=False))):
            _require(same, f"{expected} shape {list(x.shape)}, got {list(t.shape)}")
        if not transformed:
            _check_rows(op, name, t)
    in_range = 0 <= eps <= torch.finfo(torch.float32).max  # so NaN is not
    if not in_range:  # Dynamo cannot print a number that it keeps dynamic
        _require(False, f"{op}: eps must be finite in float32 and at least 0, got {eps}")


def check_memory(op: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor | None], weight: Tensor) -> None:
    """What is written must not disturb what is still to be read: an output is exactly an input, or apart from it."""
    if any(t.numel() == 0 for t in outputs.values()):
        return
    for (a, ta), (b, tb) in itertools.combinations(outputs.items(), 2):
        _require(not overlap(ta, tb), f"{op}: {b} must not overlap {a}, which is also written, got overlapping memory")
    for name, t in outputs.items():
        written = f"{op}: {name} is written and must not overlap"
        _require(not overlaps_itself(t), f"{written} itself, got a tensor with shared elements")
        _require(not overlap(t, weight), f"{written} weight, got overlapping memory")
        for other_name, other in inputs.items():
            apart = other is None or same_memory(t, other) or not overlap(t, other)
            either = f"{other_name}'s memory exactly or not overlap it"
            _require(apart, f"{op}: {name} must be {either}, got a partial overlap")


def same_memory(a: Tensor, b: Tensor) -> bool:
    strides = [(sa, sb) for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=False) if n != 1]
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and all(sa == sb for sa, sb in strides)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Some byte belongs to both. Exact for any strides."""
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    a_starts, b_starts = _row_starts(a), _row_starts(b)
    # Some row of b must begin after (a row of a) - (a row of b's length), and before that row of a ends.
    first = torch.searchsorted(b_starts, a_starts - _row_bytes(b), right=True)
    return bool((first < torch.searchsorted(b_starts, a_starts + _row_bytes(a))).any())


def overlaps_itself(a: Tensor) -> bool:
    """Two indices name the same byte."""
    return bool((_row_starts(a).diff() < _row_bytes(a)).any())


def _row_bytes(a: Tensor) -> int:
    return a.shape[-1] * a.element_size()


def _extent(a: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
    return a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()


def _row_starts(a: Tensor) -> Tensor:
    """The address of every row's first byte, sorted."""
    starts = torch.tensor([a.data_ptr()], device="cpu")
    for n, stride in zip(a.shape[:-1], a.stride()[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(n, device="cpu") * (stride * a.element_size())).flatten()
    return starts.sort().values


def _check_weight(op: str, x: Tensor, weight: Tensor, transformed: bool) -> None:
    hidden = x.shape[-1]
    for same in (weight.dim() == 1, *(n == hidden for n in weight.shape)):
        _require(same, f"{op}: weight must have shape [{hidden}], got {list(weight.shape)}")
    legal = dtype_name(x.dtype) if x.dtype == torch.float32 else f"{dtype_name(x.dtype)} (x's) or float32"
    matches = weight.dtype in (x.dtype, torch.float32)
    _require(matches, f"{op}: weight must have dtype {legal}, got {dtype_name(weight.dtype)}")
    contiguous = transformed or weight.stride(0) == 1 or hidden == 1
    _require(contiguous, f"{op}: weight must be contiguous (stride 1), got stride {weight.stride(0)}")


def _check_rows(op: str, name: str, t: Tensor) -> None:
    contiguous = t.stride(-1) == 1 or t.shape[-1] == 1
    rule = "must have a contiguous last dimension (stride 1)"
    _require(contiguous, f"{op}: {name} {rule}, got stride {t.stride(-1)}")


def _require(condition: bool | torch.SymBool, message: str) -> None:
    if not torch.compiler.is_dynamo_compiling():
        check: Any = torch._check  # not typed
        check(condition, lambda: message)
    elif not condition:  # Dynamo cannot trace torch._check with a message that refers to anything
        raise RuntimeError(message)
