"""Runs a HIP library's own launch code, and the AMD machine code it holds, on a machine with no GPU.

`load(library, arch)` opens a HIP library, whose HIP symbols are undefined, against a stand-in runtime, runtime.c.
Device pointers are host pointers. machine.py executes each launch, on the code object that the library's fat binary
holds for `arch`, or on one given by `set_arch(arch, code_object=path)`. Needs gcc, HIP's headers, clang-19 and
TINYGRAD=<a source checkout of tinygrad>. gfx90a, gfx942 and gfx950 run as CDNA, gfx11xx as RDNA3, gfx12xx as RDNA4;
compile those with -mcumode.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
import traceback
from pathlib import Path

from . import code_object as _code_object
from .machine import Machine, Tracer, emu

from tinygrad.runtime.autogen import amdgpu_kd  # isort: skip
from tinygrad.runtime.support.elf import elf_loader  # isort: skip

HERE = Path(__file__).resolve().parent
ARCHES = {  # instruction set, wave width, compute units
    "gfx90a": ("cdna", 64, 104),
    "gfx942": ("cdna", 64, 304),
    "gfx950": ("cdna", 64, 256),
    "gfx1100": ("rdna3", 32, 96),
    "gfx1102": ("rdna3", 32, 32),
    "gfx1151": ("rdna3", 32, 40),
    "gfx1201": ("rdna4", 32, 64),
}
launches: list[dict] = []  # a record of each launch, newest last
# Kernels that were launched and need scratch memory, because they spill. The emulator has one scratch memory for all
# waves, and stores no 64 bits in it: so these launches fail.
refused: list[str] = []


tracer: Tracer | None = None  # of the launches from now on


def backwards() -> bool:
    """Whether the waves of a block run last to first. Callers that want that replace this function."""
    return False


_arch = ""
_given: dict[str, bytes] = {}
_objects: dict[tuple, CodeObject] = {}
_flushing = emu._get_ftz_lib


class CodeObject:
    def __init__(self, blob: bytes, isa: str):
        image, sections, relocations = elf_loader(blob)
        if relocations:
            raise NotImplementedError(f"relocations {relocations}")
        content = {s.name: bytes(s.content) for s in sections}
        self.kernels = _code_object.read_metadata(content[".note"])
        self.symbols = {}
        table, strings = (".symtab", ".strtab") if ".symtab" in content else (".dynsym", ".dynstr")
        for i in range(0, len(content[table]), 24):
            name, _, _, _, address, _ = struct.unpack_from("<IBBHQQ", content[table], i)
            self.symbols[content[strings][name:].split(b"\0", 1)[0].decode()] = address
        self.image = (ctypes.c_char * (len(image) + 4096)).from_buffer_copy(bytes(image) + bytes(4096))
        self.base = ctypes.addressof(self.image)
        self.machine = Machine(isa)

    def launch(self, name: str, grid, block, args, dynamic_lds: int) -> None:
        meta = self.kernels[name]
        at = self.symbols[meta[".symbol"]]
        if meta[".private_segment_fixed_size"]:
            refused.append(name)
            raise NotImplementedError(f"{name} needs scratch memory")
        descriptor = amdgpu_kd.llvm_amdhsa_kernel_descriptor_t.from_buffer(self.image, at)
        kernarg = self._kernarg(meta, grid, block, args, dynamic_lds)
        packet = ctypes.create_string_buffer(64)
        struct.pack_into(
            "<HHHHHHIIII", packet, 0, 0, 3, *block, 0, *(g * b for g, b in zip(grid, block, strict=False)), 0
        )
        user_sgprs = self._user_sgprs(
            descriptor.kernel_code_properties, ctypes.addressof(packet), ctypes.addressof(kernarg)
        )
        entry = self.base + at + descriptor.kernel_code_entry_byte_offset
        # Arguments that arrive in registers. The first 256 bytes of such a kernel load them, where firmware does not.
        preload = int.from_bytes(self.image[at + 58 : at + 60], "little")
        if length := preload & 127:
            words = struct.unpack_from(f"<{length}I", kernarg, 4 * (preload >> 7))
            user_sgprs += words
            entry += 256
        # By itself, the emulator flushes float32 subnormals. The kernel's descriptor says whether it is to.
        keeps_subnormals = (descriptor.compute_pgm_rsrc1 >> 16) & 3 == 3
        emu._get_ftz_lib = (lambda: (None, 0)) if keeps_subnormals else _flushing
        lds, scratch = descriptor.group_segment_fixed_size + dynamic_lds, descriptor.private_segment_fixed_size
        with emu._MXCSRContext():
            counts = self.machine.run(
                entry, grid, block, lds, scratch,
                descriptor.compute_pgm_rsrc2, user_sgprs, backwards(), tracer,
            )  # fmt: skip
        launches.append(
            dict(kernel=name, grid=tuple(grid), block=tuple(block), lds=lds, scratch=scratch,
                 instructions=dict(counts), perturbed=self.machine.perturbed, meta=meta,
                 blocks=tracer.take() if tracer else [])
        )  # fmt: skip

    @staticmethod
    def _kernarg(meta: dict, grid, block, args, dynamic_lds: int):
        buffer = ctypes.create_string_buffer(meta[".kernarg_segment_size"] + 256)
        hidden = {"hidden_dynamic_lds_size": dynamic_lds, "hidden_grid_dims": 1 + (grid[1] > 1) + (grid[2] > 1)}
        for axis, blocks, threads in zip("xyz", grid, block, strict=False):
            hidden[f"hidden_block_count_{axis}"], hidden[f"hidden_group_size_{axis}"] = blocks, threads
        explicit = iter(range(len(meta[".args"])))
        for arg in meta[".args"]:
            to = ctypes.addressof(buffer) + arg[".offset"]
            if not arg[".value_kind"].startswith("hidden_"):
                ctypes.memmove(to, args[next(explicit)], arg[".size"])
            elif arg[".value_kind"] in hidden:
                ctypes.memmove(to, hidden[arg[".value_kind"]].to_bytes(arg[".size"], "little"), arg[".size"])
        return buffer

    @staticmethod
    def _user_sgprs(properties: int, packet: int, kernarg: int) -> list[int]:
        words, user = lambda p: [p & 0xFFFFFFFF, p >> 32], []
        for bit, value in enumerate(([0] * 4, words(packet), [0] * 2, words(kernarg), [0] * 2, [0] * 2, [0])):
            if properties >> bit & 1:
                user += value
        return user


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32),
                  ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)  # fmt: skip
def _on_launch(name, bundle, grid, block, args, shared):
    try:
        key = (bundle, _arch)
        if key not in _objects:
            blob = _given.get(_arch) or _code_object.find_in_bundle(bundle, _arch)
            _objects[key] = CodeObject(blob, ARCHES[_arch][0])
        _objects[key].launch(name.decode(), list(grid[:3]), list(block[:3]), args, shared)
        return 0
    except NotImplementedError:
        return 1
    except BaseException:  # nothing may unwind through C
        traceback.print_exc()
        return 1


def _build_runtime() -> ctypes.CDLL:
    build = Path(tempfile.mkdtemp(prefix="hipemu-"))
    atexit.register(shutil.rmtree, build, True)
    out = build / "libamdhip64.so"
    subprocess.run(
        ["gcc", "-O1", "-w", "-shared", "-fPIC", "-o", out, HERE / "runtime.c", HERE / "properties.c"], check=True
    )
    return ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL)


_runtime = None


def set_arch(arch: str, code_object: Path | None = None) -> None:
    """Which GPU the process has from now on: the code object run and the properties reported."""
    global _arch, _runtime
    _runtime = _runtime or _build_runtime()
    _arch = arch
    if code_object:
        _given[arch] = Path(code_object).read_bytes()
    _, wave, units = ARCHES[arch]
    _runtime.hipemu_set(_on_launch, arch.encode(), wave, units)


def load(library: Path, arch: str, code_object: Path | None = None) -> ctypes.CDLL:
    set_arch(arch, code_object)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL | os.RTLD_LAZY)
