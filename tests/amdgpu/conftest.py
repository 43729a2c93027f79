from __future__ import annotations

import pytest

REPORT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="every case on every emulated AMD GPU, not one in five")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print when all tests are done."""
    return request.config.stash.setdefault(REPORT, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(REPORT, None):
        terminalreporter.section("emulated AMD GPUs")
        terminalreporter.write_line("\n".join(lines))
