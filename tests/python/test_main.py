"""``python -m gemma_norm``."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest
import torch

import gemma_norm
from gemma_norm import __main__ as command
from gemma_norm import _checkup, _library, _screen, _speed
from gemma_norm._ops import rms_norm as ops

DEVICES = _checkup.devices()


def test_as_a_command():
    process = subprocess.run(
        [sys.executable, "-m", "gemma_norm", "--skip-speed"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == "" and "\x1b" not in process.stdout
    assert f"gemma_norm {gemma_norm.__version__}   PyTorch {torch.__version__}" in process.stdout
    assert str(gemma_norm.backends()["cpu"].path) in process.stdout
    rows = [line.split() for line in process.stdout.splitlines()]
    for device in DEVICES:
        for op in ("rms_norm", "fused_add_rms_norm", "add_rms_norm"):
            row = next(row for row in rows if row[:2] == [op, device])
            assert row.count("ok") == 3 and all(0.4 < float(error) < 30 for error in row[2:8:2])


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal(no_color):
    """Colours, unless NO_COLOR asks for none, and a progress line that is wiped again."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    if no_color:
        environment["NO_COLOR"] = "1"
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "gemma_norm", "--skip-speed"]
    with subprocess.Popen(arguments, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            text += chunk
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[32mok\x1b[0m" in text) is not no_color
    assert b"\r\x1b[Kchecking rms_norm" in text


def wrong_rms_norm(x, weight, eps=1e-6, gemma=False, *, out=None):
    y = ops._rms_norm(x, weight, eps, gemma) * 1.01
    return y if out is None else out.copy_(y)


def test_a_wrong_kernel_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(_checkup.ops, "rms_norm", wrong_rms_norm)
    assert command.main(["--skip-speed"]) == 1
    text = capsys.readouterr().out
    assert "rms_norm, bfloat16, cpu: hidden 256: off by" in text
    assert "add_rms_norm, float32, cpu: fused equals unfused does not hold" in text
    assert "wrong" in text


def test_an_operator_that_fails_is_reported(monkeypatch, capsys):
    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("rms_norm: no kernel image for sm_42\nsecond line")

    monkeypatch.setattr(_checkup.ops, "add_rms_norm", broken)
    assert command.main(["--skip-speed"]) == 1
    assert "add_rms_norm, float16, cpu: rms_norm: no kernel image for sm_42\n" in capsys.readouterr().out


@pytest.mark.parametrize("served, failed", [((), 1), (("cuda:1",), 0)])
def test_a_gpu_without_code_is_reported_and_a_fault_if_there_is_no_other(monkeypatch, capsys, served, failed):
    backends = gemma_norm.backends()
    broken = {
        **vars(backends["cpu"]),
        "served_devices": served,
        "unsupported_devices": ("cuda:0 (X) is sm_80, the cuda library has code for sm_90",),
    }
    monkeypatch.setattr(command, "backends", lambda: {**backends, "cuda": gemma_norm.Backend(**broken)})
    assert command.main(["--skip-speed"]) == failed
    assert "is sm_80, the cuda library has code for sm_90" in capsys.readouterr().out


def test_a_gpu_without_code_is_not_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(_library, "unserved_gpus", lambda: {1: "cuda:1 is gfx1036"})
    assert _checkup.devices() == ["cpu", "cuda:0", "cuda:2"]


def test_speed_table(monkeypatch, capsys):
    monkeypatch.setattr(_speed, "SIZES", ((256, False), (2048, True)))
    monkeypatch.setattr(_speed, "SECONDS_A_CELL", 0.005)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    command.show_speed(_screen.Screen(), time.monotonic() + 100)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [row[-4:] for row in rows[1:5]]
    assert len(numbers) == 4 and all(float(cell.replace(",", "")) > 0 for row in numbers for cell in row)
    assert rows[1][:3] == ["q/k", "rms_norm", "1"] and rows[3][:3] == ["add", "+", "rms_norm"]


def test_a_compiler_that_fails_gets_a_footnote(monkeypatch, capsys):
    def failing(function, **_):
        def call(*_):
            raise ValueError("InvalidCxxCompiler: no working\nC++ compiler found")

        return call

    monkeypatch.setattr(_speed, "SIZES", ((256, False),))
    monkeypatch.setattr(_speed, "SECONDS_A_CELL", 0.005)
    monkeypatch.setattr(torch, "compile", failing)
    command.show_speed(_screen.Screen(), time.monotonic() + 100)
    text = capsys.readouterr().out
    assert text.count("- [1]") == 2
    assert "[1] ValueError: InvalidCxxCompiler: no working C++ compiler found" in text


def test_nothing_is_compiled_after_the_deadline(monkeypatch, capsys):
    monkeypatch.setattr(_speed, "SIZES", ((256, False),))
    monkeypatch.setattr(_speed, "SECONDS_A_CELL", 0.005)
    command.show_speed(_screen.Screen(), time.monotonic() - 1)
    assert "[1] not compiled: the minute is nearly over" in capsys.readouterr().out
