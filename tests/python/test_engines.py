"""tests/engines, where the engines' sources are at hand: the adapters on the real SGLang, vLLM and kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = Path(__file__).parents[1] / "engines"


def assert_passing(file: str) -> None:
    """In a process of their own: an engine changes transformers, and brings stand-ins for what it imports."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ENGINES / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize(("engine", "version"), [("sglang", "0.5.23"), ("vllm", "0.33.0")])
def test_the_real_engine(engine, version):
    folder = os.environ.get("GEMMA_NORM_ENGINES")
    if not folder or not (Path(folder) / engine).is_dir():
        pytest.skip(
            f"pip download --no-deps -d wheels {engine}=={version} && unzip -q wheels/{engine}-*.whl -d engines && "
            "export GEMMA_NORM_ENGINES=$PWD/engines; tests/engines/README.md names the packages that it imports"
        )
    for file in sorted(ENGINES.glob(f"test_{engine}*.py")):
        assert_passing(file.name)


def test_the_real_kernels_library():
    if importlib.util.find_spec("kernels") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("pip install kernels==0.17.2 transformers==5.22.0, in an environment of their own")
    assert_passing("test_kernels.py")
