"""The GPU kernels that quantise, compiled for the host (csrc/device/emulated.h), on whatever hypothesis can think of.

Their y is that of the kernels that do not quantise, bit for bit, so the definition, applied to it, gives every bit of q
and of the scales: in float32, and with round_first in any dtype.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_norm import reference
from support import Placed, assert_same_bits
from test_emulated import FLOATS, ORDERS, SIZES, layouts

FORMATS = {str(dtype).removeprefix("torch."): dtype for dtype in reference.QUANTIZED_LARGEST}
# Whose groups are whole vectors of neighbouring threads; meet in shared memory (5376 / 128); or are anything else.
GROUPED = st.one_of(
    st.sampled_from(
        [(4096, 128), (1024, 64), (5376, 128), (1152, 128), (8320, 128), (2560, 64), (768, 128), (512, 32)]
    ),
    st.tuples(st.integers(1, 40), st.integers(1, 130)).map(lambda n: (n[0] * n[1], n[1])),
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    hidden, group = draw(st.one_of(SIZES.map(lambda size: (size, None)), GROUPED))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), hidden)
    aligned = draw(st.booleans())
    dtype = draw(st.sampled_from(sorted(FLOATS)))
    return {
        "shape": shape,
        "group": group,
        "layouts": [None if aligned else draw(layouts(shape)) for _ in range(4)],
        "dtype": dtype,
        "float32_weight": draw(st.booleans()),
        "adds": draw(st.sampled_from(["no", "new", "in place"])),
        "float32_residual": draw(st.booleans()),
        "gemma": draw(st.booleans()),
        "format": draw(st.sampled_from(sorted(FORMATS))),
        "given_scale": draw(st.booleans()) if group is None else False,
        "bound": draw(st.booleans()),
        "scale_ue8m0": draw(st.booleans()),
        "round_first": dtype != "float32" or draw(st.booleans()),
        "column_major": draw(st.booleans()),
        "magnitude": draw(st.sampled_from([1.0, 1e-12, 100.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


def contiguous(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    return torch.empty(shape, device="meta").stride(), 0


def quantise(emulated: ModuleType, call: dict[str, Any], gpu: Any) -> tuple[Tensor, Tensor | None]:
    """Runs the call, checks every bit, and returns q and the scales."""
    random = torch.Generator().manual_seed(call["seed"])
    shape, group, adds = call["shape"], call["group"], call["adds"] != "no"
    dtype, gemma, format = FLOATS[call["dtype"]], call["gemma"], FORMATS[call["format"]]
    weight = torch.randn(shape[-1], generator=random) * call["magnitude"]
    weight = weight if call["float32_weight"] else weight.to(dtype)

    def operand(layout: int, dtype: torch.dtype, values: bool = True) -> Placed:
        t = torch.randn(shape, generator=random) if values else torch.zeros(shape)
        return Placed(t.to(dtype), *(call["layouts"][layout] or contiguous(shape)))

    def memory(t: Tensor) -> Any:
        return emulated.Memory(t.data_ptr(), list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch."))

    x = operand(0, dtype)
    residual = operand(1, torch.float32 if call["float32_residual"] else dtype)
    total = residual if call["adds"] == "in place" else operand(2, residual.view.dtype, False)
    s = reference.add_rms_norm(x.view, residual.view)[1] if adds else None

    y = torch.empty(shape, dtype=dtype)
    tensors = {"x": x.view, "weight": weight}
    if adds:
        s_again = torch.empty_like(s)
        norm = {**tensors, "residual": residual.view, "out": y, "residual_out": s_again}
        emulated.run("add_rms_norm", {n: memory(t) for n, t in norm.items()}, 1e-6, gemma, gpu)
        tensors |= {"residual": residual.view, "residual_out": total.view}
    else:
        emulated.run("rms_norm", {n: memory(t) for n, t in {**tensors, "out": y}.items()}, 1e-6, gemma, gpu)

    q = operand(3, torch.uint8, False)
    op = "add_rms_norm_quant" if adds else "rms_norm_quant"
    options = {"dtype": call["format"], "round_first": call["round_first"]}
    scale = scales = bound = None
    if call["given_scale"]:
        op += ".static"
        tensors["scale"] = scale = torch.tensor(0.01)
    else:
        groups = (*shape[:-1], shape[-1] // (group or shape[-1]))
        scales = torch.full(groups, torch.nan)
        scales = reference.column_major(scales) if call["column_major"] else scales
        tensors["scale_out"] = scales
        if call["bound"]:
            tensors["scale_ub"] = bound = torch.tensor(1.5)
        options |= {"scale_group_size": group, "scale_ue8m0": call["scale_ue8m0"]}
    memories = {name: memory(t) for name, t in tensors.items()} | {"out": memory(q.view.view(format))}
    emulated.run(op, memories, 1e-6, gemma, gpu, **options)

    want = reference.quantize(y.float(), scale, format, group, bound, call["scale_ue8m0"] and scale is None)
    assert torch.equal(want[0].view(torch.uint8), q.view)
    if scales is not None:
        assert torch.equal(want[1], scales)
    if s is not None:
        assert_same_bits(s, total.view)
    for placed in (x, residual, total, q):
        placed.assert_gaps_intact()
    return q.view, scales


@given(call=calls(), order=ORDERS, threads=st.sampled_from([2048, 2**32]))
@settings(max_examples=100, deadline=None)
def test_every_bit_at_both_wave_widths(
    emulated: ModuleType,
    call: dict[str, Any],
    order: int,
    threads: int,
) -> None:
    quantise(emulated, call, emulated.Gpu(32, max_threads=threads, order=order))
    quantise(emulated, call, emulated.Gpu(64, max_threads=threads, order=order))


@given(call=calls(), order=ORDERS, processors=st.sampled_from([0, 132]))
@settings(max_examples=100, deadline=None)
def test_every_bit_with_clusters(emulated: ModuleType, call: dict[str, Any], order: int, processors: int) -> None:
    call["layouts"] = [None] * 4
    quantise(emulated, call, emulated.Gpu(32, max_cluster=8, order=order, processors=processors))
