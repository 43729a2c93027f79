"""The speed table of ``python -m gemma_norm``: ours beside what PyTorch offers, at the sizes of Qwen3.5."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import rms_norm as ops

EPS = 1e-6
HEADS = 24
SIZES = (
    (256, False),
    (2048, False),
    (4096, False),
    (5120, False),
    (2048, True),
    (4096, True),
    (5120, True),
)  # with add
COLUMNS = ("gemma_norm", "eager", "F.rms_norm", "torch.compile")
SECONDS_A_CELL = 0.1

Call = Callable[[], object]


@dataclass
class Row:
    device: str
    op: str
    shape: str
    microseconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why a column has no number."""


def eager(x: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face and SGLang write it."""
    s = x.float()
    s = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS)
    return (s * (1.0 + weight.float())).type_as(x)


def eager_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return eager(residual, weight), residual


def measure(device: str, deadline: float, progress: Callable[[str], None]) -> Iterator[Row]:
    """A row of the table at a time. Once ``time.monotonic()`` passes ``deadline``, nothing more is compiled."""
    many = 8192 if device.startswith("cuda") else 256
    for hidden, add in SIZES:
        torch._dynamo.reset()
        compiled = torch.compile(eager_add if add else eager, dynamic=True)
        for rows in (1, many):
            shape = (rows, HEADS, hidden) if hidden == 256 else (rows, hidden)
            op = "add + rms_norm" if add else "q/k rms_norm" if hidden == 256 else "rms_norm"
            row = Row(device, op, " x ".join(map(str, shape)))
            for column, call in _calls(shape, device, add, compiled).items():
                progress(f"timing {row.op} {row.shape} on {device}: {column}")
                if column == "torch.compile" and time.monotonic() > deadline:
                    row.failures[column] = "not compiled: the minute is nearly over"
                    continue
                try:
                    row.microseconds[column] = _time(call, device)
                except Exception as error:  # whatever a compiler says, it belongs in its cell
                    row.failures[column] = _summary(error)
            yield row


def _calls(shape: tuple[int, ...], device: str, add: bool, compiled: Callable[..., object]) -> dict[str, Call]:
    x, residual = (torch.randn(shape).to(device, torch.bfloat16) for _ in range(2))
    weight = (torch.randn(shape[-1]) / 10).to(device, torch.bfloat16)
    one_plus_weight, size = 1 + weight, (shape[-1],)
    if len(shape) == 3:  # q lies between k and v in a fused buffer
        x = x.repeat(1, 2, 1)[:, : shape[1]]
    if add:
        y, s = x.clone(), residual.clone()
        return {
            "gemma_norm": lambda: ops.fused_add_rms_norm(y, s, weight, EPS, True),
            "eager": lambda: eager_add(x, residual, weight),
            "F.rms_norm": lambda: F.rms_norm(x + residual, size, one_plus_weight, EPS),
            "torch.compile": lambda: compiled(x, residual, weight),
        }
    return {
        "gemma_norm": lambda: ops.rms_norm(x, weight, EPS, True),
        "eager": lambda: eager(x, weight),
        "F.rms_norm": lambda: F.rms_norm(x, size, one_plus_weight, EPS),
        "torch.compile": lambda: compiled(x, weight),
    }


def _time(call: Call, device: str) -> float:
    """Microseconds a call, back to back: the best of a few batches, which other work disturbs least."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def batch(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls

    with torch.no_grad():
        batch(1)  # compiles
        best = batch(2)
        end = time.perf_counter() + SECONDS_A_CELL
        while time.perf_counter() < end:
            best = min(best, batch(max(1, min(2_000, int(SECONDS_A_CELL / 10 / best)))))
        return best * 1e6


def _summary(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
