"""Counts the instructions of a few calls on one emulated GPU: python count.py ARCH LIBRARY CODE_OBJECT|-, to JSON."""

from __future__ import annotations

import ctypes
import json
import sys

import hipemu
import numpy as np

ROWS = 8
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
CALLS = [("bfloat16", hidden, add) for hidden in (256, 2048, 4096, 8192, 16384) for add in (False, True)]
CALLS += [("float16", 4096, False), ("float32", 4096, False)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("dims", ctypes.c_int32), ("dtype", ctypes.c_int32), ("dtype_name", ctypes.c_char_p)]  # fmt: skip

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> Tensor:
        sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        address = ctypes.addressof
        result = cls(array.ctypes.data, address(sizes), address(strides), array.ndim, DTYPES[dtype], dtype.encode())
        result.alive = (array, sizes, strides)
        return result


class NormArgs(ctypes.Structure):
    _fields_ = [("op", ctypes.c_char_p), ("x", Tensor), ("weight", Tensor), ("out", Tensor),
                *((name, ctypes.POINTER(Tensor)) for name in ("residual", "post_residual_addition", "residual_out")),
                ("eps", ctypes.c_double), ("gemma", ctypes.c_bool)]  # fmt: skip


def aligned(shape: tuple[int, ...], dtype: str) -> Tensor:
    item = 4 if dtype == "float32" else 2
    room = np.zeros(int(np.prod(shape)) * item + 64, np.uint8)
    start = -room.ctypes.data % 64
    array = room[start:][: int(np.prod(shape)) * item].view(np.uint32 if item == 4 else np.uint16).reshape(shape)
    return Tensor.of(array, dtype)


def call(hip: ctypes.CDLL, dtype: str, hidden: int, add: bool) -> dict:
    x, weight, out, residual, total = (aligned(s, dtype) for s in [(ROWS, hidden), (hidden,)] + [(ROWS, hidden)] * 3)
    args = NormArgs(b"norm", x, weight, out, None, None, None, 1e-6, True)
    if add:
        args.residual, args.residual_out = ctypes.pointer(residual), ctypes.pointer(total)
    message = ctypes.create_string_buffer(512)
    if hip.gemma_norm_hip(ctypes.byref(args), None, message):
        raise RuntimeError(message.value.decode())
    (launch,) = hipemu.launches
    hipemu.launches.clear()
    per_row = {kind: count / ROWS for kind, count in sorted(launch["instructions"].items())}
    return dict(dtype=dtype, hidden=hidden, add=add, block=launch["block"][0], per_row=per_row)


if __name__ == "__main__":
    arch, library, code_object = sys.argv[1:]
    hip = hipemu.load(library, arch, None if code_object == "-" else code_object)
    print(json.dumps([call(hip, *c) for c in CALLS]))
