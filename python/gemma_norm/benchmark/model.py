"""``python -m gemma_norm.benchmark.model``: whole models of transformers, with their own norms, Liger's and ours.

A model has random weights and the shape of a released one, with fewer layers. A step is a decoding step, one token of
each sequence after a prompt of 64, or a prefill of 64 tokens a sequence. Variants of one model share its weights, and
their samples are taken in turn in one process.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from gemma_norm._screen import Parser, columns, end_cleanly

from . import environment
from .model_run import Measured, Setting, measure, settings
from .model_shapes import NOT_BY_DEFAULT, SHAPES, VARIANTS, absent, variant_of
from .report import align, number
from .results import describe

ORIGINAL = "original"
PHASES, MODES = ("decode", "prefill"), ("eager", "graph", "compile")


@dataclass(frozen=True)
class Row:
    shape: str
    layers: int
    phase: str
    mode: str
    batch: int
    variant: str
    ms_a_step: float = 0.0
    tokens_per_s: float = 0.0
    times_original: float = 0.0
    """Tokens a second, by those of the original."""
    kernels: float = 0.0
    """GPU kernels a step."""
    gpu_ms: float = 0.0
    """The sum of their times."""
    norm_share: float = 0.0
    """The norms' part of it. In a CUDA graph our kernels alone are counted, since a replay runs no hook."""
    logits_off: float = 0.0
    """The largest difference of the last token's logits from the original's, by the largest logit."""
    same_token: float = 0.0
    """The share of sequences whose most likely next token is the original's."""
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows: list[Row] = []
    missing = {name: reason for name in options.variant if (reason := absent(name))}
    variants = [name for name in options.variant if name not in missing]
    if not variants:
        sys.exit("\n".join(f"{name} is left out: {reason}" for name, reason in missing.items()))
    facts = environment.describe([], missing, ["model"])
    facts["transformers"] = importlib.import_module("transformers").__version__
    # cuDNN's attention makes a plan for each new length of the cache, some milliseconds of host time a layer. Which
    # attention PyTorch takes hangs on the strides of q and k, hence on the norms: it would hide what they cost.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.bfloat16
    for shape in options.shape:
        model = SHAPES[shape].build(options.layers, options.device, dtype)
        models = {name: variant_of(model, name) for name in variants}
        for setting in settings([shape], options.layers, options.phase, options.mode, options.batch, options.device):
            rows += _rows(setting, measure(models, setting, options.rounds, options.steps, options.seconds))
            print(table(rows[-len(models) :]), end="\n\n", flush=True)
            if options.csv:
                write_csv(options.csv, facts, rows)
    if options.plot:
        write_plot(options.plot, facts, rows)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    return 1 if any(row.note for row in rows) else 0


def _rows(setting: Setting, results: dict[str, Measured | Exception]) -> list[Row]:
    original = results.get(ORIGINAL)
    rows = []
    for variant, result in results.items():
        place: dict[str, Any] = {
            "shape": setting.shape,
            "layers": setting.layers,
            "phase": setting.phase,
            "mode": setting.mode,
            "batch": setting.batch,
            "variant": variant,
        }
        if isinstance(result, Exception):
            rows.append(Row(**place, note=describe(result)))
            continue
        figures: dict[str, Any] = {
            "ms_a_step": round(result.milliseconds, 4),
            "tokens_per_s": round(setting.tokens / result.milliseconds * 1e3, 1),
            "kernels": round(result.kernels, 1),
            "gpu_ms": round(result.gpu_milliseconds, 4),
            "norm_share": round(result.norm_share, 4),
        }
        if isinstance(original, Measured):
            figures["times_original"] = round(original.milliseconds / result.milliseconds, 4)
            assert original.logits is not None and result.logits is not None
            off = (result.logits - original.logits).abs().max() / original.logits.abs().max()
            same = result.logits.argmax(-1) == original.logits.argmax(-1)
            figures |= {"logits_off": round(off.item(), 6), "same_token": round(same.float().mean().item(), 4)}
        rows.append(Row(**place, **figures))
    return rows


def table(rows: Sequence[Row]) -> str:
    """One setting: a line a variant."""
    first = rows[0]
    title = f"{first.shape}, {first.layers} layers, {first.phase}, {first.mode}, batch {first.batch}"
    heading = ["variant", "ms", "tokens/s", "of original", "kernels", "GPU ms", "norms", "logits off", "same token"]
    lines = [heading]
    for row in rows:
        cells = [
            number(row.ms_a_step),
            number(row.tokens_per_s),
            f"{row.times_original:.2f}x" if row.times_original else "",
            f"{row.kernels:.0f}",
            number(row.gpu_ms),
            f"{row.norm_share:.0%}" if row.norm_share else "",
            f"{row.logits_off:.2g}" if row.times_original else "",
            f"{row.same_token:.0%}" if row.times_original else "",
        ]
        lines.append([row.variant, *(cells if not row.note else [""] * len(cells))])
    notes = [f"{row.variant}: {row.note}" for row in rows if row.note]
    return "\n".join([title, "", *align(lines, 1, columns(sys.stdout)), *notes])


def write_csv(path: Path, facts: dict[str, str], rows: Iterable[Row]) -> None:
    """The environment in ``# name: value`` lines, then the table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_plot(path: Path, facts: dict[str, str], rows: Sequence[Row]) -> None:
    """A panel for each shape, phase and mode, a group of bars for each batch: tokens a second by the original's."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    panels = list(dict.fromkeys((row.shape, row.phase, row.mode) for row in rows))
    variants = [name for name in dict.fromkeys(row.variant for row in rows) if name != ORIGINAL]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for panel, place in zip(axes.flat, panels, strict=True):
        mine = [row for row in rows if (row.shape, row.phase, row.mode) == place]
        batches = sorted({row.batch for row in mine})
        for i, variant in enumerate(variants):
            values = {row.batch: row.times_original for row in mine if row.variant == variant}
            at = [j + 0.8 * (i + 0.5) / len(variants) - 0.4 for j in range(len(batches))]
            panel.bar(at, [values.get(batch, 0.0) for batch in batches], 0.8 / len(variants), label=variant)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        panel.set_title(", ".join(place), fontsize=9)
        panel.set_ylabel("tokens/s, by the original's", fontsize=8)
    labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(variants), fontsize=8, frameon=False)
    what = f"{facts.get('gpu', facts['cpu'])}, bfloat16, {rows[0].layers} layers, transformers {facts['transformers']}"
    figure.suptitle(f"{what}, torch {facts['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _parser() -> Parser:
    def some(known: Iterable[str]) -> Any:
        names = tuple(known)

        def parse(text: str) -> list[str]:
            if unknown := [part for part in text.split(",") if part not in names]:
                raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}: choose from {', '.join(names)}")
            return text.split(",")

        return parse

    def numbers(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or min(values) < 1:
            raise argparse.ArgumentTypeError(f"expected whole numbers from 1 on with commas between them, got {text!r}")
        return values

    def count(text: str) -> int:
        values = numbers(text)
        if len(values) > 1:
            raise argparse.ArgumentTypeError(f"expected one whole number, got {text!r}")
        return values[0]

    gpu = torch.cuda.is_available()
    p = Parser(prog="python -m gemma_norm.benchmark.model", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--shape", type=some(SHAPES), default=["qwen3_5-4b", "gemma3-4b"], help=", ".join(SHAPES))
    p.add_argument("--layers", type=count, default=16)
    p.add_argument("--phase", type=some(PHASES), default=["decode"], help=", ".join(PHASES))
    p.add_argument("--mode", type=some(MODES), default=["eager"], help=f"{', '.join(MODES)}; graph needs a GPU")
    p.add_argument("--batch", type=numbers, default=[1, 8, 64], metavar="N,M")
    p.add_argument(
        "--variant",
        type=some(VARIANTS),
        default=[name for name in VARIANTS if name not in NOT_BY_DEFAULT],
        help=", ".join(VARIANTS),
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--rounds", type=count, default=15, help="samples of each variant, in turn")
    p.add_argument("--steps", type=count, default=4, help="steps a sample")
    p.add_argument("--seconds", type=float, default=20.0, help="after which no more than five samples are taken")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the results, anew after every setting")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="tokens a second (needs matplotlib)")
    return p


if __name__ == "__main__":
    sys.exit(end_cleanly(main))
