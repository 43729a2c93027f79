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
FLOAT4 = torch.float4_e2m1fn_x2
SCALE_DTYPES = {"float32": None, "float8_e8m0fnu": torch.float8_e8m0fnu, "float8_e4m3fn": torch.float8_e4m3fn}
SCALE_DTYPES["int32"] = torch.int32
# Whose groups are whole vectors of neighbouring threads; meet in shared memory (5376 / 128); or are anything else.
GROUPED = st.one_of(
    st.sampled_from(
        [
            (4096, 128),
            (1024, 64),
            (5376, 128),
            (1152, 128),
            (8320, 128),
            (2560, 64),
            (768, 128),
            (512, 32),
            (16384, 32),
            (16384, 128),
            (2048, 8),
        ]
    ),
    st.tuples(st.integers(1, 40), st.integers(1, 130)).map(lambda n: (n[0] * n[1], n[1])),
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    hidden, group = draw(st.one_of(SIZES.map(lambda size: (size, None)), GROUPED))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), hidden)
    aligned = draw(st.booleans())
    dtype = draw(st.sampled_from(sorted(FLOATS)))
    norm = draw(st.sampled_from(["plain", "plain", "adds", "adds in place", "gated", "gated input", "no gate"]))
    formats = [name for name in FORMATS if FORMATS[name] is not FLOAT4 or (group and group % 16 == 0)]
    return {
        "shape": shape,
        "group": group,
        "layouts": [None if aligned else draw(layouts(shape)) for _ in range(4)],
        "dtype": dtype,
        "float32_weight": draw(st.booleans()),
        "norm": norm,
        "norms_groups": "gate" in norm and group is not None and draw(st.booleans()),
        "sigmoid": draw(st.booleans()),
        "returns_y": draw(st.booleans()),
        "float32_residual": draw(st.booleans()),
        "gemma": "gate" not in norm and draw(st.booleans()),
        "format": draw(st.sampled_from(sorted(formats))),
        "scale_dtype": draw(st.sampled_from(["float32", *SCALE_DTYPES])),
        "global_scale": draw(st.booleans()),
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


def as_integers(t: Tensor) -> Tensor:
    """Its bits. Those of a NaN of a float32 need not be the same, but none of these tests makes one."""
    return t.contiguous().view({1: torch.uint8, 4: torch.int32}[t.dtype.itemsize])


def quantise(emulated: ModuleType, call: dict[str, Any], gpu: Any) -> tuple[Tensor, Tensor | None]:
    """Runs the call, checks every bit, and returns q and the scales."""
    random = torch.Generator().manual_seed(call["seed"])
    shape, group, adds, gated = call["shape"], call["group"], "adds" in call["norm"], "gate" in call["norm"]
    dtype, gemma, format = FLOATS[call["dtype"]], call["gemma"], FORMATS[call["format"]]
    weight = torch.randn(shape[-1], generator=random) * call["magnitude"]
    weight = weight if call["float32_weight"] else weight.to(dtype)

    def operand(layout: int, dtype: torch.dtype, values: bool = True) -> Placed:
        t = torch.randn(shape, generator=random) if values else torch.zeros(shape)
        return Placed(t.to(dtype), *(call["layouts"][layout] or contiguous(shape)))

    def codes() -> Placed:
        if format is not FLOAT4:
            return operand(3, torch.uint8, False)
        packed = (*shape[:-1], shape[-1] // 2)
        return Placed(torch.zeros(packed, dtype=torch.uint8), *contiguous(packed))

    def memory(t: Tensor) -> Any:
        return emulated.Memory(t.data_ptr(), list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch."))

    x = operand(0, dtype)
    residual = operand(1, torch.float32 if call["float32_residual"] else dtype)
    total = residual if "in place" in call["norm"] else operand(2, residual.view.dtype, False)
    s = reference.add_rms_norm(x.view, residual.view)[1] if adds else None

    y = torch.empty(shape, dtype=dtype)
    tensors = {"x": x.view, "weight": weight}
    if adds:
        s_again = torch.empty_like(s)
        norm = {**tensors, "residual": residual.view, "out": y, "residual_out": s_again}
        emulated.run("add_rms_norm", {n: memory(t) for n, t in norm.items()}, 1e-6, gemma, gpu)
        tensors |= {"residual": residual.view, "residual_out": total.view}
    elif gated:
        if call["norm"] != "no gate":
            tensors["gate"] = residual.view.to(dtype)
        norm_options = {"sigmoid": call["sigmoid"], "norm_before_gate": call["norm"] != "gated input"}
        if call["norms_groups"]:
            norm_options["group_size"] = 4 * group if shape[-1] % (4 * group) == 0 else group
        norm = {n: memory(t) for n, t in {**tensors, "out": y}.items()}
        emulated.run("gated_rms_norm", norm, 1e-6, gemma, gpu, **norm_options)
    else:
        emulated.run("rms_norm", {n: memory(t) for n, t in {**tensors, "out": y}.items()}, 1e-6, gemma, gpu)

    q = codes()
    op = "add_rms_norm_quant" if adds else "gated_rms_norm_quant" if gated else "rms_norm_quant"
    options = {"dtype": call["format"], "round_first": call["round_first"]} | (norm_options if gated else {})
    scale = scales = bound = global_scale = None
    scale_dtype = call["scale_dtype"]
    if call["norms_groups"] and norm_options["group_size"] == group and scale_dtype == "int32":
        scale_dtype = "float32"
    if call["given_scale"]:
        op += ".static"
        tensors["scale"] = scale = torch.tensor(0.01)
    else:
        groups = (*shape[:-1], shape[-1] // (group or shape[-1]))
        if scale_dtype == "int32":
            scales = reference.column_major(torch.full((*groups[:-1], -(-groups[-1] // 4)), -1, dtype=torch.int32), 4)
        else:
            scales = torch.full(groups, torch.nan).to(SCALE_DTYPES[scale_dtype] or torch.float32)
            scales = reference.column_major(scales) if call["column_major"] else scales
        tensors["scale_out"] = scales
        if call["global_scale"] and scale_dtype == "float8_e4m3fn":
            tensors["global_scale"] = global_scale = torch.tensor(0.3)
        if call["bound"]:
            tensors["scale_ub"] = bound = torch.tensor(1.5)
        ue8m0 = call["scale_ue8m0"] and scale_dtype != "float8_e4m3fn"
        options |= {"scale_group_size": group, "scale_ue8m0": ue8m0, "scale_dtype": scale_dtype}
    y_as_well = torch.empty_like(y)
    if call["returns_y"]:
        op = op.replace("_quant", "_quant_y")
        tensors["y"] = y_as_well
    memories = {name: memory(t) for name, t in tensors.items()} | {"out": memory(q.view.view(format))}
    emulated.run(op, memories, 1e-6, gemma, gpu, **options)

    how = {} if scale is not None else {"scale_ue8m0": ue8m0, "scale_dtype": SCALE_DTYPES[scale_dtype]}
    want = reference.quantize(y.float(), scale, format, group, bound, global_scale=global_scale, **how)
    assert torch.equal(want[0].view(torch.uint8), q.view)
    if scales is not None:
        assert torch.equal(as_integers(want[1]), as_integers(scales))
    if call["returns_y"]:
        assert_same_bits(y_as_well, y)
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
