"""How much other work keeps the CPUs busy while something is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOO_BUSY = 0.1
"""If :attr:`Load.without_cpu` is larger, measured times mean nothing. It is 0.01 on an idle machine, 0.2 to 0.5 with
one other busy process on two CPUs, and 0.9 with eight."""


class Load:
    """The share of time in which this process was ready to run but had no CPU, because other work had them.

    Linux counts that time for every thread. The count has no delay and respects a container's quota, unlike the load
    average. It also tells a thread that waits for a CPU from one that waits for the GPU or for another thread, which a
    comparison of CPU time with wall time does not.
    """

    def __init__(self) -> None:
        self._ran = self._waited = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the time that passes in this context."""
        ran, waited = time.process_time(), _seconds_without_cpu()
        yield
        self._ran += time.process_time() - ran
        self._waited += max(_seconds_without_cpu() - waited, 0.0)  # negative if a thread has ended: its count is gone

    @property
    def without_cpu(self) -> float:
        """From 0 to 1. It is 0 if the system does not count."""
        return self._waited / max(self._ran + self._waited, 1e-9)


def _seconds_without_cpu() -> float:
    """The time that all threads together have waited for a CPU: the second number of schedstat is in nanoseconds."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return total * 1e-9
