"""What the tests share: inputs, layouts whose gaps are watched, and comparisons."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import pytest
import torch
from torch import Tensor

from gemma_norm import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SENTINEL = 77.0  # exact in every dtype

Shape = tuple[int, ...]


@contextmanager
def warnings_are(action: Literal["error", "ignore"]) -> Iterator[None]:
    """warnings.catch_warnings(action=...), which Python 3.10 lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_weight(hidden: int, dtype: torch.dtype, device: str, gemma: bool) -> Tensor:
    """A zero-centred weight is near zero, so that without ``1 +`` next to nothing would be left of the result."""
    return (randn(hidden, device=device, seed=99) * (0.05 if gemma else 1)).to(dtype)


class Placed:
    """A tensor with given values and strides, in a buffer whose other elements are watched."""

    def __init__(self, values: Tensor, strides: Shape, offset: int = 0) -> None:
        self.layout = (values.shape, strides, offset)
        size = offset + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) + 64
        self.base = torch.full((size,), SENTINEL, dtype=values.dtype, device=values.device)
        self.view = self.base.as_strided(*self.layout)
        self.view.copy_(values)

    def assert_gaps_intact(self) -> None:
        gaps = torch.ones(self.base.shape, dtype=torch.bool, device=self.base.device)
        gaps.as_strided(*self.layout).fill_(False)
        assert bool((self.base[gaps] == SENTINEL).all()), (
            "an element of the buffer that is not the tensor's was written"
        )


# How [tokens, heads, head_dim] may lie in memory: (strides, offset), all in elements.
LAYOUTS: dict[str, Callable[[int, int, int], tuple[Shape, int]]] = {
    "contiguous": lambda t, h, d: ((h * d, d, 1), 0),
    "offset 1": lambda t, h, d: ((h * d, d, 1), 1),
    "offset 3": lambda t, h, d: ((h * d, d, 1), 3),
    "padded rows": lambda t, h, d: ((h * (d + 5), d + 5, 1), 0),
    "aligned slice of qkv": lambda t, h, d: ((3 * h * d, d, 1), h * d),
    "q of interleaved q and gate": lambda t, h, d: ((2 * h * d, 2 * d, 1), 0),
    "two odd strides": lambda t, h, d: ((h * (d + 3) + 11, d + 3, 1), 2),
    "heads before tokens": lambda t, h, d: ((d, t * d, 1), 0),
}


def place(values: Tensor, layout: str) -> Placed:
    return Placed(values, *LAYOUTS[layout](*values.shape))


def bits(t: Tensor) -> Tensor:
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(as_integers[t.dtype.itemsize])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    differing = int((bits(a) != bits(b)).sum())
    assert differing == 0, f"{differing} of {a.numel()} elements differ"


def assert_right(y: Tensor, s: Tensor, weight: Tensor, eps: float = 1e-6, gemma: bool = False) -> None:
    """y is rms_norm(s), within the error that docs/contract.md allows."""
    assert y.dtype == s.dtype and y.shape == s.shape
    error = reference.ulp_error(y, reference.oracle(s, weight, eps, gemma))
    limit = reference.max_ulp_error(y.dtype, y.shape[-1])
    assert error <= limit, f"off by {error:.4f} units in the last place, {limit:.4f} allowed"


def on_a_terminal(
    *arguments: str, columns: int = 80, interrupt_at: str = "", environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and output of ``python *arguments`` on a terminal; Ctrl-C once the output has ``interrupt_at``."""
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"needs a pseudo-terminal ({error}): mount -t devpts devpts /dev/pts")
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {"TERM": "xterm", **(environment or {k: v for k, v in os.environ.items() if k != "TERM"})}
    with subprocess.Popen([sys.executable, *arguments], stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        text = ""
        while True:
            try:
                chunk = os.read(ours, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
            if interrupt_at and interrupt_at in text:
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
    os.close(ours)
    return process.returncode, text


def shown(text: str) -> list[str]:
    """The lines that ``text`` leaves on a terminal that is wide enough for all of it."""
    lines = []
    for line in re.sub(r"\x1b\[\d*m", "", text).split("\r\n"):
        lines.append(line.rpartition("\r\x1b[K")[2])
    return lines
