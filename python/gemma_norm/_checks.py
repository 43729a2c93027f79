"""The argument checks of csrc/core/check.cpp and csrc/torch/bind.h in Python, for calls that never reach C++.

Those are calls with fake tensors, calls inside torch.func's transforms, and calls on devices without a native library.
The rules, the messages and the order of the checks are the same as in C++. Sizes may be symbolic: torch._check turns a
condition on them into a guard or an assertion at run time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks_heads import check_angle, check_angles, check_heads, check_positions, check_table, check_x_of_heads
from ._checks_quantized import check_one, check_quantization
from ._checks_shared import Arguments, Check, Checked, check_group, check_rows, dtype_name, require
from ._overlap import overlap, overlaps_itself, same_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
# Each message, in C++ too, which says that a tensor must not be written contains one of these.
UNWRITABLE = ("overlap", "inference tensor", "negated lazily", "got a DTensor")


class Extent(Enum):
    ROWS = "[..., hidden]: that of x, which determines the shapes of all other tensors"
    LIKE_X = "x's shape, with strides of its own and a contiguous last dimension"
    HIDDEN = "[hidden], contiguous"
    ROWS_OF_HEADS = "[..., heads, hidden]: that of x, as ROWS"
    HEADS = "x's shape, but for the number of heads"
    ANGLES = "[..., rotary]: x's leading dimensions without the heads"
    TABLE = "[positions, rotary]"
    ONE = "one element, any number of dimensions"
    SCALES = "[..., groups]: x's leading dimensions; a result alone"
    POSITIONS = "x's leading dimensions without the heads; with mrope_section, [3, ...]"


class DTypes(Enum):
    FLOAT = "float32, float16 or bfloat16"
    LIKE_X = "x's"
    X_OR_FLOAT32 = "x's or float32"
    WEIGHT = "x's or float32; if x is float32, any of FLOAT"
    LIKE_RESIDUAL = "residual's"
    LIKE_WEIGHT = "weight's"
    X_OR_NARROWER = "x's; if x is float32, any of FLOAT"
    LIKE_COS = "cos's"
    INTEGER = "int32 or int64"
    FLOAT32 = "float32"


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
OPTIONAL_LIKE_WEIGHT = LIKE_WEIGHT._replace(optional=True)
Q = Rule(Extent.ROWS_OF_HEADS, DTypes.FLOAT)
K = Rule(Extent.HEADS, DTypes.LIKE_X)
COPIED = K._replace(optional=True)
COS = Rule(Extent.ANGLES, DTypes.X_OR_FLOAT32, optional=True)
SIN = Rule(Extent.ANGLES, DTypes.LIKE_COS, optional=True)
COS_SIN_CACHE = Rule(Extent.TABLE, DTypes.X_OR_FLOAT32, optional=True)
POSITIONS = Rule(Extent.POSITIONS, DTypes.INTEGER, optional=True)
ONE = Rule(Extent.ONE, DTypes.FLOAT32)
OPTIONAL_ONE = ONE._replace(optional=True)
# The extents of tensors with rows that are normalised.
WITH_ROWS = (Extent.ROWS, Extent.LIKE_X, Extent.ROWS_OF_HEADS, Extent.HEADS)


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
    label, tensors = op.label, _tensors(op, arguments)
    x_name, weight_name = list(op.rules)[:2]
    call = Checked(label, x_name, weight_name, tensors)
    x = tensors[call.x_name]
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            require(False, f"{label}: {name} must be a tensor, got {t!r}")
    for name, t in tensors.items():
        dense = t.layout == torch.strided and not t.is_quantized and not t.is_nested
        require(dense, f"{label}: {name} must be a dense tensor, got {layout_name(t)}")
    for name, t in tensors.items():
        on_device = f"{name} must be on {call.x_name}'s device {x.device}"
        require(t.device == x.device, f"{label}: {on_device}, got {t.device}")
    if not transformed:
        check_derivatives(op, tensors)
    for name, t in tensors.items():
        check_dtype = functools.partial(_check_dtype, call, name, t, op.rules[name].dtypes)
        _CHECKS[op.rules[name].extent](call, name, t, not transformed, check_dtype, arguments)
    _check_options(call, arguments)
    if "positions" in op.rules:
        check_angles(call, arguments)


def check_memory(op: Described, arguments: Mapping[str, Any]) -> None:
    """Raise RuntimeError if a write could change an element that is still to be read.

    An output must be exactly an input's memory or not overlap it.
    """
    label, tensors = op.label, _tensors(op, arguments)
    if next(iter(tensors.values())).numel() == 0:
        return
    rows = {name: t for name, t in tensors.items() if op.rules[name].extent in WITH_ROWS}
    inputs = {name: t for name, t in rows.items() if name != "out"}
    shared = {name: t for name, t in tensors.items() if name not in rows}
    in_place = "out" in rows and same_memory(rows["out"], rows["x"])
    outputs = {"x" if in_place and name == "out" else name: rows[name] for name in op.written}
    for (a, ta), (b, tb) in itertools.combinations(outputs.items(), 2):
        both = f"{label}: {b} must not overlap {a}, which is also written, got overlapping memory"
        require(not overlap(ta, tb), both)
    for name, t in outputs.items():
        written = f"{label}: {name} is written and must not overlap"
        require(not overlaps_itself(t), f"{written} itself, got a tensor with shared elements")
        for other_name, other in shared.items():
            require(not overlap(t, other), f"{written} {other_name}, got overlapping memory")
        for other_name, other in inputs.items():
            apart = same_memory(t, other) or not overlap(t, other)
            either = f"{other_name}'s memory exactly or not overlap it"
            require(apart, f"{label}: {name} must be {either}, got a partial overlap")


def _tensors(op: Described, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the call by name, in the order of the rules, without optional ones that are left out."""
    named = ((name, arguments[name], rule.optional) for name, rule in op.rules.items())
    return {name: t for name, t, optional in named if not (optional and t is None)}


def check_derivatives(op: Described, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError if a derivative with respect to one of ``tensors`` is expected."""
    call = f"call {op.call_instead}, which is differentiable"
    recording = torch.is_grad_enabled()
    for name, t in tensors.items():
        rule = "must not require grad while grad mode is enabled, got requires_grad=True"
        advice = f"this operator records no gradient: {call}, or use torch.no_grad()"
        require(not (recording and t.requires_grad), f"{op.label}: {name} {rule}; {advice}")
        rule = "must not have a tangent, got a dual tensor"
        advice = f"this operator records no derivative: {call}"
        require(not has_tangent(t), f"{op.label}: {name} {rule}; {advice}")


def _check_options(call: Checked, arguments: Mapping[str, Any]) -> None:
    op, x, name = call.label, call.x, call.weight_name
    eps, weight = arguments["eps"], arguments[name]
    in_range = 0 <= eps <= torch.finfo(torch.float32).max  # False for NaN
    if not in_range:  # a branch, so that the message is made only here: Dynamo cannot print a dynamic number
        require(False, f"{op}: eps must be finite in float32 and at least 0, got {eps:g}")
    gemma, each_step = arguments.get("gemma", False), arguments.get("round_each_step", False)
    require(not (gemma and weight is None), f"{op}: gemma must be False without a weight, got True")
    require(not (gemma and each_step), f"{op}: round_each_step must be False with gemma=True, got True")
    if each_step and weight is not None:
        rule = f"must have {call.x_name}'s dtype {dtype_name(x.dtype)} with round_each_step=True"
        require(weight.dtype == x.dtype, f"{op}: {name} {rule}, got {dtype_name(weight.dtype)}")
    check_group(call, "group_size", arguments)
    if "dtype" in arguments:
        check_quantization(call, arguments)


def _check_dtype(call: Checked, name: str, t: Tensor, dtypes: DTypes) -> None:
    op, x, got = call.label, call.x, dtype_name(t.dtype)
    own = dtype_name(x.dtype)
    if dtypes is DTypes.X_OR_NARROWER:
        dtypes = DTypes.FLOAT if x.dtype == torch.float32 else DTypes.LIKE_X
    if dtypes is DTypes.FLOAT or (dtypes is DTypes.WEIGHT and x.dtype == torch.float32):
        require(t.dtype in DTYPES, f"{op}: {name} must have dtype float32, float16 or bfloat16, got {got}")
    elif dtypes is DTypes.INTEGER:
        require(t.dtype in INTEGERS, f"{op}: {name} must have dtype int32 or int64, got {got}")
    elif dtypes is DTypes.FLOAT32:
        require(t.dtype == torch.float32, f"{op}: {name} must have dtype float32, got {got}")
    elif dtypes is DTypes.LIKE_X:
        require(t.dtype == x.dtype, f"{op}: {name} must have {call.x_name}'s dtype {own}, got {got}")
    elif dtypes in _LIKE:
        other = call.weight_name if dtypes is DTypes.LIKE_WEIGHT else _LIKE[dtypes]
        if other in call.tensors:  # otherwise the call is refused because `other` is missing
            want = call.tensors[other].dtype
            require(t.dtype == want, f"{op}: {name} must have {other}'s dtype {dtype_name(want)}, got {got}")
    else:
        legal = own if x.dtype == torch.float32 else f"{own} ({call.x_name}'s) or float32"
        require(t.dtype in (x.dtype, torch.float32), f"{op}: {name} must have dtype {legal}, got {got}")


def _check_x(call: Checked, name: str, x: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    op = call.label
    check_dtype()
    require(x.dim() >= 1, f"{op}: {name} must have at least one dimension, got shape []")
    require(x.dim() <= 64, f"{op}: {name} must have at most 64 dimensions, got {x.dim()}")
    at_least_1 = f"{op}: {name} must have a last dimension of at least 1, got shape {list(x.shape)}"
    require(x.shape[-1] >= 1, at_least_1)
    check_rows(op, name, x, strides)


def _check_like_x(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    check_dtype()
    x = call.x
    for same in (t.dim() == x.dim(), *(n == m for n, m in zip(t.shape, x.shape, strict=False))):
        # One f-string: Dynamo puts quotes around the text of one within another, if that has symbolic sizes.
        text = f"{call.label}: {name} must have {call.x_name}'s shape {list(x.shape)}, got {list(t.shape)}"
        require(same, text)
    check_rows(call.label, name, t, strides)


def _check_hidden(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    op, hidden = call.label, call.x.shape[-1]
    for same in (t.dim() == 1, *(n == hidden for n in t.shape)):
        require(same, f"{op}: {name} must have shape [{hidden}], got {list(t.shape)}")
    check_dtype()
    if strides:
        contiguous = t.stride(0) == 1 or hidden == 1
        require(contiguous, f"{op}: {name} must be contiguous (stride 1), got stride {t.stride(0)}")


_CHECKS = {
    Extent.ROWS: _check_x,
    Extent.LIKE_X: _check_like_x,
    Extent.HIDDEN: _check_hidden,
    Extent.ROWS_OF_HEADS: check_x_of_heads,
    Extent.HEADS: check_heads,
    Extent.ANGLES: check_angle,
    Extent.TABLE: check_table,
    Extent.POSITIONS: check_positions,
    Extent.ONE: check_one,
}
# The tensor whose dtype another must have.
_LIKE = {DTypes.LIKE_RESIDUAL: "residual", DTypes.LIKE_WEIGHT: "weight", DTypes.LIKE_COS: "cos"}
