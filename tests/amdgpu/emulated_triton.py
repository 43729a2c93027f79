"""Lets Triton compile for an AMD GPU and launch on an emulated one: a Triton driver over hipemu.

Triton's own launch code specialises, compiles and picks the grid, as on a GPU. Tensors are PyTorch's CPU tensors.
"""

from __future__ import annotations

import ctypes
import types

import hipemu
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

SCALARS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
           "u32": ctypes.c_uint32, "u64": ctypes.c_uint64, "u1": ctypes.c_bool, "i1": ctypes.c_bool}  # fmt: skip


class Launcher:
    def __init__(self, source, metadata):
        self.types = list(source.signature.values())
        self.threads, self.shared = metadata.num_warps * metadata.warp_size, metadata.shared

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        code, name = function
        values = [_value(kind, arg) for kind, arg in zip(self.types, args, strict=True) if kind != "constexpr"]
        values += [ctypes.c_void_p(0)] * 2  # the scratch memories of Triton's profiler and its own
        static = code.kernels[name][".group_segment_fixed_size"]
        dynamic = 0 if static else self.shared
        code.launch(name, [x, y, z], [self.threads, 1, 1], [ctypes.addressof(v) for v in values], dynamic)


def _value(kind: str, arg):
    if kind.startswith("*"):
        return ctypes.c_void_p(0 if arg is None else arg.data_ptr())
    return SCALARS[kind](arg)


class Utils:
    def __init__(self, isa: str, units: int, wave: int):
        self.isa = isa
        self.properties = {"max_shared_mem": 65536, "multiprocessor_count": units, "warpSize": wave,
                           "max_num_regs": 65536}  # fmt: skip

    def get_device_properties(self, device: int) -> dict:
        return self.properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int):
        code = hipemu.CodeObject(binary, self.isa)
        return code, (code, name), 0, 0, 1024

    def unload_module(self, module) -> None:
        pass


class Driver(DriverBase):
    launcher_cls = Launcher

    def __init__(self, arch: str, units: int):
        isa, wave, _ = hipemu.ARCHES[arch]
        self.target, self.utils = GPUTarget("hip", arch, wave), Utils(isa, units, wave)

    is_active = classmethod(lambda cls: True)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


def pretend(arch: str, units: int) -> None:
    """From here on Triton and PyTorch see one emulated GPU with so many compute units."""
    if hipemu.ARCHES[arch][0] != "cdna":
        triton.knobs.amd.use_buffer_ops = False  # The emulator has CDNA's buffer instructions only.
    triton.runtime.driver.set_active(Driver(arch, units))
    properties = types.SimpleNamespace(
        multi_processor_count=units, gcnArchName=arch, warp_size=hipemu.ARCHES[arch][1], name=arch
    )
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.current_device = lambda: 0
    for function in ("empty", "zeros", "ones", "full"):
        setattr(torch, function, _on_cpu(getattr(torch, function)))


def _on_cpu(function):
    """Peers write device="cuda" in places."""

    def wrapped(*args, device=None, **kwargs):
        return function(*args, **kwargs)

    return wrapped
