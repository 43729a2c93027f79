"""The argument checks of csrc/core/check.cpp and csrc/torch/bind.h in Python, for calls that never reach C++.

Those are calls with fake tensors, calls inside torch.func's transforms, and calls on devices without a native library.
The rules, the messages and the order of the checks are the same as in C++. Sizes may be symbolic: torch._check turns a
condition on them into a guard or an assertion at run time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Each message, in C++ too, which says that a tensor must not be written contains one of these.
UNWRITABLE = ("overlap", "inference tensor", "negated lazily", "got a DTensor")


class Extent(Enum):
    ROWS = "[..., hidden]: that of x, which determines the shapes of all other tensors"
    LIKE_X = "x's shape, with strides of its own and a contiguous last dimension"
    HIDDEN = "[hidden], contiguous"


class DTypes(Enum):
    FLOAT = "float32, float16 or bfloat16"
    LIKE_X = "x's"
    X_OR_FLOAT32 = "x's or float32"
    WEIGHT = "x's or float32; if x is float32, any of FLOAT"
    LIKE_RESIDUAL = "residual's"
    LIKE_WEIGHT = "weight's"
    X_OR_NARROWER = "x's; if x is float32, any of FLOAT"


class Rule(NamedTuple):
    """What the operator requires of one of its tensors."""

    extent: Extent
    dtypes: DTypes
    optional: bool = False


X, LIKE_X = Rule(Extent.ROWS, DTypes.FLOAT), Rule(Extent.LIKE_X, DTypes.LIKE_X)
OPTIONAL_LIKE_X = LIKE_X._replace(optional=True)
RESIDUAL = Rule(Extent.LIKE_X, DTypes.X_OR_FLOAT32)
OPTIONAL_LIKE_RESIDUAL = Rule(Extent.LIKE_X, DTypes.LIKE_RESIDUAL, optional=True)
WEIGHT = Rule(Extent.HIDDEN, DTypes.WEIGHT)
OPTIONAL_WEIGHT = WEIGHT._replace(optional=True)
LIKE_WEIGHT = Rule(Extent.HIDDEN, DTypes.LIKE_WEIGHT)


class Described(Protocol):
    """What the checks need to know of a :class:`gemma_norm._registry.Operator`."""

    @property
    def label(self) -> str: ...
    @property
    def rules(self) -> Mapping[str, Rule]: ...
    @property
    def written(self) -> tuple[str, ...]: ...
    @property
    def call_instead(self) -> str: ...


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_name(t: Tensor) -> str:
    if t.is_nested:
        return f"a nested tensor ({t.layout})"
    return "a quantised tensor" if t.is_quantized else f"layout {t.layout}"


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of ``tensors`` is a dual tensor of forward-mode differentiation."""
    unpack_dual: Any = forward_ad.unpack_dual  # not typed
    if forward_ad._current_level < 0:
        return False
    try:
        return any(isinstance(t, Tensor) and unpack_dual(t).tangent is not None for t in tensors)
    except RuntimeError:  # tensors that torch.autograd.functional batches with vectorize=True cannot be unpacked
        return True


def check_arguments(op: Described, arguments: Mapping[str, Any], transformed: bool = False) -> None:
    """Raise RuntimeError if an argument is wrong. :func:`check_memory` makes the remaining checks, those of memory.

    ``transformed``: the call is inside a torch.func transform, which differentiates or batches the definition in plain
    PyTorch. Derivatives are then allowed, and strides are not checked, because a hidden batch dimension changes them.
    """
    label, x = op.label, arguments["x"]
    tensors = _tensors(op, arguments)
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            _require(False, f"{label}: {name} must be a tensor, got {t!r}")
    for name, t in tensors.items():
        dense = t.layout == torch.strided and not t.is_quantized and not t.is_nested
        _require(dense, f"{label}: {name} must be a dense tensor, got {layout_name(t)}")
    for name, t in tensors.items():
        _require(t.device == x.device, f"{label}: {name} must be on x's device {x.device}, got {t.device}")
    if not transformed:
        _check_derivatives(op, tensors)
    for name, t in tensors.items():
        check_dtype = functools.partial(_check_dtype, label, name, t, op.rules[name].dtypes, tensors)
        _CHECKS[op.rules[name].extent](label, name, t, x, not transformed, check_dtype)
    _check_options(label, arguments, x)


def check_memory(op: Described, arguments: Mapping[str, Any]) -> None:
    """Raise RuntimeError if a write could change an element that is still to be read.

    An output must be exactly an input's memory or not overlap it.
    """
    label, tensors = op.label, _tensors(op, arguments)
    if tensors["x"].numel() == 0:
        return
    rows = {name: t for name, t in tensors.items() if op.rules[name].extent is not Extent.HIDDEN}
    inputs = {name: t for name, t in rows.items() if name != "out"}
    shared = {name: t for name, t in tensors.items() if name not in rows}
    in_place = "out" in rows and same_memory(rows["out"], rows["x"])
    outputs = {"x" if in_place and name == "out" else name: rows[name] for name in op.written}
    for (a, ta), (b, tb) in itertools.combinations(outputs.items(), 2):
        both = f"{label}: {b} must not overlap {a}, which is also written, got overlapping memory"
        _require(not overlap(ta, tb), both)
    for name, t in outputs.items():
        written = f"{label}: {name} is written and must not overlap"
        _require(not overlaps_itself(t), f"{written} itself, got a tensor with shared elements")
        for other_name, other in shared.items():
            _require(not overlap(t, other), f"{written} {other_name}, got overlapping memory")
        for other_name, other in inputs.items():
            apart = same_memory(t, other) or not overlap(t, other)
            either = f"{other_name}'s memory exactly or not overlap it"
            _require(apart, f"{label}: {name} must be {either}, got a partial overlap")


def _tensors(op: Described, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the call by name, in the order of the rules, without optional ones that are left out."""
    named = ((name, arguments[name], rule.optional) for name, rule in op.rules.items())
    return {name: t for name, t, optional in named if not (optional and t is None)}


def same_memory(a: Tensor, b: Tensor) -> bool:
    strides = [(sa, sb) for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=False) if n != 1]
    same = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
    return same and all(sa == sb for sa, sb in strides)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to both tensors, exactly, for any strides."""
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    if a_end <= b_begin or b_end <= a_begin:
        return False
    a_starts, b_starts = _row_starts(a), _row_starts(b)
    # A row of b overlaps a row of a if it begins before that row's end, but after (that row's beginning - the length of
    # a row of b).
    first = torch.searchsorted(b_starts, a_starts - _row_bytes(b), right=True)
    return bool((first < torch.searchsorted(b_starts, a_starts + _row_bytes(a))).any())


def overlaps_itself(a: Tensor) -> bool:
    """Whether two elements share a byte."""
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


def _check_derivatives(op: Described, tensors: Mapping[str, Tensor]) -> None:
    call = f"call {op.call_instead}, which is differentiable"
    recording = torch.is_grad_enabled()
    for name, t in tensors.items():
        rule = "must not require grad while grad mode is enabled, got requires_grad=True"
        advice = f"this operator records no gradient: {call}, or use torch.no_grad()"
        _require(not (recording and t.requires_grad), f"{op.label}: {name} {rule}; {advice}")
        rule = "must not have a tangent, got a dual tensor"
        advice = f"this operator records no derivative: {call}"
        _require(not has_tangent(t), f"{op.label}: {name} {rule}; {advice}")


def _check_options(op: str, arguments: Mapping[str, Any], x: Tensor) -> None:
    eps, weight = arguments["eps"], arguments["weight"]
    in_range = 0 <= eps <= torch.finfo(torch.float32).max  # False for NaN
    if not in_range:  # a branch, so that the message is made only here: Dynamo cannot print a dynamic number
        _require(False, f"{op}: eps must be finite in float32 and at least 0, got {eps:g}")
    gemma, each_step = arguments.get("gemma", False), arguments.get("round_each_step", False)
    _require(not (gemma and weight is None), f"{op}: gemma must be False without a weight, got True")
    _require(not (gemma and each_step), f"{op}: round_each_step must be False with gemma=True, got True")
    if each_step and weight is not None:
        rule = f"must have x's dtype {dtype_name(x.dtype)} with round_each_step=True"
        _require(weight.dtype == x.dtype, f"{op}: weight {rule}, got {dtype_name(weight.dtype)}")
    size = arguments.get("group_size")
    if size is not None:
        divides = size > 0 and x.shape[-1] % size == 0
        _require(divides, f"{op}: group_size must divide x's last dimension {x.shape[-1]}, got {size}")


def _check_dtype(op: str, name: str, t: Tensor, dtypes: DTypes, tensors: Mapping[str, Tensor]) -> None:
    x, got = tensors["x"], dtype_name(t.dtype)
    own = dtype_name(x.dtype)
    if dtypes is DTypes.X_OR_NARROWER:
        dtypes = DTypes.FLOAT if x.dtype == torch.float32 else DTypes.LIKE_X
    if dtypes is DTypes.FLOAT or (dtypes is DTypes.WEIGHT and x.dtype == torch.float32):
        _require(t.dtype in DTYPES, f"{op}: {name} must have dtype float32, float16 or bfloat16, got {got}")
    elif dtypes is DTypes.LIKE_X:
        _require(t.dtype == x.dtype, f"{op}: {name} must have x's dtype {own}, got {got}")
    elif dtypes is DTypes.LIKE_RESIDUAL:
        residual = tensors["residual"].dtype
        _require(t.dtype == residual, f"{op}: {name} must have residual's dtype {dtype_name(residual)}, got {got}")
    elif dtypes is DTypes.LIKE_WEIGHT:
        weight = tensors["weight"].dtype
        _require(t.dtype == weight, f"{op}: {name} must have weight's dtype {dtype_name(weight)}, got {got}")
    else:
        legal = own if x.dtype == torch.float32 else f"{own} (x's) or float32"
        _require(t.dtype in (x.dtype, torch.float32), f"{op}: {name} must have dtype {legal}, got {got}")


Check = Callable[[], None]


def _check_x(op: str, name: str, x: Tensor, _: Tensor, strides: bool, check_dtype: Check) -> None:
    check_dtype()
    _require(x.dim() >= 1, f"{op}: {name} must have at least one dimension, got shape []")
    _require(x.dim() <= 64, f"{op}: {name} must have at most 64 dimensions, got {x.dim()}")
    at_least_1 = f"{op}: {name} must have a last dimension of at least 1, got shape {list(x.shape)}"
    _require(x.shape[-1] >= 1, at_least_1)
    _check_rows(op, name, x, strides)


def _check_like_x(op: str, name: str, t: Tensor, x: Tensor, strides: bool, check_dtype: Check) -> None:
    check_dtype()
    for same in (t.dim() == x.dim(), *(n == m for n, m in zip(t.shape, x.shape, strict=False))):
        _require(same, f"{op}: {name} must have x's shape {list(x.shape)}, got {list(t.shape)}")
    _check_rows(op, name, t, strides)


def _check_hidden(op: str, name: str, t: Tensor, x: Tensor, strides: bool, check_dtype: Check) -> None:
    hidden = x.shape[-1]
    for same in (t.dim() == 1, *(n == hidden for n in t.shape)):
        _require(same, f"{op}: {name} must have shape [{hidden}], got {list(t.shape)}")
    check_dtype()
    if strides:
        contiguous = t.stride(0) == 1 or hidden == 1
        _require(contiguous, f"{op}: {name} must be contiguous (stride 1), got stride {t.stride(0)}")


def _check_rows(op: str, name: str, t: Tensor, strides: bool) -> None:
    if strides:
        contiguous = t.stride(-1) == 1 or t.shape[-1] == 1
        rule = "must have a contiguous last dimension (stride 1)"
        _require(contiguous, f"{op}: {name} {rule}, got stride {t.stride(-1)}")


_CHECKS = {Extent.ROWS: _check_x, Extent.LIKE_X: _check_like_x, Extent.HIDDEN: _check_hidden}


def _require(condition: bool | torch.SymBool, message: str) -> None:
    if not torch.compiler.is_dynamo_compiling():
        check: Any = torch._check  # not typed
        check(condition, lambda: message)
    elif not condition:  # Dynamo cannot trace torch._check if its message refers to a variable
        raise RuntimeError(message)
