"""The GPU kernels, compiled for the host (csrc/device/emulated.h), on whatever hypothesis can think of."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_norm import reference
from support import Placed, assert_right, assert_same_bits

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


SIZES = st.one_of(
    st.integers(1, 300),
    st.sampled_from([511, 512, 513, 1000, 1024, 1025, 4095, 4096, 8192, 8200, 16384, 16388]),
    st.integers(1, 20000),
)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Strides with the leading dimensions in any order in memory, a gap after each now and then; and an offset."""
    strides, extent = [1] * len(shape), shape[-1]
    for d in draw(st.permutations(range(len(shape) - 1))):
        strides[d] = extent + draw(st.integers(0, 9))
        extent += strides[d] * (shape[d] - 1)
    return tuple(strides), draw(st.integers(0, 9))


@st.composite
def calls(draw: st.DrawFn, hidden: st.SearchStrategy[int] = SIZES, most_dims: int = 4) -> dict[str, Any]:
    shape = (*draw(st.lists(st.integers(1, 3), max_size=most_dims)), draw(hidden))
    return {
        "shape": shape,
        "layouts": [draw(layouts(shape)) for _ in range(5)],
        "dtype": draw(st.sampled_from(sorted(FLOATS))),
        "float32_weight": draw(st.booleans()),
        "operands": draw(st.sampled_from(["plain", "add", "add post"])),
        "in_place": draw(st.booleans()),
        "gemma": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1.0])),
        "scale": draw(st.sampled_from([1.0, 1e-3, 100.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


def normalise(emulated: ModuleType, call: dict[str, Any], gpu: Any) -> Tensor:
    """Runs the call, checks it and returns the norm."""
    random = torch.Generator().manual_seed(call["seed"])
    dtype, gemma = FLOATS[call["dtype"]], call["gemma"]
    weight = torch.randn(call["shape"][-1], generator=random) * (0.05 if gemma else 1)  # near zero: a missing 1 + shows
    weight = weight if call["float32_weight"] else weight.to(dtype)

    def operand(layout: int) -> Placed:
        values = torch.randn(call["shape"], generator=random) * call["scale"]
        return Placed(values.to(dtype), *call["layouts"][layout])

    x, residual, post = operand(0), operand(1), operand(2)
    out, total = (x, residual) if call["in_place"] else (operand(3), operand(4))
    adds, adds_post = call["operands"] != "plain", call["operands"] == "add post"
    s = x.view.clone()
    if adds:
        s = reference.add_rms_norm(s, residual.view, weight, post_residual_addition=post.view if adds_post else None)[1]

    def memory(t: Tensor) -> Any:
        return emulated.Memory(t.data_ptr(), list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch."))

    tensors = {"x": x.view, "weight": weight, "out": out.view}
    if adds:
        tensors |= {"residual": residual.view, "residual_out": total.view}
    if adds_post:
        tensors["post_residual_addition"] = post.view
    memories = {name: memory(tensor) for name, tensor in tensors.items()}
    emulated.run("add_rms_norm" if adds else "rms_norm", memories, call["eps"], gemma, gpu)
    assert_right(out.view, s, weight, call["eps"], gemma)
    if adds:
        assert_same_bits(s, total.view)
    for placed in (x, residual, post, out, total):
        placed.assert_gaps_intact()
    return out.view


ORDERS = st.integers(0, 5)  # of blocks, waves and lanes


@given(call=calls(), order=ORDERS, threads=st.sampled_from([2048, 2**32]))
@settings(max_examples=100)
def test_right_and_alike_at_both_wave_widths(
    emulated: ModuleType, call: dict[str, Any], order: int, threads: int
) -> None:
    y32 = normalise(emulated, call, emulated.Gpu(32, max_threads=threads, order=order))
    y64 = normalise(emulated, call, emulated.Gpu(64, max_threads=threads, order=order))
    assert_same_bits(y32, y64)


@given(call=calls(hidden=st.integers(16385, 140000), most_dims=1), order=ORDERS)
@settings(max_examples=20)
def test_right_on_clusters(emulated: ModuleType, call: dict[str, Any], order: int) -> None:
    normalise(emulated, call, emulated.Gpu(32, max_cluster=8, order=order))


@given(call=calls(hidden=st.integers(512, 2500).map(lambda n: 8 * n), most_dims=1), order=ORDERS)
@settings(max_examples=20)
def test_right_and_alike_when_rows_are_spread(emulated: ModuleType, call: dict[str, Any], order: int) -> None:
    call["layouts"] = [(tuple(s + -s % 8 if s > 1 else s for s in strides), 0) for strides, _ in call["layouts"]]
    spread = normalise(emulated, call, emulated.Gpu(32, max_cluster=8, order=order, processors=132))
    whole = normalise(emulated, call, emulated.Gpu(32, max_cluster=8, order=order))
    assert_same_bits(spread, whole)


def test_a_plan_prints_itself(emulated: ModuleType) -> None:
    assert emulated.plan(4096, "bfloat16", emulated.Gpu(32)).startswith("block: ")
    assert emulated.plan(128, "bfloat16", emulated.Gpu(64)).startswith("wave: ")
    hopper = emulated.Gpu(32, max_cluster=8, processors=132)
    assert emulated.plan(8192, "bfloat16", hopper).startswith("cluster: 256 of 256 threads a row")
    assert emulated.plan(8192, "bfloat16", hopper, rows=1000).startswith("block: ")


def test_bad_arguments_are_refused(emulated: ModuleType) -> None:
    x = torch.zeros(2, 8)
    memory = emulated.Memory(x.data_ptr(), [2, 8], [8, 1], "float32")
    weight = emulated.Memory(x.data_ptr(), [7], [1], "float32")
    with pytest.raises(ValueError, match=r"rms_norm: weight must have shape \[8\], got \[7\]"):
        emulated.run("rms_norm", {"x": memory, "weight": weight, "out": memory}, 1e-6, False, emulated.Gpu(32))
