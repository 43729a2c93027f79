"""examples/serving.py on stand-ins for the engines, and what the launch scripts beside it start."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import script
from gemma_norm.integrations import sglang, vllm
from sglang_stand_in import install_sglang
from vllm_stand_in import install_vllm

EXAMPLES = Path(__file__).parents[2] / "examples"
ENGINES = {"sglang": (install_sglang, sglang), "vllm": (install_vllm, vllm)}


def run(monkeypatch: pytest.MonkeyPatch, engine: str) -> int:
    monkeypatch.setattr(sys, "argv", ["serving.py", engine])
    return runpy.run_path(str(EXAMPLES / "serving.py"))["main"]()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_says_whose_kernels_serve(monkeypatch, capsys, engine):
    ENGINES[engine][0](monkeypatch)
    assert run(monkeypatch, engine) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == [engine, "on", "cuda" if torch.cuda.is_available() else "cpu"] and len(rows) == 3
    assert {tuple(row.split()[1:]) for row in rows} == {(engine, "gemma_norm", engine)}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_exit_status_where_a_norm_is_not_ours(monkeypatch, capsys, engine):
    stand_in, integration = ENGINES[engine]
    stand_in(monkeypatch)
    monkeypatch.setattr(integration, "install", lambda: None)
    assert run(monkeypatch, engine) == 1
    assert "gemma_norm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("example", "program", "started"),
    [
        ("serve_sglang.sh", "python3", "1 - -m sglang.launch_server --model-path some/model --port 1"),
        ("serve_vllm.sh", "vllm", "- 1 serve some/model -cc.mode=none --port 1"),
    ],
)
def test_the_launch_scripts(tmp_path, example, program, started):
    script(tmp_path / program, 'echo "${GEMMA_NORM_SGLANG:--} ${GEMMA_NORM_VLLM:--} $*"')
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", EXAMPLES / example, *arguments], env=path, capture_output=True, text=True, check=False
        )

    assert call("some/model", "--port", "1").stdout.strip() == started
    assert call().returncode == 2 and "usage" in call().stderr
