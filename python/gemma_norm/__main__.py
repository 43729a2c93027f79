"""``python -m gemma_norm``: shows what is installed, checks it and times it. Exits with status 1 if a check fails."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__, _checkup, _load, _speed, libraries
from ._checks import DTYPES
from ._checks_shared import dtype_name
from ._screen import Parser, Screen, end_cleanly

SECONDS = 50
"""The command is to take a minute, and importing PyTorch takes some of it. After this time nothing more is timed."""


def main(arguments: list[str] | None = None) -> int:
    description = "Show, check and time this installation of gemma_norm."
    parser = Parser(prog="python -m gemma_norm", description=description)
    parser.add_argument("--skip-speed", action="store_true", help="leave the speed table out")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    screen = Screen()
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    screen.title(f"gemma_norm {__version__}", f"PyTorch {torch.__version__}, {machine}")
    healthy = show_installation(screen)
    healthy = show_checks(screen) and healthy
    if not options.skip_speed:
        show_speed(screen, start, start + SECONDS)
    screen.print(screen.dim(f"{time.monotonic() - start:.0f} s"))
    return 0 if healthy else 1


def show_installation(screen: Screen) -> bool:
    rows = [["library", "", "compiler", "GPU architectures"]]
    notes: dict[str, Callable[[str], str]] = {}
    healthy = True
    for library in libraries().values():
        state = screen.good("loaded") if library.loaded else screen.dim("not loaded" if library.built else "not built")
        rows.append([library.name, state, library.compiler, " ".join(library.architectures)])
        if library.built and library.reason:
            notes[library.reason] = screen.dim
        works = bool(library.served_devices) or not library.unsupported_devices
        notes |= dict.fromkeys(library.unsupported_devices, screen.dim if works else screen.bad)
        healthy = healthy and works
        if library.loaded:
            notes[f"{library.name}: {library.path}"] = screen.dim
    screen.table(rows, left=4)
    for note, paint in notes.items():
        screen.note(note, paint)
    screen.print()
    screen.table([["device", ""], *([device, _device_name(device)] for device in _checkup.devices())], left=2)
    screen.print()
    return healthy


def show_checks(screen: Screen) -> bool:
    results = list(_checkup.check(screen.progress))
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    rows = [["largest error, ulp", "device", *dtypes]]
    for op, device in dict.fromkeys((result.op, result.device) for result in results):
        mine = [result for result in results if (result.op, result.device) == (op, device)]
        cells = (screen.bad("wrong") if r.failure else f"{r.error:.3f} {screen.good('ok')}" for r in mine)
        rows.append([op, device, *cells])
    screen.table(rows, left=2)
    sizes = ", ".join(map(str, sorted(_checkup.HIDDEN)))
    screen.note(f"against float64; 0.5 is a correctly rounded result; hidden sizes {sizes}, gemma on and off")
    screen.print()
    failed = [result for result in results if result.failure]
    for result in failed:
        screen.note(f"{result.op}, {dtype_name(result.dtype)}, {result.device}: {result.failure}", screen.bad)
    if failed:
        screen.print()
    return not failed


def show_speed(screen: Screen, start: float, end: float) -> None:
    reasons: dict[str, str] = {}
    device = _checkup.devices()[:2][-1]  # the first GPU, or the CPU
    table, load = _speed.measure(device, start, end, screen.progress)
    rows = [[f"microseconds on {device}", "shape", *_speed.COLUMNS]]
    for row in table:
        cells = []
        for column in _speed.COLUMNS:
            if column in row.failures:
                mark = reasons.setdefault(row.failures[column], f"[{len(reasons) + 1}]")
                cells.append(screen.dim(f"- {mark}"))
            else:
                cells.append(_number(row.microseconds[column]))
        cells[0] = screen.bold(cells[0])
        rows.append([row.op, row.shape, *cells])
    screen.table(rows, left=2, keys=2)
    for reason, mark in reasons.items():
        screen.note(f"{mark} {reason}")
    screen.note("bfloat16, zero-centred weight; per call, back to back; F.rms_norm is given 1 + weight ready made")
    if load.without_cpu > _load.TOO_BUSY:
        screen.note(_busy(load), screen.bad)
    screen.print()


def _busy(load: _load.Load) -> str:
    text = (
        "This machine is too busy for these figures to mean anything: for "
        f"{load.without_cpu:.0%} of the time in which this program was ready to run, other work had its CPUs."
    )
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        text += (
            " The threads of PyTorch programs lose still more, because one that waits for another keeps its CPU: "
            "on a busy machine set OMP_WAIT_POLICY=PASSIVE in their environment."
        )
    return text


def _number(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _device_name(device: str) -> str:
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    name = platform.processor() or platform.machine()
    if (information := Path("/proc/cpuinfo")).exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(end_cleanly(main))
