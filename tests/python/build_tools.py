"""What the tests of setup.py share: running commands, and programs that stand in for compilers."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without the variables that steer a build, but for those that are given."""
    ours = (
        "GEMMA_NORM",
        "ROCM",
        "HIP",
        "PYTORCH_ROCM",
        "CUDA_HOME",
        "CUDA_PATH",
        "TORCH_CUDA",
        "NVCC",
        "CC",
        "CXX",
        "MAX_JOBS",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
