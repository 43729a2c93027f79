"""How a call is timed: in a CUDA graph (:class:`GraphTimed`) or by the clock (:class:`WallTimed`).

The ``sample()`` of either is the mean time of a call over a number of calls in a row.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .cases import Inputs, Point
from .norms import Call

cuda: Any = torch.cuda  # partly without types
WARM_SETS = 16
AMD_LAST_LEVEL_CACHE = 256 * 2**20  # MI300's Infinity Cache, which PyTorch does not report


@dataclass(frozen=True)
class Effort:
    rounds: int = 21
    """How many samples are taken of each provider."""
    warm_up: float = 3.0
    """In seconds. A GPU that was idle is several times slower at first."""
    seconds: float = 0.5
    """How long the wall-clock samples of a provider may take. At least five are taken, however long they take."""


QUICK = Effort(rounds=7, warm_up=2.0, seconds=0.1)


class Timed(Protocol):
    rounds: int

    def sample(self) -> float:
        """The microseconds of a call."""
        ...


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call. p50 is the median of the samples; a fifth of them is below p20, a fifth above p80."""

    p20: float
    p50: float
    p80: float


def interleave(timed: Mapping[str, Timed]) -> dict[str, Timing | Exception]:
    """Take samples of all in turn, so that a drift of clock rates or load affects all of them equally."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    failed: dict[str, Timing | Exception] = {}
    gc.collect()
    gc.disable()
    try:
        for turn in range(max((t.rounds for t in timed.values()), default=0)):
            for name, t in timed.items():
                if turn < t.rounds and name not in failed:
                    try:
                        samples[name].append(t.sample())
                    except Exception as error:
                        failed[name] = error
    finally:
        gc.enable()
    return failed | {name: _summary(values) for name, values in samples.items() if name not in failed}


def _summary(samples: list[float]) -> Timing:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(tenths[1], tenths[4], tenths[7])


class NotCaptured(Exception):
    """The call cannot be captured in a CUDA graph."""


class GraphTimed:
    """Times a replay of a CUDA graph of ``calls`` calls, between two events.

    The graph takes half a millisecond, so that the microseconds of starting it do not matter. An untimed replay comes
    first. It leaves the caches as a replay leaves them, and keeps the GPU busy while the host enqueues the timed one.
    """

    PROBE, LENGTH, MOST_CALLS = 8, 500.0, 512

    def __init__(self, call: Call, inputs: Inputs, effort: Effort, stream: Any = None) -> None:
        """``stream`` is the one on which calls are captured; None stands for PyTorch's."""
        self.call = call  # holds tensors that the graph reads, such as those saved for a backward pass
        self.inputs, self.rounds, self.stream = inputs, effort.rounds, stream
        self.start, self.stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        for _ in range(3):  # compiling, tuning and loading must be over before the capture
            call(*inputs.sets[0])
        cuda.synchronize()
        self._capture(call, self.PROBE)
        wanted = min(int(self.LENGTH / max(self.sample(), 0.1)), self.MOST_CALLS)
        if wanted > self.calls:
            self._capture(call, wanted)
        self.sample()

    def _capture(self, call: Call, calls: int) -> None:
        sets = self.inputs.sets
        self.calls = math.ceil(calls / len(sets)) * len(sets)
        graph = cuda.CUDAGraph()
        outputs: deque[object] = deque(maxlen=len(sets))  # kept alive, so that the outputs rotate like the inputs
        try:
            # The outer context restores the current stream, which a failed capture does not do.
            with (
                cuda.stream(cuda.current_stream()),
                cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                for i in range(self.calls):
                    outputs.append(call(*sets[i % len(sets)]))
        except Exception as error:
            raise NotCaptured(f"no CUDA graph of it: {type(error).__name__}: {error}") from None
        self.graph = graph

    def sample(self) -> float:
        self.graph.replay()
        if self.inputs.written:
            self.inputs.restore()
        self.start.record()
        self.graph.replay()
        self.stop.record()
        self.stop.synchronize()
        return float(self.start.elapsed_time(self.stop)) * 1e3 / self.calls


def sets_for(point: Point) -> int:
    """How many sets of buffers a point needs. If it is cold, they are together six times the last-level cache."""
    if point.cache != "cold":
        return WARM_SETS if point.cache == "warm" else 1
    cache: int = cuda.get_device_properties(point.device).L2_cache_size
    if torch.version.hip:
        cache = max(cache, AMD_LAST_LEVEL_CACHE)
    return min(max(2, math.ceil(6 * cache / point.bytes)), 1024)


class WallTimed:
    """Times a loop of calls by the clock.

    On a GPU this is the host's time only: the loop is so short that the host never waits for the GPU.
    """

    LENGTH, MOST_CALLS = 200.0, 100

    def __init__(self, call: Call, inputs: Inputs, effort: Effort) -> None:
        self.call, self.inputs, self.calls = call, inputs, 1
        self.synchronize = cuda.synchronize if inputs.point.device == "cuda" else lambda: None
        self.sample()
        estimate = self.sample()
        self.calls = min(max(int(self.LENGTH / estimate), 1), self.MOST_CALLS)
        affordable = int(effort.seconds * 1e6 / (estimate * (self.calls + 1)))
        self.rounds = min(max(affordable, 5), effort.rounds * 3)

    def sample(self) -> float:
        call, arguments, calls = self.call, self.inputs.sets[0], range(self.calls)
        if self.inputs.written:
            self.inputs.restore()
        call(*arguments)  # untimed: the caches hold the data of the provider before
        self.synchronize()
        start = time.perf_counter_ns()
        for _ in calls:
            call(*arguments)
        stop = time.perf_counter_ns()
        self.synchronize()
        return (stop - start) * 1e-3 / self.calls


def warm_up(seconds: float) -> None:
    a, b = torch.empty(2, 2**28, dtype=torch.uint8, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(100):
            a.copy_(b)
        cuda.synchronize()


def keep_freed_memory(tensor: int) -> None:
    """Make glibc keep freed memory for later tensors: enough for a dozen of ``tensor`` bytes, with all pages touched.

    Otherwise the operating system would provide the memory of a large output anew in each call, and its page faults
    would be measured, which take several times as long as the norm. With another C library this does nothing.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    if mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1):
        quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        torch.zeros(min(12 * tensor, quarter), dtype=torch.uint8)
