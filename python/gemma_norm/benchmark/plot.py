"""A figure for each suite and dtype, as PNG. Needs matplotlib, which is optional."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import GATED_RMS_NORM
from .results import Result, copy_bandwidth
from .suites import SUITES

COLOURS = {
    "ours": "#d62728", "copy_": "#000000", "eager": "#7f7f7f", "F.rms_norm": "#bcbd22", "torch.compile": "#9467bd",
    "liger": "#2ca02c", "quack": "#ff7f0e", "flashinfer": "#1f77b4", "sgl_kernel": "#17becf", "vllm": "#8c564b",
    "aiter": "#e377c2", "transformer_engine": "#637939", "liger:in_place": "#98df8a", "torch.add": "#aaaaaa",
    "fla": "#17becf",
}  # fmt: skip
PANEL = (3.4, 2.8)  # inches
MOST_COLUMNS, MOST_TICKS = 7, 9


def why_not() -> str:
    """Why no plots can be made; empty if they can."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        return f"--plot needs matplotlib ({error}): pip install matplotlib"
    return ""


def write(folder: Path, facts: Mapping[str, str], results: Sequence[Result]) -> Iterator[Path]:
    """Write the figures. If a suite was measured with several numbers of threads, only the largest is shown."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    for suite, dtype in dict.fromkeys((r.suite, r.dtype) for r in results if r.p50_us):
        mine = [r for r in results if (r.suite, r.dtype) == (suite, dtype) and r.p50_us]
        mine = [r for r in mine if r.threads == max(r.threads for r in mine)]
        figure = _figure(pyplot, suite, facts, mine)
        path = folder / f"{suite}-{dtype}.png"
        figure.savefig(path, dpi=130)
        yield path
        pyplot.close(figure)


def _figure(pyplot: Any, suite: str, facts: Mapping[str, str], results: Sequence[Result]) -> Any:
    """A figure with a row of panels for each operator.

    A panel shows all providers along the axis. Points that differ in anything else have panels of their own.
    """
    axis = SUITES[suite].axis
    panels: dict[str, list[Result]] = {}
    one_size = len({r.rows * r.hidden for r in results}) == 1 or not SUITES[suite].derived
    for r in results:
        height = "" if axis != "hidden" or one_size else f", {r.rows} rows"
        panels.setdefault(_panel(r, axis) + height, []).append(r)
    operators = len({r.op for r in results})
    columns = min(math.ceil(len(panels) / operators), MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    size = (max(PANEL[0] * columns, 7.0), PANEL[1] * rows + 1.0)
    floor = copy_bandwidth(results) if axis == "hidden" else 0.0
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    for panel, (title, members) in zip(axes.flat, panels.items(), strict=False):
        _lines(panel, members, axis, floor) if axis else _bars(panel, members)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
    if axis:
        known = [panel.get_legend_handles_labels() for panel in axes.flat]
        legend = {label: line for lines, labels in known for line, label in zip(lines, labels, strict=True)}
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    threads = results[0].threads
    device = facts.get("cpu" if threads else "gpu", "unknown device") + (f", {threads} threads" if threads else "")
    commit = facts.get("commit", "unknown")[:7]
    what = f"{device}, {results[0].dtype}, torch {facts.get('torch', '?')}, commit {commit}"
    figure.suptitle(f"{suite}: {SUITES[suite].title}\n{what}", fontsize=10)
    return figure


def _panel(r: Result, axis: str) -> str:
    place = r.layout.partition(",")[0] if r.layout != "contiguous" else ""
    size = "" if axis == "hidden" else f"hidden {r.hidden}" if axis else f"{r.rows} x {r.hidden}"
    return ", ".join(part for part in (r.op, size, place) if part)


def _label(r: Result) -> str:
    return r.provider + (" (plain weight)" if r.weight == "plain" and r.op != GATED_RMS_NORM else "")


def _lines(panel: Any, results: Sequence[Result], axis: str, floor: float) -> None:
    """Plot times, or the share of the bandwidth ``floor`` (GB/s) if it is not 0."""
    for provider in dict.fromkeys(r.provider for r in results):
        mine = sorted((r for r in results if r.provider == provider), key=lambda r: int(getattr(r, axis)))
        x, y = [getattr(r, axis) for r in mine], [r.gb_per_s / floor if floor else r.p50_us for r in mine]
        colour, first = COLOURS.get(provider, "#7f7f7f"), provider == "ours"
        style = "--" if mine[0].weight == "none" else "-"
        panel.plot(
            x, y, style, color=colour, label=_label(mine[0]), marker="o", markersize=3,
            linewidth=2.2 if first else 1.2, zorder=3 if first else 2,
        )  # fmt: skip
        if not floor:
            panel.fill_between(x, [r.p20_us for r in mine], [r.p80_us for r in mine], color=colour, alpha=0.15)
    ticks = sorted({int(getattr(r, axis)) for r in results})
    if len(ticks) > MOST_TICKS:
        ticks = [t for t in ticks if t.bit_count() == 1]
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(t) for t in ticks], rotation=45 if len(ticks) > 5 else 0)
    panel.minorticks_off()
    panel.set_xlabel(axis, fontsize=8)
    what = f"share of {floor / 1000:.2f} TB/s (bytes over time)" if floor else "us a call"
    panel.set_ylabel(what, fontsize=8)
    panel.grid(True, alpha=0.3)
    if floor:
        panel.axhline(1.0, color="#000000", linewidth=0.8)
        panel.set_ylim(0, 1.1)
    else:
        ticker = importlib.import_module("matplotlib.ticker")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(ticker.NullLocator())


def _bars(panel: Any, results: Sequence[Result]) -> None:
    colours = [COLOURS.get(r.provider.partition(":")[0], "#7f7f7f") for r in results]
    bars = panel.barh([_label(r) for r in results], [r.p50_us for r in results], color=colours)
    panel.bar_label(bars, fmt="{:.1f}", fontsize=7, padding=2)
    panel.margins(x=0.15)
    panel.invert_yaxis()
    panel.set_xlabel("us a call", fontsize=8)
