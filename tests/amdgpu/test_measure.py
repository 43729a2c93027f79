"""measure.sh on a machine without an AMD GPU: it says what is missing, and with stand-ins for the tools that it calls,
it does all its steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toolchain import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git clone, whose commit is named")
STAND_INS = {
    # Reads what it is given, so that measure.sh finds its check passed, and fails where told to.
    "python": 'case "$*" in -) exec cat >/dev/null;; *"$FAILS"*) exit 3;; esac\necho "python $* PYTHONPATH=$PYTHONPATH '
    'HIP_FORCE_DEV_KERNARG=$HIP_FORCE_DEV_KERNARG"',
    "pip": "mkdir site\ncat csrc/device/hip.h > site/hip.h",
    "rocminfo": 'echo "  Marketing Name: stand-in"',
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of the last commit, with today's measure.sh."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, checkout], check=True)
    script = "tests/amdgpu/measure.sh"
    (checkout / script).write_text((ROOT / script).read_text())
    return checkout


def measure(checkout: Path, tools: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "FAILS": "nothing", **variables}
    command = ["sh", "tests/amdgpu/measure.sh"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def stand_ins(folder: Path) -> Path:
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(("hip", "message"), [("None", "is not a ROCm build"), ("'7.1'", "PyTorch finds no AMD GPU")])
def test_without_a_gpu_it_says_what_is_missing_and_does_nothing(checkout: Path, hip: str, message: str) -> None:
    modules = checkout.parent / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text(
        f"import types\n__version__ = '2.13.0'\nversion = types.SimpleNamespace(hip={hip})\n"
        "cuda = types.SimpleNamespace(is_available=lambda: False)\n"
    )
    (modules / "gemma_norm.py").touch()
    (modules / "python").symlink_to(sys.executable)
    done = measure(checkout, modules, PYTHONPATH=str(modules))
    assert done.returncode == 1 and message in done.stderr and not done.stdout
    assert not (checkout / "report.txt").exists()


def test_with_stand_ins_it_does_every_step(checkout: Path) -> None:
    done = measure(checkout, stand_ins(checkout.parent / "tools"))
    report = (checkout / "report.txt").read_text()
    assert done.returncode == 0 and done.stdout == report and report.endswith("steps that failed: 0\n")
    assert "stand-in" in report
    runs = [line for line in report.splitlines() if line.startswith("python -m")]
    assert [r.split()[2] for r in runs] == ["gemma_norm", "pytest"] + ["gemma_norm.benchmark"] * 6
    site = checkout / "build/plain-stores/site"
    assert [r for r in runs if str(site) in r] == [runs[6]]
    assert ["KERNARG=1" in r for r in runs].index(True) + 1 == ["KERNARG=0" in r for r in runs].index(True) == 5
    plain = (site / "hip.h").read_text()
    assert "__builtin_nontemporal_store" not in plain and plain.count("*)p = ") == 2


def test_a_step_that_fails_is_reported_and_the_others_are_done(checkout: Path) -> None:
    done = measure(checkout, stand_ins(checkout.parent / "tools"), FAILS="pytest")
    assert "failed with status 3: python -m pytest -q tests/python" in done.stdout
    assert done.stdout.count("gemma_norm.benchmark --suite") >= 10 and "steps that failed: 1" in done.stdout
