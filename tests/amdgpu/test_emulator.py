"""The built HIP library on emulated AMD GPUs, through its C interface: launch code and machine code, no GPU needed.

The cases are the C++ tests' (tests/cpp/cases.cpp), with a guard page at every operand, compared with float64 and, bit
for bit, with the same kernels compiled for the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import model
import pytest
import toolchain

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not os.environ.get("TINYGRAD"),
    reason="make test-amdgpu TINYGRAD=<a checkout of github.com/tinygrad/tinygrad>, for its instruction emulator",
)

# What one library holds; for other targets, toolchain.code_object() makes a file of its own.
IN_LIBRARY = {"hipcc": ["gfx90a"], "clang": ["gfx90a", "gfx942", "gfx1100", "gfx1151", "gfx1201"]}
RUNS = [(compiler, arch) for compiler, arches in IN_LIBRARY.items() for arch in arches]
RUNS += [("clang", "gfx1102"), ("zig", "gfx950")]  # the launch code is the same for every GPU
if toolchain.HIP_7:
    RUNS = [("zig, HIP 7", arch) for arch in dict.fromkeys(arch for _, arch in RUNS)]
STRIDE = 5  # of the cases, one in so many is run


def artifacts(compiler: str, arch: str) -> list[str]:
    """ARCH LIBRARY CODE_OBJECT, as the scripts take them."""
    if arch not in IN_LIBRARY.get(compiler, []):
        return [arch, str(toolchain.hip_library("clang", IN_LIBRARY["clang"])), str(toolchain.code_object(arch))]
    return [arch, str(toolchain.hip_library(compiler, IN_LIBRARY[compiler])), "-"]


def run_script(name: str, arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, HERE / name, *arguments], capture_output=True, text=True)


def run_cases(compiler: str, arch: str, stride: int) -> dict[int, dict]:
    arguments = [*artifacts(compiler, arch), str(toolchain.cases_library()), "0/1", str(stride)]
    done = run_script("worker.py", arguments)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if not lines:
        raise RuntimeError(done.stderr)
    results: dict[int, dict] = {}
    for line in lines:
        if "begin" in line:  # That is all that is known if no further line follows.
            results[line["begin"]] = {"case": line["case"], "error": f"ended the process: {done.stderr[-2000:]}"}
        else:
            results[line["end"]].update(line)
    return results


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future]]:
    stride = 1 if request.config.getoption("--all-cases") else STRIDE
    try:
        toolchain.cases_library()
        for run in RUNS:
            artifacts(*run)
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    with ThreadPoolExecutor(2) as pool:
        yield {run: pool.submit(run_cases, *run, stride) for run in RUNS}


@pytest.fixture(params=RUNS, ids="-".join)
def run(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def test_every_case_is_right(results: dict, run: tuple[str, str], report: list[str]) -> None:
    cases = results[run].result()
    wrong = [f"{c['case']}\n  {c['error']}" for c in cases.values() if c["error"]]
    spilled = [c for c in cases.values() if c.get("refused")]
    passed = f"{len(cases) - len(wrong) - len(spilled)} of {len(cases)} cases pass"
    report.append(f"{run[1]}, compiled by {run[0]}: {passed}, {len(spilled)} have kernels that spill and were not run")
    assert len(cases) > 500 and not wrong, "\n".join(wrong[:10])
    assert len(spilled) < 20 and all("backpropagate" in kernel for c in spilled for kernel in c["refused"])
    assert sum(c["perturbed"] for c in cases.values()) > 10_000, "roots and reciprocals were exact"


def test_the_bits_are_the_same_on_every_gpu(results: dict) -> None:
    """All add up in one tree, so that neither wave width, nor compiler, nor instruction set shows."""
    bits: dict[int, set[int]] = {}
    for run in RUNS:
        for i, case in results[run].result().items():
            if not case.get("refused"):
                bits.setdefault(i, set()).add(case["bits"])
    assert bits and all(len(of_case) == 1 for of_case in bits.values())


@pytest.fixture(scope="session")
def probes() -> dict[tuple[str, str], dict]:
    try:
        done = {run: run_script("probe.py", artifacts(*run)) for run in RUNS}
    except toolchain.Missing as missing:
        pytest.skip(str(missing))
    return {run: json.loads(d.stdout) if not d.returncode else pytest.fail(d.stderr) for run, d in done.items()}


def test_rounding_of_rare_values(probes: dict, run: tuple[str, str]) -> None:
    assert probes[run]["keeps_every_nan"] and probes[run]["rounds_tiny_roots"]


def test_quantises_as_defined(run: tuple[str, str]) -> None:
    done = run_script("probe_quant.py", artifacts(*run))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["calls"] >= 30
    assert found["wrong"] == {}


def test_memory_takes_twice_as_long_as_instructions(probes: dict, run: tuple[str, str], report: list[str]) -> None:
    """Except on the GPUs of model.LEAST_MARGINS. docs/amd.md has two of the tables that this reports."""
    calls = probes[run]["counts"]
    report.append(f"\nwave instructions a row, compiled by {run[0]}:\n{model.table(run[1], calls)}")
    for gpu in model.GPUS[run[1]]:
        margin = model.least_margin(gpu, calls)
        if gpu.name in model.LEAST_MARGINS:
            assert margin == pytest.approx(model.LEAST_MARGINS[gpu.name], abs=0.1)
        else:
            assert margin >= 2, gpu.name
