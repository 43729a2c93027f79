"""Takes down what the waves of some blocks do, for tests/amdgpu/wave_trace.py."""

from __future__ import annotations

from collections.abc import Callable

from wave_trace import Event, decode

from .machine import VGPRS, emu

NO_SGPRS = 124  # an operand's number from which on it is no pair of registers: null, off


class WaveTrace:
    def __init__(self, isa: str, seen: set[int]):
        self.isa, self.seen, self.events = isa, seen, []

    def record(self, wave, name: str, inst) -> None:
        op = decode(name, getattr(inst, "simm16", 0), self.isa)
        if op.unit not in ("load", "store"):
            self.events.append(Event(op))
            return
        mask = wave._read_sgpr(emu.EXEC_LO.offset)
        if wave.wave_size == 64:
            mask |= wave._read_sgpr(emu.EXEC_LO.offset + 1) << 32
        lanes = [lane for lane in range(wave.wave_size) if mask >> lane & 1]
        addresses = [a for lane in lanes if (a := _address(wave, inst, lane)) is not None]
        size = op.width * len(addresses)
        words = {word for a in addresses for word in range(a // 4, (a + op.width + 3) // 4)}
        fresh = size if op.unit == "store" else min(size, 4 * len(words - self.seen))
        self.seen |= words
        self.events.append(Event(op, size, fresh))


def _address(wave, inst, lane: int) -> int | None:
    """Where the lane reads or writes; nothing for one beyond the end of a buffer."""

    def pair(register: int) -> int:
        return wave._read_sgpr(register) | wave._read_sgpr(register + 1) << 32

    def vector(register: int) -> int:
        return wave._read_vgpr(register - VGPRS, lane)

    if hasattr(inst, "srsrc"):
        base = inst.srsrc.offset
        within = inst.offset + (vector(inst.vaddr.offset) if inst.offen else 0)
        if within >= wave._read_sgpr(base + 2):
            return None
        return (pair(base) & (1 << 48) - 1) + within  # The scalar offset is zero in what compilers write here.
    address = inst.vaddr if hasattr(inst, "vaddr") else inst.addr
    offset, bits = (inst.ioffset, 24) if hasattr(inst, "ioffset") else (inst.offset, 13)
    offset -= (offset >> (bits - 1) & 1) << bits
    if inst.saddr.offset < NO_SGPRS:
        return pair(inst.saddr.offset) + vector(address.offset) + offset
    return vector(address.offset) + (vector(address.offset + 1) << 32) + offset


class BlockTracer:
    """Traces the blocks that `wants` picks. `seen` holds the words that earlier blocks touched."""

    def __init__(self, wants: Callable[[int, int], bool]):
        self.wants, self.seen, self.blocks = wants, set(), []

    def start_block(self, isa: str, waves: int) -> list[WaveTrace]:
        self.blocks.append([WaveTrace(isa, self.seen) for _ in range(waves)])
        return self.blocks[-1]

    def take(self) -> list[list[list[Event]]]:
        """What the blocks of the latest launch did, wave by wave."""
        blocks, self.blocks = self.blocks, []
        return [[wave.events for wave in block] for block in blocks]
