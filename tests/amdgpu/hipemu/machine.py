"""Executes AMD machine code wave by wave: tinygrad's instruction emulator, driven by a stricter loop than its own.

The loop is stricter where that finds bugs. Registers and LDS hold garbage at the start, where the emulator zeroes them.
Between barriers, the waves of a block run first to last or last to first, so that a missing barrier shows. Roots and
reciprocals are off by one unit in the last place, as the hardware's may be. Checked with tinygrad a9069c177a.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import math
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from .corrections import SHADOW, emu, exchanges_lanes

from tinygrad.device import Buffer, BufferSpec  # isort: skip

VGPRS = 256  # an operand's number: SGPRs below, VGPRs from here on
GARBAGE = 0x7FC0_DEAD  # a NaN, and a wild index
INEXACT = {  # the instructions that are; those that integer division takes are too
    "V_RCP_F32_E32": lambda x: 1 / x,
    "V_RCP_IFLAG_F32_E32": lambda x: 1 / x,
    "V_RSQ_F32_E32": lambda x: 1 / math.sqrt(x),
}


# RDNA's instructions that drop or write back what a cache holds: the first word's operation, bytes, name. The
# emulator has no caches, nor these.
INVALIDATES = {
    "rdna3": [(0xE0AC0000, 8, "BUFFER_GL0_INV"), (0xE0B00000, 8, "BUFFER_GL1_INV")],
    "rdna4": [(0xEE0AC000, 12, "GLOBAL_INV"), (0xEE0B0000, 12, "GLOBAL_WB")],
}


class Trace(Protocol):
    """What a wave does, instruction by instruction."""

    def record(self, wave, name: str, inst) -> None:
        """Takes down an instruction that is about to be executed."""


class Tracer(Protocol):
    def wants(self, index: int, blocks: int) -> bool:
        """Whether this one of the grid's blocks is run. The others are not."""

    def start_block(self, isa: str, waves: int) -> list[Trace]:
        """A trace for each wave."""


class _Step(NamedTuple):
    execute: Callable[..., object] | None  # none: nothing to do
    buffers: list[int]
    is_barrier: bool
    exchanges: bool
    inexact: (
        tuple | None
    )  # a function, its operand's and its result's register: good to one unit in the last place only
    kind: str
    name: str
    inst: object
    size: int = 0  # bytes, of an instruction with nothing to do


def classify(name: str) -> str:
    """The unit that an instruction occupies, for the instruction counts."""
    if name.startswith("V_"):
        return "transcendental" if any(s in name for s in ("_RCP_", "_RSQ_", "_SQRT_")) else "vector"
    if name.startswith(("GLOBAL_LOAD", "FLAT_LOAD", "BUFFER_LOAD")):
        return "load"
    if name.startswith(("GLOBAL_STORE", "FLAT_STORE", "BUFFER_STORE")):
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
        operation = ctypes.c_uint32.from_address(pc).value & 0xFFFFC000 if pc not in self.steps else 0
        for bits, size, name in INVALIDATES.get(self.isa, []):
            if operation == bits:
                self.steps[pc] = _Step(None, [], False, False, None, "wait", name, None, size)
        if pc not in self.steps:
            (program, runtime), inst = emu._decode_at(pc, self.isa)
            is_barrier = getattr(inst, "op", None) in emu._BARRIER_OPS | emu._BARRIER_SOP1_OPS
            name = emu._op_name(inst)
            kind = classify(name) + (" dpp" if exchanges_lanes(inst) else "")
            inexact = INEXACT.get(name) and (INEXACT[name], inst.src0.offset, inst.vdst.offset - VGPRS)
            self.steps[pc] = _Step(
                runtime.fxn, program.arg.globals, is_barrier, exchanges_lanes(inst), inexact, kind, name, inst
            )
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
        tracer: Tracer | None = None,
    ):
        """Runs every block of the grid, or those that the tracer wants, and returns the wave instructions executed, by
        kind.
        """
        counts: collections.Counter = collections.Counter()
        self.perturbed = 0
        lds = (ctypes.c_uint32 * max(lds_bytes // 4, 1))()
        scratch = (ctypes.c_uint8 * max(scratch_bytes * self.wave, 1))()
        shadow = (ctypes.c_uint32 * (256 * self.wave))()
        garbage = (ctypes.c_uint32 * (255 * self.wave))(*[GARBAGE] * (255 * self.wave))
        threads = block[0] * block[1] * block[2]
        starts = range(0, threads, self.wave)
        blocks = itertools.product(range(grid[2]), range(grid[1]), range(grid[0]))
        for index, (z, y, x) in enumerate(blocks):
            if tracer and not tracer.wants(index, math.prod(grid)):
                continue
            ctypes.memmove(lds, garbage, min(ctypes.sizeof(lds), ctypes.sizeof(garbage)))
            waves = [
                emu._init_wave(
                    entry, start, threads, *block, 0, rsrc2, scratch_bytes, self.isa, x, y, z, user_sgprs, self.wave
                )
                for start in (reversed(starts) if backwards else starts)
            ]
            if self.isa == "rdna4":  # A wave finds its number in the block here. The emulator leaves it zero.
                for start, wave in zip(reversed(starts) if backwards else starts, waves, strict=True):
                    wave._write_sgpr(emu.ttmp[8].offset, start // self.wave << 25)
            for wave in waves:
                ctypes.memmove(wave.vgpr_buf._buf.va_addr + self.wave * 4, garbage, ctypes.sizeof(garbage))  # v1 and up
            traces = tracer.start_block(self.isa, len(waves)) if tracer else [None] * len(waves)
            running = list(zip(waves, traces, strict=True))
            while running:  # each round takes every wave to its next barrier or its end
                running = [(w, t) for w, t in running if self._to_barrier(w, t, lds, scratch, shadow, counts)]
        return counts

    def _to_barrier(self, wave, trace, lds, scratch, shadow, counts) -> bool:
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
            if trace:
                trace.record(wave, step.name, step.inst)
            if step.exchanges:
                ctypes.memmove(shadow, registers, ctypes.sizeof(shadow))
            if step.execute is None:
                wave.pc = pc + step.size
                counts[step.kind] += 1
                continue
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
