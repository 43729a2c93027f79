"""What a wave did, as an emulator saw it: its instructions by unit, the bytes that each moves, and what each wait waits
for. No emulator is needed to read a trace.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

# The counter that an access raises until it is done, and which waits look at. CDNA counts loads and stores in one, so
# that a wait for a load is one for the stores before it.
COUNTERS = {
    "cdna": {"load": "vm", "store": "vm", "lds": "lgkm", "scalar load": "lgkm"},
    "rdna3": {"load": "vm", "store": "vs", "lds": "lgkm", "scalar load": "lgkm"},
    "rdna4": {"load": "load", "store": "store", "lds": "ds", "scalar load": "km"},
}
ALU = ("vector", "packed", "transcendental", "scalar")  # units that compute
MEMORY = ("load", "store", "lds", "scalar load")


class Op(NamedTuple):
    unit: str  # one of ALU or MEMORY, or wait, barrier, idle
    width: int = 0  # bytes of a lane that a memory access moves; of a scalar load, bytes
    waits: tuple[tuple[str, int], ...] = ()  # counters, and how many of their accesses may be left


class Event(NamedTuple):
    op: Op
    size: int = 0  # bytes of all lanes that took part in an access to memory
    fresh: int = 0  # how many of them no earlier access touched; a cache has the others. Of a store, all.


def width_of(name: str) -> int:
    """Bytes of a lane."""
    if found := re.search(r"DWORDX(\d+)", name):
        return 4 * int(found[1])
    if "DWORD" in name or "ADDTID" in name or "PERMUTE" in name or "SWIZZLE" in name:
        return 4
    if "BYTE" in name or "SHORT" in name:
        return 1 if "BYTE" in name else 2
    bits = [int(b) for b in re.findall(r"_[BUIF](\d+)", name)]
    return (2 if re.search("(READ|WRITE|LOAD|STORE)(_?2)", name) else 1) * min(bits, default=32) // 8


def _waits(name: str, simm: int, isa: str) -> tuple[tuple[str, int], ...]:
    if name == "S_WAITCNT":
        if isa == "cdna":
            found = [("vm", simm & 15 | simm >> 10 & 0x30), ("lgkm", simm >> 8 & 15)]
            full = {"vm": 63, "lgkm": 15}
        else:
            found, full = [("vm", simm >> 10 & 63), ("lgkm", simm >> 4 & 63)], {"vm": 63, "lgkm": 63}
        return tuple((counter, n) for counter, n in found if n < full[counter])
    if name == "S_WAITCNT_VSCNT":
        return (("vs", simm),)
    first, *second = re.findall("(LOAD|STORE|DS|KM)CNT", name) or [""]
    if second:  # in one instruction, the other counter and that of LDS
        return ((first.lower(), simm >> 8 & 63), ("ds", simm & 63))
    return ((first.lower(), simm),) if first else ()


@cache
def decode(name: str, simm: int, isa: str) -> Op:
    """An instruction by its name in capitals, as the instruction set's manual writes it, and its 16-bit constant."""
    if name.startswith("S_WAIT"):
        waits = _waits(name, simm, isa)
        return Op("wait" if waits else "idle", 0, waits)
    if name.startswith("S_BARRIER"):
        # RDNA4 splits a barrier in two, of which the second waits.
        return Op("idle" if "SIGNAL" in name else "barrier")
    if name.startswith(("S_NOP", "S_DELAY", "S_CLAUSE", "S_SLEEP", "S_SENDMSG", "S_SETPRIO", "S_ENDPGM")):
        return Op("idle")
    if name.startswith(("S_LOAD", "S_BUFFER_LOAD")):
        return Op("scalar load", width_of(name))
    if name.startswith("S_"):
        return Op("scalar")
    if name.startswith(("DS_", "LDS_")):
        return Op("lds", width_of(name))
    if found := re.match("(GLOBAL|FLAT|BUFFER)_(LOAD|STORE|ATOMIC)", name):
        return Op("store" if found[2] == "STORE" else "load", width_of(name))
    if re.match("(GLOBAL|BUFFER)_(INV|WB|GL[01]_INV)", name):
        return Op("idle")
    if re.match("V_(RCP|RSQ|SQRT|EXP|LOG|SIN|COS)_", name):
        return Op("transcendental")
    # V_DUAL carries two instructions of RDNA, V_PK the same operation on a pair.
    return Op("packed" if name.startswith(("V_PK_", "V_DUAL_")) else "vector")


def waited_for(events: Iterable[Event], isa: str) -> list[str]:
    """For each wait, the kind of the latest access that it waits for: load, store, lds or scalar load; nothing, if all
    that it asks for is done at any time: nothing was pending.

    Accesses of a counter are taken as done in their order.
    """
    counters = COUNTERS[isa]
    pending: dict[str, deque[str]] = {counter: deque() for counter in counters.values()}
    result = []
    for event in events:
        if event.op.unit in counters:
            pending[counters[event.op.unit]].append(event.op.unit)
        elif event.op.unit == "wait":
            done: list[str] = []
            for counter, left in event.op.waits:
                queue = pending[counter]
                while len(queue) > left:
                    done.append(queue.popleft())
            slowest = [kind for kind in ("load", "store", "scalar load", "lds") if kind in done]
            result.append(slowest[0] if slowest else "nothing")
    return result


def count(waves: list[list[Event]], isa: str) -> dict[str, float]:
    """Instructions by class, and bytes, of all waves together."""
    counts: Counter[str] = Counter()
    for events in waves:
        for op, size, fresh in events:
            bits = f" {8 * op.width}" if op.unit in ("load", "store") else ""
            counts[op.unit + bits] += op.unit != "wait"
            if op.unit == "load":
                counts["bytes loaded"] += fresh
                counts["bytes loaded again"] += size - fresh
            counts["bytes stored"] += fresh if op.unit == "store" else 0
        counts.update(f"wait for {kind}" for kind in waited_for(events, isa))
    counts["instructions"] = sum(map(len, waves))
    return {name: n for name, n in counts.items() if n}
