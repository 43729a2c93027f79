"""The speed table of ``python -m gemma_norm``: gemma_norm and what PyTorch offers, at the sizes of Qwen3.5."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._load import Load
from ._ops import rms_norm as ops

EPS = 1e-6
HEADS = 24
# (hidden, whether the residual is added)
SIZES = (
    (256, False),
    (2048, False),
    (4096, False),
    (5120, False),
    (2048, True),
    (4096, True),
    (5120, True),
)
COMPILED = "torch.compile"
COLUMNS = ("gemma_norm", "eager", "F.rms_norm", COMPILED)
SECONDS_A_CELL = 0.1
TURNS = 5
BATCH_SECONDS = {"cpu": 5e-4, "cuda": 1e-2}
"""How long a batch of calls takes. On the CPU it is shorter than the few milliseconds for which another process takes a
core, so that some batches are undisturbed. On a GPU it is so long that waiting for its end does not matter."""

Call = Callable[[], object]


@dataclass
class Row:
    op: str
    shape: str
    microseconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """For a column without a number, the reason."""


@dataclass
class Case:
    """The calls that a row of the table times."""

    device: str
    hidden: int
    rows: int
    add: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, HEADS, self.hidden) if self.hidden == 256 else (self.rows, self.hidden)

    def row(self) -> Row:
        op = "add + rms_norm" if self.add else "q/k rms_norm" if self.hidden == 256 else "rms_norm"
        return Row(op, " x ".join(map(str, self.shape)))

    def inputs(self) -> tuple[Tensor, ...]:
        """x, the residual if one is added, and the weight."""
        x, *residual = (torch.randn(self.shape).to(self.device, torch.bfloat16) for _ in range(1 + self.add))
        if len(self.shape) == 3:  # heads, which are a slice of a fused buffer
            x = x.repeat(1, 2, 1)[:, : self.shape[1]]
        return x, *residual, (torch.randn(self.hidden) / 10).to(self.device, torch.bfloat16)

    def calls(self) -> dict[str, Call]:
        inputs = self.inputs()
        x, weight = inputs[0], inputs[-1]
        size, one_plus_weight = (self.hidden,), 1 + weight
        if self.add:
            residual, y, s = inputs[1], x.clone(), inputs[1].clone()
            return {
                "gemma_norm": lambda: ops.fused_add_rms_norm(y, s, weight, EPS, True),
                "eager": lambda: eager_add(x, residual, weight),
                "F.rms_norm": lambda: F.rms_norm(x + residual, size, one_plus_weight, EPS),
            }
        return {
            "gemma_norm": lambda: ops.rms_norm(x, weight, EPS, True),
            "eager": lambda: eager(x, weight),
            "F.rms_norm": lambda: F.rms_norm(x, size, one_plus_weight, EPS),
        }


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as the models of Hugging Face and SGLang compute it."""
    s = x.float()
    s = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS)
    return (s * (1.0 + weight.float())).type_as(x)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return eager(residual, weight), residual


def measure(device: str, start: float, end: float, progress: Callable[[str], None]) -> tuple[list[Row], Load]:
    """The rows of the table. The program began at ``start`` and should end by ``end``, in ``time.monotonic()``.

    torch.compile's column comes last. A compilation cannot be stopped, so none is begun if less time is left than the
    longest one took so far. The first is expected to take as long as everything before it: that is about right on an
    idle machine, and a busy one slows both down equally.
    """
    many = 8192 if device.startswith("cuda") else 256
    cases = [Case(device, hidden, rows, add) for hidden, add in SIZES for rows in (1, many)]
    table = [case.row() for case in cases]
    load = Load()
    for row, case in zip(table, cases, strict=True):
        progress(f"timing {row.op} {row.shape} on {device}")
        if time.monotonic() > end:
            row.failures |= dict.fromkeys(COLUMNS, "not timed: the minute is nearly over")
        else:
            _time(row, case.calls(), device, load)
    expected, longest = time.monotonic() - start, 0.0
    for row, case in zip(table, cases, strict=True):
        before = time.monotonic()
        if before + expected > end:
            row.failures.setdefault(COMPILED, "not compiled: the minute is nearly over")
            continue
        progress(f"timing {row.op} {row.shape} on {device}: {COMPILED}")
        if case.rows == 1:  # PyTorch compiles it again for the first case with many rows, and not after that
            torch._dynamo.reset()
            compiled = torch.compile(eager_add if case.add else eager, dynamic=True)
        _time(row, {COMPILED: partial(compiled, *case.inputs())}, device, load)
        expected = longest = max(longest, time.monotonic() - before)
    return table, load


def _time(row: Row, calls: dict[str, Call], device: str, load: Load) -> None:
    """Fill ``row`` with the microseconds of a call in a batch of many, from the batch that other work disturbed least.

    The columns take turns, so that a spell of other work affects all of them.
    """
    kind = torch.device(device).type
    wait: Callable[[], None] = torch.cuda.synchronize if kind == "cuda" else lambda: None

    def batch(call: Call, count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    def first(column: str) -> float:
        batch(calls[column], 1)  # compiles
        return batch(calls[column], 2)

    def turn(column: str) -> float:
        best, end = row.microseconds[column] * 1e-6, time.perf_counter() + SECONDS_A_CELL / TURNS
        while time.perf_counter() < end:
            best = min(best, batch(calls[column], max(1, min(2_000, int(BATCH_SECONDS[kind] / best)))))
        return best

    def record(column: str, measured: Callable[[str], float]) -> None:
        try:
            row.microseconds[column] = measured(column) * 1e6
        except Exception as error:  # compilers raise any kind; the cell shows what happened
            row.failures[column] = _summary(error)

    with torch.no_grad():
        for column in calls:
            record(column, first)
        end = time.perf_counter() + SECONDS_A_CELL * len(calls)
        with load.watch():
            for _ in range(TURNS):
                for column in calls:
                    if column not in row.failures and time.perf_counter() < end:
                        record(column, turn)


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
