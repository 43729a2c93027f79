"""Options, reports, and an early start of the compilations that tests/amdgpu needs."""

from __future__ import annotations

import os

import pytest
import toolchain
from assembly import AnyKernel, BackwardKernel, Kernel, RopeKernel, kernels
from toolchain import TARGETS, Target

REPORT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="every case on every emulated AMD GPU, not one in five")
    parser.addoption("--all-targets", action="store_true", help="machine code of every AMD GPU, not of two")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the targets for which another stands, unless all are asked for (make test-machine-code) or the
    emulator is to run (make test-amdgpu). Each takes two and a half minutes of a processor to compile.
    """
    if config.getoption("--all-targets", default=False) or toolchain.HIP_7 or os.environ.get("TINYGRAD"):
        return
    targets = [getattr(item, "callspec", None) and item.callspec.params.get("target") for item in items]
    chosen = [not (target and TARGETS[target].like) for target in targets]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, chosen, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, chosen, strict=True) if keep]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to compile what is needed while earlier tests run, most of which use one processor of several.

    With pytest-xdist the processors are busy as it is, and each of its processes would compile.
    """
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    for item in session.items:
        if isinstance(item, pytest.Function) and "all_code" in item.fixturenames:
            toolchain.compile_assemblies(item.callspec.params["target"])


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


@pytest.fixture
def all_code(target: Target) -> list[AnyKernel]:
    """Every kernel for the target."""
    try:
        paths = toolchain.assemblies(target.arch)
    except toolchain.Missing as missing:
        pytest.skip(f"{target.arch} needs {missing}")
    return [kernel for path in paths for kernel in kernels(path)]


@pytest.fixture
def code(all_code: list[AnyKernel]) -> list[Kernel]:
    """Those of the forward operators, but for those that quantise."""
    return [kernel for kernel in all_code if isinstance(kernel, Kernel) and not kernel.form.endswith("Quant")]


@pytest.fixture
def quant_code(all_code: list[AnyKernel]) -> list[Kernel]:
    """Those of the forward operators that quantise."""
    return [kernel for kernel in all_code if isinstance(kernel, Kernel) and kernel.form.endswith("Quant")]


@pytest.fixture
def backward_code(all_code: list[AnyKernel]) -> list[BackwardKernel]:
    """Those of the backward operators."""
    return [kernel for kernel in all_code if isinstance(kernel, BackwardKernel)]


@pytest.fixture
def rope_code(all_code: list[AnyKernel]) -> list[RopeKernel]:
    """Those of qk_norm_rope."""
    return [kernel for kernel in all_code if isinstance(kernel, RopeKernel)]


def pytest_unconfigure() -> None:
    toolchain.compile_no_more()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print when all tests are done."""
    return request.config.stash.setdefault(REPORT, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(REPORT, None):
        terminalreporter.section("emulated AMD GPUs")
        terminalreporter.write_line("\n".join(lines))
