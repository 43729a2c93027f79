"""A lock between the processes and threads that run tests: `make test-python` starts several processes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process, and in it one thread, is in here with this path at a time. The file is made, and stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # flock() holds for what open() returned, so it also keeps threads apart
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
