"""On which machine, and with which software, the results were measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import torch

import gemma_norm

from .providers import Provider, version

VARIABLES = ("FLASHINFER_", "LIGER_", "QUACK_", "CUTE_DSL_", "TRITON_", "TORCHINDUCTOR_", "OMP_", "KMP_", "PYTORCH_")
FOLDERS = ("TORCHINDUCTOR_CACHE_DIR",)  # torch.compile sets it; a path says nothing about speed


def describe(providers: Iterable[Provider], absent: dict[str, str], suites: Iterable[str]) -> dict[str, str]:
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "suites": ", ".join(suites),
        "gemma_norm": gemma_norm.__version__,
        "commit": _commit(),
        "cpu": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        facts |= {
            "gpu": properties.name,
            "gpu facts": f"{arch}, {properties.multi_processor_count} processors, "
            f"{properties.total_memory / 2**30:.0f} GiB, L2 {properties.L2_cache_size / 2**20:.0f} MiB",
            "driver": _driver(),
            "toolkit": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        }
    names = [name for name in sorted(os.environ) if name.startswith(VARIABLES) and name not in FOLDERS]
    variables = [f"{name}={os.environ[name]}" for name in names]
    facts["variables"] = ", ".join(variables) or "none"
    facts["peers"] = ", ".join(version(p) for p in providers if p.module) or "none"
    facts |= {f"absent {name}": reason for name, reason in absent.items()}
    return {name: " ".join(value.split()) for name, value in facts.items()}


def _commit() -> str:
    here = Path(__file__).resolve().parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return commit + (" with changes" if changed else "") if commit else "not in a repository"


def _driver() -> str:
    if torch.version.hip:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text() if path.is_file() else "unknown"
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
