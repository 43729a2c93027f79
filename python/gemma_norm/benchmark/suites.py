"""The suites: which points are measured where. A new suite is a generator of points and an entry in SUITES."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from .cases import (
    ADD_RMS_NORM,
    BACKWARD,
    BOTH,
    GATED_RMS_NORM,
    NORM_ADD_NORM,
    OPS,
    QK_NORM_ROPE,
    RMS_NORM,
    Heads,
    Point,
)
from .quantised import GATED_NORM, QUANT_OPS
from .rotation import ROTATIONS, TOKENS

LARGE = 64 * 2**20  # bytes of one tensor in the suite "forward"
FORWARD_HIDDEN = (64, 128, 256, 512, 1024, 2048, 2880, 3584, 4096, 5120, 7168, 8192, 12288, 16384, 32768, 65536, 131072)
DECODE_ROWS, DECODE_HIDDEN = (1, 2, 4, 8, 16, 32, 64, 128, 256), (2048, 4096, 5120, 8192)
CPU_ROWS, CPU_HIDDEN = (1, 16, 128, 1024, 8192), (64, 256, 576, 2048, 4096, 5120, 16384)
QK_HEADS = {
    64: (Heads("q", 32, 0, 64, 3072), Heads("k", 8, 2048, 64, 3072)),
    128: (Heads("q", 32, 0, 128, 6144), Heads("k", 8, 4096, 128, 6144)),  # Qwen3-8B
    256: (Heads("q", 16, 0, 512, 9216), Heads("k", 2, 8192, 256, 9216)),  # Qwen3-Next: each head's q, then its gate
}
QK_TOKENS = (1, 16, 256, 8192)
GATED_ROWS = {  # hidden: rows. Below 2048 a token has 32 rows (heads), otherwise one
    128: (32, 128, 512, 2048, 65536),
    256: (32, 128, 512, 2048, 65536),
    2048: (1, 16, 64, 16384),
    4096: (1, 16, 64, 8192),
    8192: (1, 16, 64, 4096),
}
NORM_ADD_HIDDEN = (1152, 2048, 2560, 3840, 5120, 5376)  # most are Gemma 3's
NORM_ADD_ROWS = (1, 4, 16, 64, 8192)
QUANT_SHAPES = ((1, 4096), (16, 4096), (64, 4096), (64, 5376), (8192, 4096), (4096, 8192))

DERIVED_OPS = (RMS_NORM, ADD_RMS_NORM, GATED_RMS_NORM)
BACKWARD_ROWS, BACKWARD_HIDDEN = (4096, 16384, 32768), (1024, 2048, 4096, 5120, 8192)
BACKWARD_FEW_ROWS, BACKWARD_FEW_HIDDEN = (1, 16, 64, 256), (2048, 4096, 8192)
MANY_SHORT_ROWS = (65536, 256)


@dataclass(frozen=True)
class Choice:
    """What the command line asks for. An empty tuple stands for the suite's own choice."""

    dtypes: tuple[torch.dtype, ...] = ()
    rows: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    quick: bool = False

    def pick(self, asked: tuple[int, ...], all_: Sequence[int], quick: Sequence[int]) -> Sequence[int]:
        return asked or (quick if self.quick else all_)


def forward(choice: Choice) -> Iterator[Point]:
    hidden_sizes = choice.pick(choice.hidden, FORWARD_HIDDEN, (256, 4096, 16384))
    for dtype, op, hidden in product(choice.dtypes or (torch.bfloat16,), OPS, hidden_sizes):
        for rows in choice.rows or (-(-LARGE // (hidden * dtype.itemsize)),):
            yield Point("forward", op, rows, hidden, dtype, "cuda", "cold")


def decode(choice: Choice) -> Iterator[Point]:
    hidden_sizes = choice.pick(choice.hidden, DECODE_HIDDEN, (4096,))
    rows = choice.pick(choice.rows, DECODE_ROWS, (1, 64))
    for dtype, op, h, r in product(choice.dtypes or (torch.bfloat16,), OPS, hidden_sizes, rows):
        yield Point("decode", op, r, h, dtype, "cuda", "hot")


def qk(choice: Choice) -> Iterator[Point]:
    """``--hidden`` selects head sizes, ``--rows`` tokens."""
    tokens = choice.pick(choice.rows, QK_TOKENS, (16, 8192))
    for dtype, (size, projections) in product(choice.dtypes or (torch.bfloat16,), QK_HEADS.items()):
        if choice.hidden and size not in choice.hidden:
            continue
        for heads, t in product(projections, tokens):
            rows = t * heads.count
            cache = "cold" if rows * size * dtype.itemsize > 4 * 2**20 else "hot"
            yield Point("qk", RMS_NORM, rows, size, dtype, "cuda", cache, heads=heads)


def gated(choice: Choice) -> Iterator[Point]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = (0,) if device == "cuda" else sorted({1, torch.get_num_threads()})
    hidden_sizes = choice.pick(choice.hidden, tuple(GATED_ROWS), (128,))
    for dtype, h, t in product(choice.dtypes or (torch.bfloat16,), hidden_sizes, threads):
        rows = GATED_ROWS.get(h, (1, 64, 8192))
        for r in choice.pick(choice.rows, rows, (rows[0], rows[-1])):
            cache = "cold" if device == "cuda" and r * h * dtype.itemsize > 4 * 2**20 else "hot"
            yield Point("gated", GATED_RMS_NORM, r, h, dtype, device, cache, t)


def norm_add(choice: Choice) -> Iterator[Point]:
    """The norm of x, the addition and the norm of the sum, and what one norm with its addition takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = (0,) if device == "cuda" else sorted({1, torch.get_num_threads()})
    shapes = product(
        choice.pick(choice.hidden, NORM_ADD_HIDDEN, (2560,)), choice.pick(choice.rows, NORM_ADD_ROWS, (1, 64))
    )
    for dtype, (h, r), op, t in product(
        choice.dtypes or (torch.bfloat16,), shapes, (NORM_ADD_NORM, ADD_RMS_NORM), threads
    ):
        cache = "cold" if device == "cuda" and r * h * dtype.itemsize > 4 * 2**20 else "hot"
        yield Point("norm-add", op, r, h, dtype, device, cache, t)


def qk_rope(choice: Choice) -> Iterator[Point]:
    """``--hidden`` selects head sizes, ``--rows`` tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = (0,) if device == "cuda" else sorted({1, torch.get_num_threads()})
    tokens = choice.pick(choice.rows, TOKENS, (1, 64))
    for dtype, r, t, n in product(choice.dtypes or (torch.bfloat16,), ROTATIONS, threads, tokens):
        if choice.hidden and r.size not in choice.hidden:
            continue
        rows = n * r.heads
        cache = "cold" if device == "cuda" and rows * r.size * dtype.itemsize > 4 * 2**20 else "hot"
        yield Point("qk-rope", QK_NORM_ROPE, rows, r.size, dtype, device, cache, t, rotation=r)


def quant(choice: Choice) -> Iterator[Point]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = (0,) if device == "cuda" else sorted({1, torch.get_num_threads()})
    shapes: Sequence[tuple[int, int]] = ((1, 4096), (64, 4096)) if choice.quick else QUANT_SHAPES
    if choice.rows or choice.hidden:
        shapes = list(product(choice.rows or (1, 64, 8192), choice.hidden or (4096,)))
    points = [(shape, op) for shape in shapes for op in QUANT_OPS if op != GATED_NORM]
    if choice.rows or not choice.hidden:
        points += [((r, 128), GATED_NORM) for r in (choice.rows or (32, 2048, 262144)[: 2 if choice.quick else 3])]
    for dtype, ((r, h), op), t in product(choice.dtypes or (torch.bfloat16,), points, threads):
        cache = "cold" if device == "cuda" and r * h * dtype.itemsize > 4 * 2**20 else "hot"
        yield Point("quant", op, r, h, dtype, device, cache, t)


def host(choice: Choice) -> Iterator[Point]:
    """Calls with so little work that the GPU is never behind, so that they take the host's time.

    On the CPU, it is the time of the whole call.
    """
    gpu = torch.cuda.is_available()
    hidden_sizes = choice.pick(choice.hidden, (2048, 4096), (4096,))
    for dtype, op, h, r in product(choice.dtypes or (torch.bfloat16,), OPS, hidden_sizes, choice.rows or (1,)):
        yield Point("host", op, r, h, dtype, "cuda" if gpu else "cpu", threads=0 if gpu else torch.get_num_threads())


def cpu(choice: Choice) -> Iterator[Point]:
    hidden_sizes = choice.pick(choice.hidden, CPU_HIDDEN, (256, 4096))
    shapes = list(product(choice.pick(choice.rows, CPU_ROWS, (1, 128)), hidden_sizes))
    if not (choice.quick or choice.rows or choice.hidden):
        shapes.append((65536, 256))
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.quick else (torch.bfloat16, torch.float32))
    threads = sorted({1, torch.get_num_threads()})
    for dtype, op, (r, h), t in product(dtypes, (RMS_NORM, ADD_RMS_NORM), shapes, threads):
        yield Point("cpu", op, r, h, dtype, "cpu", threads=t)


def backward(choice: Choice) -> Iterator[Point]:
    hidden_sizes = choice.pick(choice.hidden, BACKWARD_HIDDEN, (1024, 4096))
    shapes = list(product(choice.pick(choice.rows, BACKWARD_ROWS, (4096,)), hidden_sizes))
    if not (choice.quick or choice.rows or choice.hidden):
        shapes.append(MANY_SHORT_ROWS)
    for dtype, op, (r, h) in product(choice.dtypes or (torch.bfloat16,), DERIVED_OPS, shapes):
        yield Point("backward", op, r, h, dtype, "cuda", "cold", work=BACKWARD)


def backward_few(choice: Choice) -> Iterator[Point]:
    hidden_sizes = choice.pick(choice.hidden, BACKWARD_FEW_HIDDEN, (4096,))
    rows = choice.pick(choice.rows, BACKWARD_FEW_ROWS, (1, 64))
    for dtype, op, h, r in product(choice.dtypes or (torch.bfloat16,), DERIVED_OPS, hidden_sizes, rows):
        yield Point("backward-few", op, r, h, dtype, "cuda", "warm", work=BACKWARD)


def backward_cpu(choice: Choice) -> Iterator[Point]:
    rows = choice.pick(choice.rows, (*BACKWARD_FEW_ROWS, 1024, 8192), (1, 64))
    shapes = list(product(rows, choice.hidden or (4096,)))
    if not (choice.quick or choice.rows or choice.hidden):
        shapes.append(MANY_SHORT_ROWS)
    dtypes = choice.dtypes or ((torch.bfloat16,) if choice.quick else (torch.bfloat16, torch.float32))
    threads = sorted({1, torch.get_num_threads()})
    for dtype, op, (r, h), t in product(dtypes, DERIVED_OPS, shapes, threads):
        yield Point("backward-cpu", op, r, h, dtype, "cpu", threads=t, work=BACKWARD)


def train_host(choice: Choice) -> Iterator[Point]:
    """As :func:`host`, the forward and the backward pass."""
    gpu = torch.cuda.is_available()
    hidden_sizes = choice.pick(choice.hidden, (2048, 4096), (4096,))
    for dtype, op, h, r in product(choice.dtypes or (torch.bfloat16,), OPS, hidden_sizes, choice.rows or (16,)):
        threads = 0 if gpu else torch.get_num_threads()
        yield Point("train-host", op, r, h, dtype, "cuda" if gpu else "cpu", threads=threads, work=BOTH)


@dataclass(frozen=True)
class Suite:
    points: Callable[[Choice], Iterator[Point]]
    title: str
    axis: str = "rows"
    """What plots have on the x axis; if empty, they show bars."""
    needs_gpu: bool = True
    hidden: tuple[int, ...] = ()
    """The only hidden sizes that are possible; if empty, all are."""
    host: bool = False
    """Whether it is the host's time that is measured, of which no bandwidth follows."""
    derived: bool = False
    """Whether derivatives are measured. Such a suite runs only if it is asked for."""


SUITES = {
    "forward": Suite(forward, "large tensors, cold: buffer sets rotate past the caches, in CUDA graphs", "hidden"),
    "decode": Suite(
        decode, "few rows, hot: successive nodes of a CUDA graph (programmatic dependent launch may overlap them)"
    ),
    "qk": Suite(
        qk, "query and key heads read in place from a fused qkv (+ gate) buffer, in CUDA graphs", hidden=tuple(QK_HEADS)
    ),
    "gated": Suite(gated, "norm times silu(gate), on a GPU in CUDA graphs", needs_gpu=False),
    "norm-add": Suite(
        norm_add,
        "norm, residual addition and norm as between the blocks of Gemma 3, beside an addition and one norm",
        needs_gpu=False,
    ),
    "qk-rope": Suite(
        qk_rope,
        "the norms and the rotation of query and key heads, on a GPU in CUDA graphs",
        needs_gpu=False,
        hidden=tuple(dict.fromkeys(r.size for r in ROTATIONS)),
    ),
    "quant": Suite(quant, "norms quantised to float8_e4m3fn, on a GPU in CUDA graphs", "rows", needs_gpu=False),
    "host": Suite(host, "host time of one call from Python", "", needs_gpu=False, host=True),
    "cpu": Suite(cpu, "CPU, wall-clock time of one call from Python", needs_gpu=False),
    "backward": Suite(backward, "the backward pass alone, cold, in CUDA graphs", "hidden", derived=True),
    "backward-few": Suite(
        backward_few,
        "the backward pass of few rows, in CUDA graphs that rotate through 16 sets of buffers",
        derived=True,
    ),
    "backward-cpu": Suite(
        backward_cpu, "CPU, the backward pass, wall-clock time from Python", needs_gpu=False, derived=True
    ),
    "train-host": Suite(
        train_host, "host time of a forward and a backward pass", "", needs_gpu=False, host=True, derived=True
    ),
}
