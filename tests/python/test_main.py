"""``python -m gemma_norm``: the checks of an installation, what it shows on terminals, and its small benchmark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch

import gemma_norm
from gemma_norm import __main__ as command
from gemma_norm import _checkup, _library, _load, _screen, _speed
from gemma_norm._ops import rms_norm as ops
from support import on_a_terminal, shown

DEVICES = _checkup.devices()


def test_as_a_command():
    process = subprocess.run(
        [sys.executable, "-m", "gemma_norm", "--skip-speed"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == "" and "\x1b" not in process.stdout
    assert f"gemma_norm {gemma_norm.__version__}   PyTorch {torch.__version__}" in process.stdout
    assert str(gemma_norm.libraries()["cpu"].path) in process.stdout
    rows = [line.split() for line in process.stdout.splitlines()]
    for device in DEVICES:
        for op in ("rms_norm", "fused_add_rms_norm", "add_rms_norm"):
            row = next(row for row in rows if row[:2] == [op, device])
            assert row.count("ok") == 3 and all(0.4 < float(error) < 30 for error in row[2:8:2])


@pytest.mark.parametrize(("no_color", "columns"), [(True, 80), (False, 40)])
def test_on_a_terminal(no_color, columns):
    """There are colours, unless NO_COLOR is set. Every line fits, except where one word, a path, is longer than a
    line.
    """
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    if no_color:
        environment["NO_COLOR"] = "1"
    status, text = on_a_terminal("-m", "gemma_norm", "--skip-speed", columns=columns, environment=environment)
    assert status == 0
    assert ("\x1b[32mok\x1b[0m" in text) is not no_color
    progress = re.findall(r"\r\x1b\[K([^\r\n]*)(?=\r\x1b\[K)", text)
    assert any(line.startswith("checking rms_norm") for line in progress)
    assert max(map(len, progress)) <= columns - len("^C") - 1
    lines = shown(text)
    assert not any("checking" in line for line in lines), "the progress line is wiped"
    assert all(len(line.split()) == 1 for line in lines if len(line) > columns), lines
    for dtype in ("float32", "float16", "bfloat16"):
        assert any(line.startswith("  largest error, ulp") and dtype in line for line in lines)


def test_ctrl_c():
    """The exit status is 130. There is neither a traceback nor a progress line left over."""
    status, text = on_a_terminal("-m", "gemma_norm", "--skip-speed", interrupt_at="checking")
    assert status == 130
    assert "Traceback" not in text and "KeyboardInterrupt" not in text
    assert not any("checking" in line for line in shown(text))


def test_a_reader_that_stops():
    """As with ``| head -1``, whose exit status shells report as 141."""
    with subprocess.Popen(
        [sys.executable, "-m", "gemma_norm", "--skip-speed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"gemma_norm")
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141 and errors == b""


def test_without_a_stdout(monkeypatch):
    """If the caller has closed it, sys.stdout is None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(_checkup, "HIDDEN", (256,))
    assert _screen.end_cleanly(lambda: command.main(["--skip-speed"])) == 0


def test_nothing_heavy_is_imported_for_a_start():
    """PyTorch's compiler, for one, is imported when something is compiled, and not before."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from gemma_norm import __main__\n"
        "assert __main__.main(['--skip-speed']) == 0\n"
        "import gemma_norm.benchmark.arguments\n"
        "print(*{name for name in set(sys.modules) - before if not name.startswith('gemma_norm.')})"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "numpy", "transformers"}
    assert not heavy & set(process.stdout.splitlines()[-1].split()), process.stdout


TABLE = [["op", "rows", "ours", "|", "torch.compile"], ["add", "1", "2.5", "|", "30.1"], ["add", "256", "45", "|", ""]]


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (None, [["op   rows  ours  |  torch.compile", "add     1   2.5  |           30.1", "add   256    45  |"]]),
        (30, [["op   rows  ours  |", "add     1   2.5  |", "add   256    45  |"],
              ["op   rows  torch.compile", "add     1           30.1", "add   256"]]),
        (22, [["us"], ["add, rows 1", "  ours           2.5", "  torch.compile  30.1"],
              ["add, rows 256", "  ours           45"]]),
    ],
)  # fmt: skip
def test_tables_in_narrow_terminals(width, parts):
    assert _screen.tables(TABLE, {0}, 2, width, "us") == parts


def test_text_in_narrow_terminals():
    assert _screen.wrap("one two three", None, "a ") == ["a one two three"]
    assert _screen.wrap("one two three", 9, "a ") == ["a one two", "a three"]
    assert _screen.wrap("one two three", 9, "a ", "    ") == ["a one two", "    three"]
    assert _screen.wrap("/path/of/some-file", 9, "  ") == ["  /path/of/some-file"]
    assert _screen.wrap("/path/of-a/file", 16, "label ", "  ") == ["label", "  /path/of-a/file"]


def test_the_share_of_time_without_a_cpu():
    """Three busy processes share one CPU with this thread, so that it waits most of the time."""
    if not _load._seconds_without_cpu():
        pytest.skip("needs a kernel that counts how long threads wait for a CPU in /proc/self/task/*/schedstat")
    cpus, load = os.sched_getaffinity(0), _load.Load()
    os.sched_setaffinity(0, {min(cpus)})  # inherited
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.2)
        with load.watch():
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                pass
    finally:
        for process in others:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cpus)
    assert load.without_cpu > 0.4


@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize("policy", ["", "passive"])
def test_a_busy_machine_is_named(monkeypatch, capsys, share, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(_load.Load, "without_cpu", share)
    monkeypatch.setattr(_speed, "SIZES", ())
    command.show_speed(_screen.Screen(), time.monotonic(), time.monotonic())
    text = capsys.readouterr().out
    assert ("too busy" in text and "50% of the time" in text) is (share == 0.5)
    assert ("OMP_WAIT_POLICY=PASSIVE" in text) is (share == 0.5 and not policy)


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
    libraries = gemma_norm.libraries()
    broken = {
        **vars(libraries["cpu"]),
        "served_devices": served,
        "unsupported_devices": ("cuda:0 (X) is sm_80, the cuda library has code for sm_90",),
    }
    monkeypatch.setattr(command, "libraries", lambda: {**libraries, "cuda": gemma_norm.Library(**broken)})
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
    command.show_speed(_screen.Screen(), time.monotonic(), time.monotonic() + 100)
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
    command.show_speed(_screen.Screen(), time.monotonic(), time.monotonic() + 100)
    text = capsys.readouterr().out
    assert text.count("- [1]") == 2
    assert "[1] ValueError: InvalidCxxCompiler: no working C++ compiler found" in text


def test_a_compilation_that_may_not_end_in_time_is_not_begun(monkeypatch, capsys):
    """The first compilation is expected to take as long as all that was done before it."""
    monkeypatch.setattr(_speed, "SIZES", ((256, False),))
    monkeypatch.setattr(_speed, "SECONDS_A_CELL", 0.005)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    now = time.monotonic()
    command.show_speed(_screen.Screen(), now - 30, now + 20)
    text = capsys.readouterr().out
    assert text.count("- [1]") == 2 and "[1] not compiled: the minute is nearly over" in text


def test_nothing_is_timed_after_the_end(monkeypatch, capsys):
    monkeypatch.setattr(_speed, "_time", lambda *_: pytest.fail("timed"))
    command.show_speed(_screen.Screen(), time.monotonic() - 60, time.monotonic() - 1)
    text = capsys.readouterr().out
    assert text.count("- [1]") == 2 * len(_speed.SIZES) * len(_speed.COLUMNS)
    assert "[1] not timed: the minute is nearly over" in text
