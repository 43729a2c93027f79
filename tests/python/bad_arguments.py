"""The bad arguments of test_bad_input.py: what is replaced in a good call, and what the message must say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, ones

from operators import (
    FUSED_ADD_RMS_NORM,
    OPERATORS,
    RMS_NORM,
    RMS_NORM_OUT,
    SHAPE,
    Arguments,
    Operator,
    that_write,
    with_tensor,
)


@dataclass(frozen=True)
class Bad:
    name: str
    message: str  # all of it, after the operator's name
    replace: Callable[[], Arguments]  # makes the arguments that take the place of good ones
    ops: tuple[Operator, ...] = OPERATORS  # for which that is an error


def like_x(
    name: str, dtype: str = "must have x's dtype float32, got", ops: tuple[Operator, ...] | None = None
) -> list[Bad]:
    """What is wrong with a tensor that must have x's shape."""
    ops = with_tensor(name) if ops is None else ops
    shape = f"{name} must have x's shape [4, 6, 16], got"
    strided = f"{name} must have a contiguous last dimension (stride 1), got stride 24"
    dtype = f"{name} {dtype}"
    return [
        Bad(f"{name}: shape", f"{shape} [4, 5, 16]", lambda: {name: ones(4, 5, 16)}, ops),
        Bad(f"{name}: flattened", f"{shape} [24, 16]", lambda: {name: ones(24, 16)}, ops),
        Bad(f"{name}: no broadcast", f"{shape} [1, 1, 16]", lambda: {name: ones(1, 1, 16)}, ops),
        Bad(f"{name}: bfloat16", f"{dtype} bfloat16", lambda: {name: ones(SHAPE, dtype=torch.bfloat16)}, ops),
        Bad(f"{name}: float16", f"{dtype} float16", lambda: {name: ones(SHAPE, dtype=torch.float16)}, ops),
        Bad(f"{name}: strided", strided, lambda: {name: ones(16, 4, 6).movedim(0, -1)}, ops),
    ]


def x_dtype(dtype: torch.dtype) -> Bad:
    name = str(dtype).removeprefix("torch.")
    rule = "x must have dtype float32, float16 or bfloat16, got"
    return Bad(f"x: {name}", f"{rule} {name}", lambda: {"x": ones(SHAPE).to(dtype)})


def eps(value: float) -> Bad:
    return Bad(f"eps: {value}", f"eps must be finite in float32 and at least 0, got {value:g}", lambda: {"eps": value})


def none(name: str) -> Bad:
    return Bad(f"{name}: None", f"{name} must be a tensor, got None", lambda: {name: None}, with_tensor(name))


WITH_GEMMA = tuple(op for op in OPERATORS if op.gemma)
NEED_WEIGHT = tuple(op for op in OPERATORS if op.needs_weight)
NORM_X = with_tensor("post_weight")
ADD_ALONE = tuple(op for op in with_tensor("residual") if op not in NORM_X)
ROWS = "must have a contiguous last dimension (stride 1), got stride"
CONTIGUOUS = "weight must be contiguous (stride 1), got stride"
WEIGHT = "weight must have shape [16], got"
BAD = [
    *map(x_dtype, (torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)),
    *map(x_dtype, (torch.complex64, torch.complex128, torch.complex32, torch.uint16, torch.uint32, torch.uint64)),
    *map(x_dtype, (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e8m0fnu)),
    none("x"),
    none("residual"),
    none("out"),
    Bad("x: 0-dim", "x must have at least one dimension, got shape []", lambda: {"x": ones(())}),
    Bad("hidden 0", "x must have a last dimension of at least 1, got shape [4, 0]", lambda: {"x": ones(4, 0)}),
    Bad("x: strided", f"x {ROWS} 24", lambda: {"x": ones(16, 4, 6).movedim(0, -1)}),
    Bad("x: expanded over hidden", f"x {ROWS} 0", lambda: {"x": ones(4, 6, 1).expand(SHAPE)}),
    Bad("weight: short", f"{WEIGHT} [15]", lambda: {"weight": ones(15)}),
    Bad("weight: long", f"{WEIGHT} [17]", lambda: {"weight": ones(17)}),
    Bad("weight: no broadcast", f"{WEIGHT} [1]", lambda: {"weight": ones(1)}),
    Bad("weight: 2-D", f"{WEIGHT} [1, 16]", lambda: {"weight": ones(1, 16)}),
    Bad("weight: 0-dim", f"{WEIGHT} []", lambda: {"weight": ones(())}),
    Bad("weight: strided", f"{CONTIGUOUS} 2", lambda: {"weight": ones(32)[::2]}),
    Bad("weight: expanded", f"{CONTIGUOUS} 0", lambda: {"weight": ones(1).expand(16)}),
    Bad(
        "weight: float64",
        "weight must have dtype float32, float16 or bfloat16, got float64",
        lambda: {"weight": ones(16).double()},
    ),
    Bad(
        "gemma without a weight",
        "gemma must be False without a weight, got True",
        lambda: {"weight": None, "gemma": True},
        tuple(op for op in WITH_GEMMA if not op.needs_weight),
    ),
    Bad("no weight", "weight must be a tensor, got None", lambda: {"weight": None}, NEED_WEIGHT),
    none("post_weight"),
    Bad("post_weight: long", f"post_{WEIGHT} [17]", lambda: {"post_weight": ones(17)}, NORM_X),
    Bad("post_weight: 2-D", f"post_{WEIGHT} [1, 16]", lambda: {"post_weight": ones(1, 16)}, NORM_X),
    Bad("post_weight: strided", f"post_{CONTIGUOUS} 2", lambda: {"post_weight": ones(32)[::2]}, NORM_X),
    Bad(
        "post_weight: not the weight's dtype",
        "post_weight must have weight's dtype float32, got bfloat16",
        lambda: {"post_weight": ones(16).bfloat16()},
        NORM_X,
    ),
    Bad(
        "gemma with each step rounded",
        "round_each_step must be False with gemma=True, got True",
        lambda: {"gemma": True, "round_each_step": True},
        WITH_GEMMA,
    ),
    Bad(
        "a float32 weight with each step rounded",
        "weight must have x's dtype float16 with round_each_step=True, got float32",
        lambda: {"x": ones(SHAPE).half(), "round_each_step": True},
        (RMS_NORM,),
    ),
    Bad(
        "weight: the other 16-bit type",
        "weight must have dtype float16 (x's) or float32, got bfloat16",
        lambda: {"x": ones(SHAPE).half(), "weight": ones(16).bfloat16()},
        (RMS_NORM,),
    ),
    *map(eps, (-1e-6, -math.inf, math.nan, math.inf, 1e300)),
    *like_x("residual", "must have dtype float32, got", ADD_ALONE),
    *like_x("residual", ops=NORM_X),
    *like_x("post_residual_addition", "must have residual's dtype float32, got"),
    *like_x("gate"),
    *like_x("out"),
]


def shifted(first: str, second: str, offset: int) -> Callable[[], Arguments]:
    """Two tensors of x's shape in one buffer, the second ``offset`` elements after the first."""

    def replace() -> Arguments:
        buffer = ones(2 * 384)
        return {first: buffer[:384].view(SHAPE), second: buffer[offset : offset + 384].view(SHAPE)}

    return replace


def transposed() -> Arguments:
    x = ones(6, 6, 16)
    return {"x": x, "out": x.transpose(0, 1)}


def weight_within(name: str, weight: str = "weight") -> Callable[[], Arguments]:
    def replace() -> Arguments:
        t = ones(SHAPE)
        return {name: t, weight: t[2, 3]}

    return replace


def same(first: str, second: str) -> Callable[[], Arguments]:
    return lambda: dict.fromkeys((first, second), ones(SHAPE))


IN_PLACE, OUT = that_write("x"), that_write("out")
BOTH_WRITTEN = "residual must not overlap x, which is also written, got overlapping memory"
ITSELF = "is written and must not overlap itself, got a tensor with shared elements"
EXACTLY = "memory exactly or not overlap it, got a partial overlap"
IN_WEIGHT = "is written and must not overlap weight, got overlapping memory"
BAD_MEMORY = [
    Bad("residual is x", BOTH_WRITTEN, same("x", "residual"), IN_PLACE),
    *(Bad(f"residual is x + {n}", BOTH_WRITTEN, shifted("x", "residual", n), IN_PLACE) for n in (1, 16, 96, 383)),
    *(Bad(f"out is x + {n}", f"out must be x's {EXACTLY}", shifted("x", "out", n), OUT) for n in (1, 16, 96, 383)),
    Bad(
        "post is residual + 96",
        f"residual must be post_residual_addition's {EXACTLY}",
        shifted("residual", "post_residual_addition", 96),
        (FUSED_ADD_RMS_NORM,),
    ),
    Bad(
        "post is x + 16",
        f"x must be post_residual_addition's {EXACTLY}",
        shifted("x", "post_residual_addition", 16),
        (FUSED_ADD_RMS_NORM,),
    ),
    Bad("out is x transposed", f"out must be x's {EXACTLY}", transposed, (RMS_NORM_OUT,)),
    Bad("weight within x", f"x {IN_WEIGHT}", weight_within("x"), IN_PLACE),
    Bad(
        "post_weight within residual",
        "residual is written and must not overlap post_weight, got overlapping memory",
        weight_within("residual", "post_weight"),
        tuple(op for op in NORM_X if op.written),
    ),
    Bad("weight within out", f"out {IN_WEIGHT}", weight_within("out"), OUT),
    Bad("x expanded", f"x {ITSELF}", lambda: {"x": ones(4, 1, 16).expand(SHAPE)}, IN_PLACE),
    Bad("residual expanded", f"residual {ITSELF}", lambda: {"residual": ones(16).expand(SHAPE)}, IN_PLACE),
    Bad("out expanded", f"out {ITSELF}", lambda: {"out": ones(6, 16).expand(SHAPE)}, OUT),
    Bad("out of windows", f"out {ITSELF}", lambda: {"out": ones(500).as_strided(SHAPE, (96, 15, 1))}, OUT),
]


def not_dense() -> dict[str, Callable[[], Tensor]]:
    """Tensors of x's shape in layouts that no kernel reads; each with what its message calls it."""
    x = ones(2, 16)
    return {
        "layout torch.sparse_coo": x.to_sparse,
        "layout torch.sparse_csr": x.to_sparse_csr,
        "layout torch.sparse_csc": x.to_sparse_csc,
        "layout torch._mkldnn": x.to_mkldnn,
        "a quantised tensor": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "a nested tensor (torch.strided)": lambda: torch.nested.nested_tensor([ones(16), ones(16)]),
        "a nested tensor (torch.jagged)": lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    }
