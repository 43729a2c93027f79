"""How busy other work keeps the CPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOO_BUSY = 0.1
"""From this share of time without a CPU on, times are not to be trusted. An idle machine has 0.01, one other busy
process for two CPUs makes it 0.2 to 0.5, eight make it 0.9."""


class Load:
    """How much of the time in which this process was ready to run it had no CPU, because other work had them.

    Linux counts this for every thread. Unlike the load average, the count has no delay and knows a container's quota.
    Unlike CPU time beside wall time, it tells a thread that waits for a CPU from one that waits for the GPU or for
    another thread.
    """

    def __init__(self) -> None:
        self._ran = self._waited = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what happens within the context."""
        ran, waited = time.process_time(), _seconds_without_cpu()
        yield
        self._ran += time.process_time() - ran
        self._waited += max(_seconds_without_cpu() - waited, 0.0)  # a thread that has ended takes its count with it

    @property
    def without_cpu(self) -> float:
        """From 0 to 1; 0 where the system does not count."""
        return self._waited / max(self._ran + self._waited, 1e-9)


def _seconds_without_cpu() -> float:
    """Of all threads together: the second number of schedstat, in nanoseconds."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return total * 1e-9
