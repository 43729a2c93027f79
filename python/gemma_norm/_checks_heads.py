"""The rules of operators whose rows are the heads of tokens, which are rotated: csrc/core/check_heads.cpp in Python."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks_shared import Arguments, Check, Checked, check_rows, require

MAX_HEAD_DIM = 512


def check_x_of_heads(call: Checked, name: str, x: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    op = call.label
    check_dtype()
    heads = f"{op}: {name} must have at least two dimensions, heads and their elements, got shape {list(x.shape)}"
    require(x.dim() >= 2, heads)
    require(x.dim() <= 64, f"{op}: {name} must have at most 64 dimensions, got {x.dim()}")
    size = f"{op}: {name} must have a last dimension of 1 to {MAX_HEAD_DIM}, got shape {list(x.shape)}"
    require(x.shape[-1] >= 1, size)
    require(x.shape[-1] <= MAX_HEAD_DIM, size)
    require(x.shape[-2] >= 1, f"{op}: {name} must have at least one head, got shape {list(x.shape)}")
    check_rows(op, name, x, strides)


def check_heads(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    check_dtype()
    x = call.x
    same_dimensions = ((*t.shape[:-2], *t.shape[-1:]), (*x.shape[:-2], *x.shape[-1:]))
    for same in (t.dim() == x.dim(), *(n == m for n, m in zip(*same_dimensions, strict=False))):
        but = f"{call.x_name}'s shape {list(x.shape)}, but for the number of heads, got {list(t.shape)}"
        require(same, f"{call.label}: {name} must have " + but)
    require(t.shape[-2] >= 1, f"{call.label}: {name} must have at least one head, got shape {list(t.shape)}")
    check_rows(call.label, name, t, strides)


def _check_rotary(call: Checked, name: str, t: Tensor, strides: bool) -> None:
    hidden = call.x.shape[-1]
    rule = f"must have a last dimension that is even and from 2 to {call.x_name}'s {hidden}"
    for fits in (t.shape[-1] % 2 == 0, t.shape[-1] >= 2, t.shape[-1] <= hidden):
        require(fits, f"{call.label}: {name} {rule}, got shape {list(t.shape)}")
    check_rows(call.label, name, t, strides)


def check_angle(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    check_dtype()
    leading = call.leading()
    shape = f"shape {[*leading, 'rotary']}".replace("'", "")
    for same in (t.dim() == len(leading) + 1, *(n == m for n, m in zip(t.shape, leading, strict=False))):
        require(same, f"{call.label}: {name} must have {shape}, got {list(t.shape)}")
    if name == "sin" and "cos" in call.tensors:
        cos = call.tensors["cos"].shape
        require(t.shape[-1] == cos[-1], f"{call.label}: {name} must have cos's shape {list(cos)}, got {list(t.shape)}")
    _check_rotary(call, name, t, strides)


def check_table(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, _: Arguments) -> None:
    check_dtype()
    require(t.dim() == 2, f"{call.label}: {name} must have shape [positions, rotary], got {list(t.shape)}")
    require(t.shape[0] >= 1, f"{call.label}: {name} must have at least one row, got shape {list(t.shape)}")
    _check_rotary(call, name, t, strides)


def check_positions(call: Checked, name: str, t: Tensor, strides: bool, check_dtype: Check, given: Arguments) -> None:
    check_dtype()
    want = [*([] if given["mrope_section"] is None else [3]), *call.leading()]
    for same in (t.dim() == len(want), *(n == m for n, m in zip(t.shape, want, strict=False))):
        require(same, f"{call.label}: {name} must have shape {want}, got {list(t.shape)}")
    if t.dim() > 0:
        check_rows(call.label, name, t, strides)


def check_positions_are_in_the_cache(label: str, cache: Tensor | None, positions: Tensor | None) -> None:
    """What the native kernels of a CPU check while they read the positions."""
    if cache is None or positions is None or positions.device.type != "cpu":
        return
    # The values of fake tensors, and of those that a tracer follows, are not to be asked for.
    if type(positions) is not Tensor or torch._C._len_torch_dispatch_stack() or positions.numel() == 0:
        return
    rows, least, most = cache.shape[0], int(positions.min()), int(positions.max())
    rule = f"positions must be at least 0 and less than cos_sin_cache's {rows} rows"
    require(least >= 0 and most < rows, f"{label}: {rule}, got {least if least < 0 else most}")


def check_angles(call: Checked, arguments: Arguments) -> None:
    """The checks of an operator with a rotation: which tensors it has, and its options."""
    op, given = call.label, call.tensors
    has_weights = ("q_weight" in given) == ("k_weight" in given)
    require(has_weights, f"{op}: q_weight and k_weight must both be given or both be None, got one of them")
    has_angles = "cos" in given and "sin" in given and not ("cos_sin_cache" in given or "positions" in given)
    has_cache = "cos_sin_cache" in given and "positions" in given and not ("cos" in given or "sin" in given)
    names = [name for name in ("cos", "sin", "cos_sin_cache", "positions") if name in given]
    either = "either cos and sin or cos_sin_cache and positions must be given"
    require(has_angles or has_cache, f"{op}: {either}, got {' and '.join(names) or 'none'}")
    each_step, rotation = arguments["round_each_step"], arguments["round_rotation"]
    require(rotation or not each_step, f"{op}: round_rotation must be True with round_each_step=True, got False")
    sections = arguments["mrope_section"]
    if sections is None:
        alone = f"{op}: mrope_interleaved must be False without mrope_section, got True"
        require(not arguments["mrope_interleaved"], alone)
        return
    require(has_cache, f"{op}: mrope_section must be None without positions, got {list(sections)}")
    pairs = given["cos_sin_cache"].shape[-1] // 2
    fits = len(sections) == 3 and all(size >= 0 for size in sections) and sum(sections) == pairs
    rule = f"must be three sizes that add up to half of cos_sin_cache's last dimension, {pairs}"
    require(fits, f"{op}: mrope_section {rule}, got {list(sections)}")
