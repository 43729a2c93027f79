"""The argument checks of csrc/check.cpp and csrc/torch/bind.h again, for calls that never reach C++: fake tensors and devices
without a native library. The same rules, the same messages. Works with SymInts (torch._check adds guards, or run-time asserts)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIFFERENTIABLE = {
    "rms_norm": "gemma_norm.rms_norm",
    "add_rms_norm": "gemma_norm.add_rms_norm",
    "fused_add_rms_norm": "gemma_norm.add_rms_norm",
}
NO_GRADIENT = (
    "must not require grad while grad mode is enabled, got requires_grad=True; torch.ops.gemma_norm records no gradient: "
    "call {}, which is differentiable, or use torch.no_grad()"
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_name(t: Tensor) -> str:
    if t.is_nested:
        return f"a nested tensor ({t.layout})"
    return "a quantised tensor" if t.is_quantized else f"layout {t.layout}"


def check_arguments(
    op: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """All checks but those of memory, see :func:`check_memory`. Raises RuntimeError."""
    optional = {"out": out, "residual": residual, "post_residual_addition": post_residual_addition}
    like_x = {name: t for name, t in optional.items() if t is not None}
    tensors = {"x": x, "weight": weight, **like_x}
    for name, t in tensors.items():
        dense = t.layout == torch.strided and not t.is_quantized and not t.is_nested
        _require(dense, lambda: f"{op}: {name} must be a dense tensor, got {layout_name(t)}")
    for name, t in tensors.items():
        _require(t.device == x.device, lambda: f"{op}: {name} must be on x's device {x.device}, got {t.device}")
    if torch.is_grad_enabled():
        call = DIFFERENTIABLE[op] + (" without out" if out is not None else "")
        for name, t in tensors.items():
            _require(not t.requires_grad, lambda: f"{op}: {name} {NO_GRADIENT.format(call)}")

    hidden = _check_x(op, x)
    dtype = dtype_name(x.dtype)
    for name, t in like_x.items():
        _require(t.dtype == x.dtype, lambda: f"{op}: {name} must have x's dtype {dtype}, got {dtype_name(t.dtype)}")
        for same in (t.dim() == x.dim(), *(n == m for n, m in zip(t.shape, x.shape, strict=False))):
            _require(same, lambda: f"{op}: {name} must have x's shape {list(x.shape)}, got {list(t.shape)}")
        _check_rows(op, name, t)

    shape = list(weight.shape)
    for same in (weight.dim() == 1, *(n == hidden for n in shape)):
        _require(same, lambda: f"{op}: weight must have shape [{hidden}], got {shape}")
    legal = dtype if x.dtype == torch.float32 else f"{dtype} (x's) or float32"
    same = weight.dtype in (x.dtype, torch.float32)
    _require(same, lambda: f"{op}: weight must have dtype {legal}, got {dtype_name(weight.dtype)}")
    stride = weight.stride(0)
    _require(stride == 1 or hidden == 1, lambda: f"{op}: weight must be contiguous (stride 1), got stride {stride}")
    valid = math.isfinite(eps) and 0 <= eps <= torch.finfo(torch.float32).max
    _require(valid, lambda: f"{op}: eps must be finite in float32 and at least 0, got {eps:g}")


def check_memory(op: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor | None], weight: Tensor) -> None:
    """What is written must not disturb what is still to be read: an output is exactly an input, or apart from it."""
    if any(t.numel() == 0 for t in outputs.values()):
        return
    for (a, ta), (b, tb) in itertools.combinations(outputs.items(), 2):
        _require(not overlap(ta, tb), lambda: f"{op}: {b} must not overlap {a}, which is also written, got overlapping memory")
    for name, t in outputs.items():
        itself = f"{op}: {name} is written and must not overlap itself, got a tensor with shared elements"
        _require(not overlaps_itself(t), lambda: itself)
        _require(not overlap(t, weight), lambda: f"{op}: {name} is written and must not overlap weight, got overlapping memory")
        for other_name, other in inputs.items():
            apart = other is None or same_memory(t, other) or not overlap(t, other)
            either = f"must be {other_name}'s memory exactly or not overlap it"
            _require(apart, lambda: f"{op}: {name} {either}, got a partial overlap")


def same_memory(a: Tensor, b: Tensor) -> bool:
    steps = [(sa, sb) for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=False) if n != 1]
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and all(sa == sb for sa, sb in steps)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Some byte belongs to both. Exact for any strides."""
    a_begin, a_end, b_begin, b_end = *_extent(a), *_extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    a_starts, b_starts = _row_starts(a), _row_starts(b)
    a_bytes, b_bytes = a.shape[-1] * a.element_size(), b.shape[-1] * b.element_size()
    first = torch.searchsorted(b_starts, a_starts - b_bytes, right=True)
    return bool((first < torch.searchsorted(b_starts, a_starts + a_bytes)).any())


def overlaps_itself(a: Tensor) -> bool:
    """Two indices name the same byte."""
    starts = _row_starts(a)
    return bool((starts.diff() < a.shape[-1] * a.element_size()).any())


def _extent(a: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
    return a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()


def _row_starts(a: Tensor) -> Tensor:
    """The address of every row's first byte, sorted."""
    starts = torch.tensor([a.data_ptr()])
    for n, stride in zip(a.shape[:-1], a.stride()[:-1], strict=True):
        starts = (starts[:, None] + torch.arange(n) * (stride * a.element_size())).flatten()
    return starts.sort().values


def _check_x(op: str, x: Tensor) -> int:
    _require(x.dtype in DTYPES, lambda: f"{op}: x must have dtype float32, float16 or bfloat16, got {dtype_name(x.dtype)}")
    _require(x.dim() >= 1, lambda: f"{op}: x must have at least one dimension, got shape []")
    hidden = x.shape[-1]
    _require(hidden >= 1, lambda: f"{op}: x must have a last dimension of at least 1, got shape {list(x.shape)}")
    _check_rows(op, "x", x)
    return hidden


def _check_rows(op: str, name: str, t: Tensor) -> None:
    stride = t.stride(-1)
    contiguous = stride == 1 or t.shape[-1] == 1
    _require(contiguous, lambda: f"{op}: {name} must have a contiguous last dimension (stride 1), got stride {stride}")


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    torch._check(condition, message)
