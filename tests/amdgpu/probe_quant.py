"""Quantises on one emulated GPU, and prints as JSON which calls did not have every bit of the definition.

python probe_quant.py ARCH LIBRARY CODE_OBJECT|-

y is what the same GPU's rms_norm computes in float32; the definition, gemma_norm.reference.quantize, is applied to it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys

import hipemu
import numpy as np
import torch
from probe import DTYPES, WHOLE_ROW, Tensor, launch, options

from gemma_norm import reference

FORMATS_OF_8_BITS = ("int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")
# A scheme and the dtype of its scales, where that is not float32.
SCALE_DTYPES = {"exponents": "float8_e8m0fnu", "four exponents": "int32", "float8 scales": "float8_e4m3fn"}
# hidden, and the groups: on lanes, that meet in shared memory, and of an odd size
SHAPES = {512: (128, 4), 1152: (128,), 5376: (64, 128), 999: (3,), 20000: (32,)}
ROWS = 2
BY_HAND = (999, 20000)  # the kernel of such rows rounds without instructions for it
# The formats that GPUs round to by an instruction. The emulator's makes 0 of a number that is subnormal in the format,
# and gives float8_e4m3fn on each of them, though gfx942's gives float8_e4m3fnuz. So what is tested is all around it.
BY_INSTRUCTION = {
    "gfx942": ["float8_e4m3fnuz"],
    "gfx950": ["float8_e4m3fn", "float8_e5m2"],
    "gfx1201": ["float8_e4m3fn", "float8_e5m2"],
}


def tensor(t: torch.Tensor, dtype: str) -> Tensor:
    return Tensor.at(t.data_ptr(), t.shape, t.stride(), dtype, t)


def wrong(arch: str, hip: ctypes.CDLL, hidden: int, format: str, scheme: str, group: int | None) -> str:
    """What is wrong with a call, or ""."""
    random = torch.Generator().manual_seed(hidden)
    x, weight = torch.randn(ROWS, hidden, generator=random), torch.randn(hidden, generator=random)
    x[1, 5] = torch.nan if scheme == "token" and hidden == 512 else 40.0
    if scheme == "given":
        weight[3] = 1e30  # beyond every format, and beyond what an integer of 32 bits holds
    packed = format == "float4_e2m1fn_x2"
    y, q = torch.empty_like(x), torch.zeros(ROWS, hidden // 2 if packed else hidden, dtype=torch.uint8)
    given = {"x": tensor(x, "float32"), "weight": tensor(weight, "float32")}
    gated = scheme == "gated"  # in norms of the group
    if gated:
        given["gate"] = tensor(torch.randn(ROWS, hidden, generator=random), "float32")
    norm = b"gated_rms_norm" if gated else b"rms_norm"
    norms = {"group_size": group, "gemma": False} if gated else {}
    launch(hip, norm, options(**norms), **given, out=tensor(y, "float32"))
    scale_dtype = SCALE_DTYPES.get(scheme, "float32")
    groups = hidden // (group or hidden)
    columns = -(-groups // 4) if scale_dtype == "int32" else groups
    scale = torch.tensor([0.01])
    scales = torch.zeros(columns, ROWS, dtype=getattr(torch, scale_dtype)).t()
    y_as_well = torch.empty_like(y)
    quantised = options(
        **norms,
        scale_dtype=DTYPES[scale_dtype],
        scale_dtype_name=scale_dtype.encode(),
        dtype=DTYPES[format],
        dtype_name=format.encode(),
        scale_group_size=group or WHOLE_ROW,
        scale_ue8m0=scheme == "powers of two",
    )
    is_static = scheme == "given"
    more = {"scale": tensor(scale, "float32")} if is_static else {"scale_out": tensor(scales, scale_dtype)}
    launch(hip, norm + b"_quant_y" + (b".static" if is_static else b""), quantised,
           **given, out=tensor(q, format), y=tensor(y_as_well, "float32"), **more)  # fmt: skip
    dtype = getattr(torch, format)
    want = reference.quantize(
        y,
        scale if is_static else None,
        dtype,
        group,
        scale_ue8m0=scheme == "powers of two",
        scale_dtype=getattr(torch, scale_dtype),
    )
    codes, unknown = want[0], torch.zeros_like(q, dtype=torch.bool)
    if format in BY_INSTRUCTION.get(arch, ()) and hidden not in BY_HAND:
        inverse = 1 / (scale if is_static else want[1].repeat_interleave(group or hidden, -1))
        limited = (y * inverse).clamp(-reference.QUANTIZED_LARGEST[dtype], reference.QUANTIZED_LARGEST[dtype])
        if format == "float8_e4m3fnuz":
            dtype = torch.float8_e4m3fn
            codes = limited.to(dtype)
        unknown = (limited.abs() < torch.finfo(dtype).smallest_normal) & (q & 0x7F == 0)
    different = (codes.view(torch.uint8) != q) & ~unknown
    if not packed:  # a NaN's sign is not specified
        different &= ~(codes.float().isnan() & q.view(dtype).float().isnan())
    if not np.array_equal(y.numpy(), y_as_well.numpy(), equal_nan=True):
        return "y differs"
    if not is_static and not np.array_equal(numbers(scales), numbers(want[1]), equal_nan=True):
        return "the scales differ"
    return f"{int(different.sum())} of {q.numel()} codes differ" if different.any() else ""


def numbers(scales: torch.Tensor) -> np.ndarray:
    return (scales if scales.dtype is torch.int32 else scales.float()).numpy()


if __name__ == "__main__":
    arch, library, code_object = sys.argv[1:]
    hip = hipemu.load(library, arch, None if code_object == "-" else code_object)
    calls = [
        (hidden, f, s, None)
        for hidden, f, s in itertools.product((8, 512, 5376, 999), FORMATS_OF_8_BITS, ("token", "given"))
    ]
    calls += [(h, f, "groups", g) for f in ("float8_e4m3fn", "int8") for h, groups in SHAPES.items() for g in groups]
    calls += [(5376, "float8_e5m2", "powers of two", 128), (512, "float8_e4m3fn", "gated", 128)]
    calls += [(h, "float4_e2m1fn_x2", s, g) for h in (512, 5376) for s, g in itertools.product(SCALE_DTYPES, (16, 32))]
    found = {", ".join(map(str, c)): wrong(arch, hip, *c) for c in calls}
    print(json.dumps({"calls": len(found), "wrong": {c: text for c, text in found.items() if text}}))
