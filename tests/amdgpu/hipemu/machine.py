"""Executes AMD machine code wave by wave: tinygrad's instruction emulator, driven by a stricter loop than its own.

The loop is stricter where that finds bugs. Registers and LDS hold garbage at the start, where the emulator zeroes them.
Between barriers, the waves of a block run first to last or last to first, so that a missing barrier shows. Roots and
reciprocals are off by one unit in the last place, as the hardware's may be. Checked with tinygrad a9069c177a.
"""

from __future__ import annotations

import collections
import ctypes
import inspect
import itertools
import math
import os
import re
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, os.environ["TINYGRAD"])
os.environ.setdefault("DEV", "CPU")
os.environ["CC"] = "clang-19"  # which the tests need anyway; the emulator's own choice is "clang"

from test.mockgpu.amd import emu
from tinygrad.device import Buffer, BufferSpec
from tinygrad.uop.ops import Ops, UOp

VGPRS = 256  # an operand's number: SGPRs below, VGPRs from here on
GARBAGE = 0x7FC0_DEAD  # a NaN, and a wild index
SHADOW = (
    5  # the slot of a kernel's buffers in which an exchange between lanes finds the registers as they were before it
)


INEXACT = {  # the instructions that are; those that integer division takes are too
    "V_RCP_F32_E32": lambda x: 1 / x,
    "V_RCP_IFLAG_F32_E32": lambda x: 1 / x,
    "V_RSQ_F32_E32": lambda x: 1 / math.sqrt(x),
}


def exchanges_lanes(inst) -> bool:
    return hasattr(type(inst), "dpp") or "PERMLANE" in emu._op_name(inst)


def _read_from_shadow(handler):
    """The emulator does one lane after another, so `v_add_f32_dpp v0, v0, v0` would read what it has just written."""

    def compile_instruction(inst, ctx):
        sink = handler(inst, ctx)
        if not exchanges_lanes(inst):
            return sink
        shadow = UOp.param(SHADOW, ctx.vgpr.dtype, (256 * ctx.wave_size,))
        reads = {
            u: u.replace(src=(u.src[0].replace(src=(shadow, *u.src[0].src[1:])), *u.src[1:]))
            for u in sink.toposort()
            if u.op is Ops.LOAD and u.src[0].op is Ops.INDEX and u.src[0].src[0] is ctx.vgpr
        }
        return sink.substitute(reads)

    return compile_instruction


def _rewritten(function, *changes: tuple[str, str]):
    """The emulator's function with these patterns replaced in its source."""
    source = inspect.getsource(function)
    for pattern, replacement in changes:
        source, replaced = re.subn(pattern, replacement, source)
        if not replaced:
            raise NotImplementedError("another version of tinygrad")
    exec(compile(source, emu.__file__, "exec"), emu.__dict__)
    return emu.__dict__[function.__name__]


# On RDNA, v128 to v255 of a 16-bit operand name upper halves of v0 to v127. The emulator thinks so of CDNA too.
_HALVES = (r"bits\['\w+'\] == 16", r"(ctx.wave_size == 32 and \g<0>)")
# The emulator reads LDS in the lanes that are not active as well, wherever their addresses point.
_ACTIVE_READS = (r"'_lds': mem, ", r"\g<0>'_active': _lane_active(exec_mask, lane), ")
_ACTIVE_WRITES = (r"mem\.index\(addr >> addr_shift\)", r"mem.index((addr >> addr_shift).valid(active))")
_rewritten(emu._load_vsrc0, _HALVES)
_corrected = {
    emu._compile_vop12: _rewritten(emu._compile_vop12, _HALVES),
    emu._compile_mem_op: _rewritten(emu._compile_mem_op, _ACTIVE_READS, _ACTIVE_WRITES),
}
for _kind, _handler in list(emu._INST_HANDLERS.items()):
    emu._INST_HANDLERS[_kind] = _read_from_shadow(_corrected.get(_handler, _handler))


def _keeping_nan(to_bfloat16):
    """The emulator's v_cvt_pk_bf16_f32 adds to the bits without a look, and makes zero of 0x7fffffff."""

    def convert(value):
        number = value if value.dtype == emu.dtypes.float32 else value.bitcast(emu.dtypes.float32)
        return emu._FUNCS["isNAN"](number).where(UOp.const(0x7FC0, emu.dtypes.uint16), to_bfloat16(value))

    return convert


emu._FUNCS["f32_to_bf16"] = _keeping_nan(emu._FUNCS["f32_to_bf16"])


class _Step(NamedTuple):
    execute: Callable[..., object]
    buffers: list[int]
    is_barrier: bool
    exchanges: bool
    inexact: (
        tuple | None
    )  # a function, its operand's and its result's register: good to one unit in the last place only
    kind: str


def classify(name: str) -> str:
    """The unit that an instruction occupies, for the instruction counts."""
    if name.startswith("V_"):
        return "transcendental" if any(s in name for s in ("_RCP_", "_RSQ_", "_SQRT_")) else "vector"
    if name.startswith(("GLOBAL_LOAD", "FLAT_LOAD")):
        return "load"
    if name.startswith(("GLOBAL_STORE", "FLAT_STORE")):
        return "store"
    if name.startswith("DS_"):
        return "lds"
    if name.startswith("S_LOAD"):
        return "scalar load"
    return "wait" if name.startswith(("S_WAIT", "S_NOP", "S_DELAY", "S_BARRIER", "S_CLAUSE")) else "scalar"


class Machine:
    def __init__(self, isa: str):
        self.isa, self.wave = isa, emu._wave_size(isa)
        self.memory = Buffer("CPU", 1 << 40, emu.dtypes.uint32, options=BufferSpec(external_ptr=0)).ensure_allocated()
        self.steps: dict[int, _Step] = {}  # by address of the instruction
        self.perturbed = 0  # results in the latest run

    def _step(self, pc: int) -> _Step:
        if pc not in self.steps:
            (program, runtime), inst = emu._decode_at(pc, self.isa)
            is_barrier = getattr(inst, "op", None) in emu._BARRIER_OPS | emu._BARRIER_SOP1_OPS
            name = emu._op_name(inst)
            kind = classify(name) + (" dpp" if exchanges_lanes(inst) else "")
            inexact = INEXACT.get(name) and (INEXACT[name], inst.src0.offset, inst.vdst.offset - VGPRS)
            self.steps[pc] = _Step(runtime.fxn, program.arg.globals, is_barrier, exchanges_lanes(inst), inexact, kind)
        return self.steps[pc]

    def run(
        self,
        entry: int,
        grid,
        block,
        lds_bytes: int,
        scratch_bytes: int,
        rsrc2: int,
        user_sgprs: list[int],
        backwards: bool,
    ):
        """Runs every block of the grid and returns the wave instructions executed, by kind."""
        counts: collections.Counter = collections.Counter()
        self.perturbed = 0
        lds = (ctypes.c_uint32 * max(lds_bytes // 4, 1))()
        scratch = (ctypes.c_uint8 * max(scratch_bytes * self.wave, 1))()
        shadow = (ctypes.c_uint32 * (256 * self.wave))()
        garbage = (ctypes.c_uint32 * (255 * self.wave))(*[GARBAGE] * (255 * self.wave))
        threads = block[0] * block[1] * block[2]
        starts = range(0, threads, self.wave)
        for z, y, x in itertools.product(range(grid[2]), range(grid[1]), range(grid[0])):
            ctypes.memmove(lds, garbage, min(ctypes.sizeof(lds), ctypes.sizeof(garbage)))
            waves = [
                emu._init_wave(
                    entry, start, threads, *block, 0, rsrc2, scratch_bytes, self.isa, x, y, z, user_sgprs, self.wave
                )
                for start in (reversed(starts) if backwards else starts)
            ]
            for wave in waves:
                ctypes.memmove(wave.vgpr_buf._buf.va_addr + self.wave * 4, garbage, ctypes.sizeof(garbage))  # v1 and up
            while waves:  # each round takes every wave to its next barrier or its end
                waves = [w for w in waves if self._to_barrier(w, lds, scratch, shadow, counts)]
        return counts

    def _to_barrier(self, wave, lds, scratch, shadow, counts) -> bool:
        registers = wave.vgpr_buf._buf.va_addr
        buffers = [
            wave.sgpr_buf._buf.va_addr,
            registers,
            self.memory._buf.va_addr,
            *map(ctypes.addressof, (lds, scratch)),
            wave.accvgpr_buf._buf.va_addr,
        ]
        plain = [ctypes.c_uint64(b) for b in buffers]
        with_shadow = [*plain[:SHADOW], ctypes.c_uint64(ctypes.addressof(shadow))]
        for _ in range(1_000_000):
            pc = wave.pc
            if pc == emu.ENDPGM_PC:
                return False
            step = self._step(pc)
            if step.exchanges:
                ctypes.memmove(shadow, registers, ctypes.sizeof(shadow))
            operands = self._operands(wave, step.inexact) if step.inexact else []
            step.execute(*[(with_shadow if step.exchanges else plain)[b] for b in step.buffers])
            for lane, operand in operands:
                self._perturb(wave, step.inexact, lane, operand)
            counts[step.kind] += 1
            if step.is_barrier:
                return True
        raise RuntimeError("a wave ran 1 000 000 instructions without end or barrier")

    def _operands(self, wave, inexact: tuple) -> list[tuple[int, int]]:
        """Of every other active lane."""
        mask = wave._read_sgpr(emu.EXEC_LO.offset) | wave._read_sgpr(emu.EXEC_LO.offset + 1) << 32
        source = inexact[1]
        read = (
            (lambda lane: wave._read_vgpr(source - VGPRS, lane))
            if source >= VGPRS
            else lambda _: wave._read_sgpr(source)
        )
        return [(lane, read(lane)) for lane in range(0, self.wave, 2) if mask >> lane & 1]

    def _perturb(self, wave, inexact: tuple, lane: int, operand: int) -> None:
        """The emulator's result is the nearest number. The hardware's may be the one on the other side of the exact
        value.
        """
        function, _, register = inexact
        bits = wave._read_vgpr(register, lane)
        value, result = (struct.unpack("<f", struct.pack("<I", b))[0] for b in (operand, bits))
        if not 0 < bits >> 23 & 0xFF < 0xFE or not 0 < value < math.inf or function(value) == result:
            return
        wave._write_vgpr(register, lane, bits + (1 if function(value) > result else -1))
        self.perturbed += 1
