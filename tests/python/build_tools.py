"""What the tests of builds share: running commands, programs that stand in for compilers, and the C++ tests' build."""

from __future__ import annotations

import os
import stat
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from file_lock import locked

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the environment variables that steer a build, except those that are given."""
    ours = ("GEMMA_NORM", "ROCM", "HIP", "PYTORCH_ROCM", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA", "NVCC", "CXX")
    # Of the names that begin with CC, only the compiler's: CCACHE_DIR tells where kernels are that need no compiling.
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "MAX_JOBS") and not k.startswith(ours)}
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


CPP_BUILD = ROOT / "build" / "cpp"  # of `make test-cpp`


def one_at_a_time() -> AbstractContextManager[None]:
    """Where pytest-xdist runs several processes, only one of them builds with CMake at a time."""
    return locked(ROOT / "build" / "pytest.lock")


def cmake(*arguments: str) -> None:
    done = subprocess.run(["cmake", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"cmake {' '.join(arguments)}\n{done.stdout}{done.stderr}"
