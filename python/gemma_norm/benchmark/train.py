"""``python -m gemma_norm.benchmark.train``: a small decoder trained with norms of several makes.

Every variant has the same weights at the start and sees the same text. First come the losses: in float32 of one seed,
step by step beside eager PyTorch's; in bfloat16 of several seeds, whose final losses have a mean and a spread. Then, in
bfloat16 at a larger size, the time of a step and the peak of the memory.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemma_norm._screen import Parser, columns, end_cleanly

from . import environment
from .report import align, number
from .results import describe
from .train_model import NORMS, Size, Text, build

EAGER, CONTROL = "eager", "float64"
LAST = 20
"""The final loss is the mean of so many last steps: one step's depends on its batch."""
LEARNING_RATE, WARM_UP, LARGEST_GRADIENT, ADAM_EPS = 1e-3, 40, 1.0, 1e-5
"""AdamW divides a gradient by its size. With its usual eps, and from the first step at full rate, a gradient that is
all but 0 moves a weight as far as any other, in a direction that a rounding decides."""
cuda: Any = torch.cuda  # partly without types


@dataclass(frozen=True)
class Row:
    what: str
    """The dtype of a comparison of losses, or "a step"."""
    variant: str
    seeds: int = 0
    final_loss: float = 0.0
    """The mean over the seeds."""
    spread: float = 0.0
    """The standard deviation over the seeds."""
    from_eager: float = 0.0
    """The mean, over the seeds, of the final loss minus eager PyTorch's of the same seed."""
    error_of_that: float = 0.0
    """The standard error of that mean. If the makes are alike, the mean is seldom more than two of them from 0."""
    largest_difference: float = 0.0
    """Of a step's loss from eager PyTorch's, over all steps and seeds."""
    ms_a_step: float = 0.0
    times_eager: float = 0.0
    """Steps a second, by eager PyTorch's."""
    peak_mib: float = 0.0
    """Of the memory that PyTorch's GPU allocator gives out, parameters and optimizer included; 0 on a CPU."""
    note: str = ""


Losses = dict[tuple[str, int, str], list[float]]
"""By dtype, seed and variant."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    missing = {name: reason for name in options.variant if (reason := absent(name, options.device))}
    variants = [name for name in options.variant if name not in missing]
    facts = environment.describe([], missing, ["train"])
    tiny = Size(options.hidden, options.layers, options.head, options.batch, options.length)
    facts["model"] = f"{tiny}, {options.steps} steps, AdamW, learning rate {LEARNING_RATE} after {WARM_UP} steps"
    rows: list[Row] = []
    losses: Losses = {}
    for dtype, seeds in ((torch.float32, 1), (torch.bfloat16, options.seeds)):
        # float64 inside says how far rounding alone goes in float32. In bfloat16 the seeds say it.
        compared = [name for name in variants if name != CONTROL or dtype == torch.float32]
        rows += _compare(compared, tiny, seeds, options, dtype, losses)
        _report(options, facts, rows, losses)
    large = Size(options.step_hidden, options.layers, 128, options.step_batch, 256)
    size = large if options.device == "cuda" else tiny
    facts["model of a step"] = str(size)
    rows += _steps([name for name in variants if name != CONTROL], size, options)
    _report(options, facts, rows, losses)
    for what in dict.fromkeys(row.what for row in rows):
        print(table([row for row in rows if row.what == what]), end="\n\n")
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    return 1 if any(row.note for row in rows) else 0


def absent(variant: str, device: str) -> str:
    """Why a variant cannot be had; empty where it can."""
    if variant != "liger":
        return ""
    try:
        importlib.import_module("liger_kernel.ops")
    except Exception as error:  # a library may fail in any way where its device, driver or dependency is missing
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if device == "cuda" else "its kernels need a GPU"


class Run:
    """A variant that is being trained. Each call is a step, and returns its loss as a tensor."""

    def __init__(self, variant: str, size: Size, seed: int, device: str, dtype: torch.dtype) -> None:
        self.model = build(size, NORMS[variant], seed, device, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, eps=ADAM_EPS)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.model(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.rate.step()
        return loss.detach()


def _compare(
    variants: Sequence[str], size: Size, seeds: int, options: argparse.Namespace, dtype: torch.dtype, losses: Losses
) -> list[Row]:
    name = str(dtype).removeprefix("torch.")
    failed: dict[str, str] = {}
    for seed in range(seeds):
        text = Text(size, seed + 1)
        batches = [text.batch().to(options.device) for _ in range(options.steps)]
        for variant in variants:
            if variant in failed:
                continue
            try:
                run = Run(variant, size, seed, options.device, dtype)
                losses[name, seed, variant] = torch.stack([run(batch) for batch in batches]).tolist()
            except Exception as error:
                failed[variant] = describe(error)
    return [_row(name, variant, seeds, losses, failed.get(variant, "")) for variant in variants]


def _row(dtype: str, variant: str, seeds: int, losses: Losses, note: str) -> Row:
    if note:
        return Row(dtype, variant, note=note)
    mine = [losses[dtype, seed, variant] for seed in range(seeds)]
    final = [statistics.mean(run[-LAST:]) for run in mine]
    spread = statistics.stdev(final) if seeds > 1 else 0.0
    row: dict[str, Any] = {"seeds": seeds, "final_loss": statistics.mean(final), "spread": spread}
    if all((dtype, seed, EAGER) in losses for seed in range(seeds)):
        eager = [losses[dtype, seed, EAGER] for seed in range(seeds)]
        apart = [a - statistics.mean(run[-LAST:]) for a, run in zip(final, eager, strict=True)]
        row["from_eager"] = statistics.mean(apart)
        row["error_of_that"] = statistics.stdev(apart) / seeds**0.5 if seeds > 1 else 0.0
        steps = [abs(a - b) for run, other in zip(mine, eager, strict=True) for a, b in zip(run, other, strict=True)]
        row["largest_difference"] = max(steps)
    return Row(dtype, variant, **row)


def _steps(variants: Sequence[str], size: Size, options: argparse.Namespace) -> list[Row]:
    """Time and memory. The memory is measured with one variant alone; then samples of all are taken in turn."""
    tokens = Text(size, 1).batch().to(options.device)
    gpu = options.device == "cuda"
    synchronize: Callable[[], None] = cuda.synchronize if gpu else lambda: None
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    for variant in variants if gpu else ():
        try:
            run = Run(variant, size, 0, "cuda", torch.bfloat16)
            for _ in range(2):  # the optimizer's state and the workspaces come with the first
                run(tokens)
            cuda.reset_peak_memory_stats()
            run(tokens)
            peaks[variant] = cuda.max_memory_allocated() / 2**20
        except Exception as error:
            failed[variant] = describe(error)
        run = None  # type: ignore[assignment]
        gc.collect()
        cuda.empty_cache()
    ready: dict[str, Run] = {}
    for variant in variants:
        try:
            if variant not in failed:
                ready[variant] = Run(variant, size, 0, options.device, torch.bfloat16)
                for _ in range(2):
                    ready[variant](tokens)
        except Exception as error:
            ready.pop(variant, None)
            failed[variant] = describe(error)
    samples: dict[str, list[float]] = {variant: [] for variant in ready}
    gc.collect()
    gc.disable()
    try:
        for _ in range(options.rounds):
            for variant, run in ready.items():
                synchronize()
                start = time.perf_counter()
                for _ in range(options.steps_a_sample):
                    run(tokens)
                synchronize()
                samples[variant].append((time.perf_counter() - start) * 1e3 / options.steps_a_sample)
    finally:
        gc.enable()
    times = {variant: statistics.median(values) for variant, values in samples.items()}
    return list(_step_rows(variants, times, peaks, failed))


def _step_rows(
    variants: Sequence[str], times: dict[str, float], peaks: dict[str, float], failed: dict[str, str]
) -> Iterator[Row]:
    for variant in variants:
        if variant in failed:
            yield Row("a step", variant, note=failed[variant])
            continue
        gain = times[EAGER] / times[variant] if EAGER in times else 0.0
        yield Row("a step", variant, ms_a_step=times[variant], times_eager=gain, peak_mib=peaks.get(variant, 0.0))


def table(rows: Sequence[Row]) -> str:
    what = rows[0].what
    if what == "a step":
        lines = [["variant", "ms a step", "of eager", "peak MiB"]]
        cells = [
            [number(r.ms_a_step), f"{r.times_eager:.2f}x" if r.times_eager else "", f"{r.peak_mib:.0f}"] for r in rows
        ]
        title = "a step in bfloat16, forward, backward and AdamW"
    else:
        lines = [["variant", "final loss", "spread", "from eager", "error of that", "largest difference"]]
        cells = [
            [f"{r.final_loss:.4f}", f"{r.spread:.4f}", f"{r.from_eager:+.5f}", f"{r.error_of_that:.5f}",
             f"{r.largest_difference:.3g}"]
            for r in rows
        ]  # fmt: skip
        title = f"losses in {what}, {max(r.seeds for r in rows)} seeds"
    for r, figures in zip(rows, cells, strict=True):
        lines.append([r.variant, *(figures if not r.note else [""] * len(figures))])
    notes = [f"{r.variant}: {r.note}" for r in rows if r.note]
    return "\n".join([title, "", *align(lines, 1, columns(sys.stdout)), *notes])


def _report(options: argparse.Namespace, facts: dict[str, str], rows: Sequence[Row], losses: Losses) -> None:
    """Write the files anew, so that a run that is stopped leaves what it has."""
    if options.csv:
        written = [{k: round(v, 7) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
        _write(options.csv, facts, [f.name for f in fields(Row)], [list(row.values()) for row in written])
    if options.losses:
        lines = [[*key, i, round(loss, 7)] for key, run in losses.items() for i, loss in enumerate(run)]
        _write(options.losses, facts, ["dtype", "seed", "variant", "step", "loss"], lines)


def _write(path: Path, facts: dict[str, str], heading: list[str], lines: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        csv.writer(file, lineterminator="\n").writerows([heading, *lines])


def _parser() -> Parser:
    def variants(text: str) -> list[str]:
        if unknown := [part for part in text.split(",") if part not in NORMS]:
            raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}: choose from {', '.join(NORMS)}")
        return text.split(",")

    def count(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text)):
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
        return int(text)

    gpu = torch.cuda.is_available()
    p = Parser(prog="python -m gemma_norm.benchmark.train", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--variant", type=variants, default=list(NORMS), help=", ".join(NORMS))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--steps", type=count, default=200)
    p.add_argument("--seeds", type=count, default=5, help="in bfloat16")
    for name, value in asdict(Size()).items():
        p.add_argument(f"--{name}", type=count, default=value, help="of the small model")
    p.add_argument("--step-hidden", type=count, default=2048, help="of the model whose step is timed on a GPU")
    p.add_argument("--step-batch", type=count, default=32, help="of its batch, 256 tokens a sequence")
    p.add_argument("--rounds", type=count, default=15, help="samples of each variant, in turn")
    p.add_argument("--steps-a-sample", type=count, default=3)
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the table, anew after every part")
    p.add_argument("--losses", type=Path, metavar="FILE.csv", help="write the loss of every step")
    return p


if __name__ == "__main__":
    sys.exit(end_cleanly(main))
