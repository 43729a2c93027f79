"""Options, reports, and an early start of the compilations that tests/amdgpu needs."""

from __future__ import annotations

import pytest
import toolchain

REPORT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="every case on every emulated AMD GPU, not one in five")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to compile what is needed while earlier tests run, most of which use one processor of several.

    With pytest-xdist the processors are busy as it is, and each of its processes would compile.
    """
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    for item in session.items:
        if isinstance(item, pytest.Function) and "code" in item.fixturenames:
            toolchain.compile_assemblies(item.callspec.params["target"])


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
