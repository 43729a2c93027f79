"""Runs a few calls on one emulated GPU, and prints as JSON what the cases do not tell.

python probe.py ARCH LIBRARY CODE_OBJECT|-
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence

import hipemu
import numpy as np

ROWS = 8
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int32": 4, "int64": 5, "int8": 6, "float8_e4m3fn": 7,
          "float8_e4m3fnuz": 8, "float8_e5m2": 9, "float4_e2m1fn_x2": 10,
          "float8_e8m0fnu": 11}  # gemma_norm::DType  # fmt: skip
CALLS = [("bfloat16", hidden, add) for hidden in (256, 2048, 4096, 8192, 16384) for add in (False, True)]
CALLS += [("float16", 4096, False), ("float32", 4096, False)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("dims", ctypes.c_int32), ("dtype", ctypes.c_int32), ("dtype_name", ctypes.c_char_p)]  # fmt: skip

    @classmethod
    def at(cls, address: int, shape: Sequence[int], strides: Sequence[int], dtype: str, owner: object) -> Tensor:
        """A view of the memory that `owner` has at the address."""
        sizes, strides = (ctypes.c_int64 * len(shape))(*shape), (ctypes.c_int64 * len(shape))(*strides)
        of = ctypes.addressof
        result = cls(address, of(sizes), of(strides), len(shape), DTYPES[dtype], dtype.encode())
        result.alive = (owner, sizes, strides)
        return result

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> Tensor:
        strides = [stride // array.itemsize for stride in array.strides]
        return cls.at(array.ctypes.data, array.shape, strides, dtype, array)


OPERANDS = ["x", "weight", "residual", "post", "gate", "post_weight", "k", "k_weight"]  # gemma_norm::Operand
OPERANDS += ["cos", "sin", "cos_sin_cache", "positions", "scale", "global_scale"]
OPERANDS += ["out", "residual_out", "k_out", "scale_out", "y"]
OPERANDS += ["dout", "dsum", "dx", "dgate", "dweight"]


class Sections(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("sizes", ctypes.c_int64 * 3)]  # fmt: skip


class Options(ctypes.Structure):
    _fields_ = [("eps", ctypes.c_double), ("gemma", ctypes.c_bool), ("round_each_step", ctypes.c_bool),
                ("sigmoid", ctypes.c_bool), ("norm_before_gate", ctypes.c_bool),
                ("group_size", ctypes.c_int64), ("round_rotation", ctypes.c_bool), ("interleaved", ctypes.c_bool),
                ("mrope_interleaved", ctypes.c_bool), ("mrope_section", Sections),
                ("dtype", ctypes.c_int32), ("dtype_name", ctypes.c_char_p), ("scale_group_size", ctypes.c_int64),
                ("round_first", ctypes.c_bool), ("scale_ue8m0", ctypes.c_bool),
                ("column_major_scale", ctypes.c_bool),
                ("scale_dtype", ctypes.c_int32), ("scale_dtype_name", ctypes.c_char_p)]  # fmt: skip


WHOLE_ROW = 2**63 - 1


class Call(ctypes.Structure):
    _fields_ = [("op", ctypes.c_void_p), ("tensors", ctypes.POINTER(Tensor) * len(OPERANDS)), ("options", Options),
                ("before_write", ctypes.c_void_p), ("scratch", ctypes.c_void_p),
                ("context", ctypes.c_void_p)]  # fmt: skip


def aligned(shape: tuple[int, ...], dtype: str) -> Tensor:
    item = 4 if dtype == "float32" else 2
    room = np.zeros(int(np.prod(shape)) * item + 64, np.uint8)
    start = -room.ctypes.data % 64
    array = room[start:][: int(np.prod(shape)) * item].view(np.uint32 if item == 4 else np.uint16).reshape(shape)
    return Tensor.of(array, dtype)


def options(**more: object) -> Options:
    return Options(**{"eps": 1e-6, "gemma": True, "norm_before_gate": True, "group_size": WHOLE_ROW, **more})


def launch(hip: ctypes.CDLL, op: bytes, options: Options, **tensors: Tensor) -> dict:
    hip.gemma_norm_op.restype = ctypes.c_void_p
    call = Call(op=hip.gemma_norm_op(op), options=options)
    for name, tensor in tensors.items():
        call.tensors[OPERANDS.index(name)] = ctypes.pointer(tensor)
    message = ctypes.create_string_buffer(512)
    if hip.gemma_norm_hip(ctypes.byref(call), None, message):
        raise RuntimeError(message.value.decode())
    return hipemu.launches.pop()


def count(hip: ctypes.CDLL, dtype: str, hidden: int, add: bool) -> dict:
    """How many instructions a row takes, by kind."""
    names = ["x", "out", "residual", "residual_out"] if add else ["x", "out"]
    tensors = {name: aligned((ROWS, hidden), dtype) for name in names} | {"weight": aligned((hidden,), dtype)}
    done = launch(hip, b"add_rms_norm" if add else b"rms_norm", options(), **tensors)
    per_row = {kind: number / ROWS for kind, number in sorted(done["instructions"].items())}
    return dict(dtype=dtype, hidden=hidden, add=add, block=done["block"][0], per_row=per_row)


def keeps_every_nan(hip: ctypes.CDLL) -> bool:
    """Rounding to bfloat16 by integer arithmetic could make Inf or zero of a NaN of a float32 weight, such as CUDA's
    0x7fffffff.
    """
    x, weight, out = (aligned(s, d) for s, d in [((1, 8), "bfloat16"), ((8,), "float32"), ((1, 8), "bfloat16")])
    x.alive[0][:] = 0x3F80
    weight.alive[0][:] = [
        sign | nan for nan in (0x7FFFFFFF, 0x7FFF8000, 0x7F800001, 0x7FC00000) for sign in (0, 1 << 31)
    ]
    launch(hip, b"rms_norm", options(), x=x, weight=weight, out=out)
    return bool((out.alive[0] & 0x7FFF > 0x7F80).all())


def rounds_tiny_roots(hip: ctypes.CDLL) -> bool:
    """Roots of mean squares that are so small that the residual of a root underflows. The mean squares are exact: small
    integers times 2^-140.
    """
    x, weight, out = (aligned(s, "float32") for s in [(256, 4), (4,), (256, 4)])
    values = x.alive[0].view(np.float32)
    values[:] = np.ldexp(2 * np.random.default_rng(0).integers(1, 16, values.shape), -70)
    launch(hip, b"rms_norm", options(eps=0), x=x, weight=weight, out=out)
    mean = np.square(values, dtype=np.float64).mean(-1, keepdims=True).astype(np.float32)
    return bool((out.alive[0].view(np.float32) == values * (np.float32(1) / np.sqrt(mean))).all())


if __name__ == "__main__":
    arch, library, code_object = sys.argv[1:]
    hip = hipemu.load(library, arch, None if code_object == "-" else code_object)
    counts = [count(hip, *c) for c in CALLS]
    print(json.dumps({"counts": counts, **{f.__name__: f(hip) for f in (keeps_every_nan, rounds_tiny_roots)}}))
