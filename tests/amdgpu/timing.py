"""How long a kernel takes by its trace: the waves of a block, played on one compute unit with its occupancy, a latency
and a share of the memory's bandwidth.

Pure arithmetic. docs/amd.md has the constants' sources and the error on published measurements. Left out: the caches'
contents beyond "touched before", the dispatcher's rate, instruction fetch, clocks that fall under load.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model import Gpu
from wave_trace import COUNTERS, Event

CHUNK = 8  # vector instructions that a wave issues in a row before another wave of the SIMD may
GENERATIONS = 4  # of blocks that are played before the rest is taken to go at the same pace


@dataclass(frozen=True)
class Timing:
    gpu: Gpu
    reached: float  # the part of the data sheet's bandwidth that memory gives at best
    load_ns: float  # from a load that misses a unit's caches to its data
    launch_us: float  # of a kernel of many blocks that do nothing
    alone_us: float  # of one with a single block, which keeps one die busy
    store_ns: float = 300  # from a store to its acknowledgement, by a cache
    cached_ns: float = 200  # from a load that hits a cache
    scalar_ns: float = 100
    lds_cycles: float = 64
    unit_bytes: float = 64  # that a unit's cache moves in a cycle
    scalar_cycles: float = 4  # from one scalar instruction of a wave to its next
    lds_kilobytes: int = 64

    @property
    def cycle(self) -> float:
        return 1 / self.gpu.ghz

    def share(self, units: int) -> float:
        """Bytes a nanosecond for each of so many units that are at work."""
        return 1e3 * self.gpu.terabytes * self.reached / units


@dataclass(frozen=True)
class Kernel:
    """A block of a kernel, as traced."""

    isa: str
    waves: Sequence[Sequence[Event]]
    waves_a_simd: int  # by registers
    lds: int  # bytes of a block

    def resident(self, timing: Timing) -> int:
        """Blocks that a unit holds at once."""
        by_waves = self.waves_a_simd * timing.gpu.simds // len(self.waves)
        by_lds = timing.lds_kilobytes * 1024 // self.lds if self.lds else by_waves
        return max(1, min(by_waves, by_lds, 16 if len(self.waves) > 1 else 32))


@dataclass
class _Wave:
    simd: int
    block: _Block
    steps: list[tuple]
    at: int = 0
    pending: dict[str, deque[float]] = field(default_factory=dict)


@dataclass
class _Block:
    waves: int
    arrived: list[_Wave] = field(default_factory=list)
    latest: float = 0


def _steps(events: Sequence[Event], timing: Timing, isa: str) -> list[tuple]:
    """Instructions that compute, joined, as (kind, nanoseconds); the others as (kind, event)."""
    gpu, cycle = timing.gpu, timing.cycle
    cost = {
        "vector": gpu.vector_cycles, "packed": gpu.vector_cycles, "transcendental": gpu.root_cycles,
        "scalar": timing.scalar_cycles, "idle": timing.scalar_cycles,
    }  # fmt: skip
    steps: list[tuple] = []
    joined = 0
    for event in events:
        unit = event.op.unit
        if unit in cost:
            kind = "scalar" if unit in ("scalar", "idle") else "vector"
            if steps and steps[-1][0] == kind and joined < CHUNK:
                steps[-1] = (kind, steps[-1][1] + cost[unit] * cycle)
                joined += 1
            else:
                steps.append((kind, cost[unit] * cycle))
                joined = 1
        else:
            steps.append((unit, event))
    return steps


class _Unit:
    def __init__(self, kernel: Kernel, timing: Timing, share: float):
        self.kernel, self.timing, self.share = kernel, timing, share
        self.steps = [_steps(events, timing, kernel.isa) for events in kernel.waves]
        self.counters = COUNTERS[kernel.isa]
        self.simd_free = [0.0] * timing.gpu.simds
        self.cache_free = self.memory_free = self.end = 0.0
        self.queue: list[tuple[float, int, _Wave]] = []
        self.number = self.next_simd = 0

    def run(self, blocks: int) -> float:
        """Nanoseconds until the last of so many blocks is done."""
        waiting = blocks - min(blocks, self.kernel.resident(self.timing))
        for _ in range(blocks - waiting):
            self._start(0.0)
        while self.queue:
            now, _, wave = heapq.heappop(self.queue)
            if wave.at < len(wave.steps):
                self._step(wave, now)
                continue
            wave.block.waves -= 1
            wave.block.latest = max(wave.block.latest, now)
            self.end = max(self.end, now, *(q[-1] for q in wave.pending.values() if q), 0.0)
            if not wave.block.waves and waiting:
                waiting -= 1
                self._start(wave.block.latest)
        return self.end

    def _start(self, now: float) -> None:
        block = _Block(len(self.steps))
        for steps in self.steps:
            self._push(now, _Wave(self.next_simd, block, steps))
            self.next_simd = (self.next_simd + 1) % len(self.simd_free)

    def _push(self, now: float, wave: _Wave) -> None:
        self.number += 1
        heapq.heappush(self.queue, (now, self.number, wave))

    def _step(self, wave: _Wave, now: float) -> None:
        kind, what = wave.steps[wave.at]
        wave.at += 1
        timing = self.timing
        if kind == "vector":
            now = self.simd_free[wave.simd] = max(now, self.simd_free[wave.simd]) + what
        elif kind == "scalar":
            now += what
        elif kind == "barrier":
            wave.block.arrived.append(wave)
            if len(wave.block.arrived) == wave.block.waves:
                for arrived in wave.block.arrived:
                    self._push(now, arrived)
                wave.block.arrived.clear()
            return
        elif kind == "wait":
            for counter, left in what.op.waits:
                queue = wave.pending.get(counter, ())
                while len(queue) > left:
                    now = max(now, queue.popleft())
        else:
            now += timing.scalar_cycles * timing.cycle
            done = self._access(kind, what, now)
            queue = wave.pending.setdefault(self.counters[kind], deque())
            queue.append(max(done, queue[-1]) if queue else done)  # A counter falls in order.
        self._push(now, wave)

    def _access(self, kind: str, event: Event, now: float) -> float:
        """When it is done."""
        timing = self.timing
        if kind == "lds":
            return now + timing.lds_cycles * timing.cycle
        if kind == "scalar load":
            return now + timing.scalar_ns
        self.cache_free = max(self.cache_free, now) + event.size / timing.unit_bytes * timing.cycle
        if event.fresh:
            self.memory_free = max(self.memory_free, now) + event.fresh / self.share
        moved = max(self.cache_free, self.memory_free) if event.fresh else self.cache_free
        return moved + (timing.store_ns if kind == "store" else timing.load_ns if event.fresh else timing.cached_ns)


def unit_ns(kernel: Kernel, timing: Timing, blocks: int, share: float) -> float:
    """How long a unit takes for so many blocks. Many are not played to their end, but taken to go on at their pace."""
    few = GENERATIONS * kernel.resident(timing)
    if blocks <= 2 * few:
        return _Unit(kernel, timing, share).run(blocks)
    first, both = (_Unit(kernel, timing, share).run(n) for n in (few, 2 * few))
    return both + (blocks - 2 * few) * (both - first) / few


def kernel_us(kernel: Kernel, timing: Timing, blocks: int) -> float:
    """How long the GPU takes for a grid of so many blocks, the launch included."""
    units = min(timing.gpu.units, blocks)
    share = min(timing.share(units), timing.unit_bytes * timing.gpu.ghz)
    launch = timing.launch_us if blocks > 1 else timing.alone_us
    return launch + unit_ns(kernel, timing, -(-blocks // units), share) / 1e3


def looping_us(
    few: tuple[Kernel, float], more: tuple[Kernel, float], timing: Timing, blocks: int, rows: float
) -> float:
    """The same for blocks that loop over `rows` rows each, from traces of two that loop over fewer, each with its
    number of rows: each further row takes as long as the rows between those two.
    """
    less, much = (kernel_us(kernel, timing, blocks) for kernel, _ in (few, more))
    return much + (rows - more[1]) * (much - less) / (more[1] - few[1])
