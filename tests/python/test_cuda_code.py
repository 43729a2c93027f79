"""What ptxas makes of every CUDA kernel: no GPU is needed, nvcc is."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

SOURCES = sorted((Path(__file__).parents[2] / "csrc/cuda").glob("*.cu"))
REPORT = re.compile(r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Bytes spilled and registers, by demangled name."""
    nvcc = shutil.which("nvcc") or shutil.which(f"{cpp_extension.CUDA_HOME or '/usr/local/cuda'}/bin/nvcc")
    if not nvcc:
        pytest.skip("needs nvcc: install the CUDA toolkit, or set CUDA_HOME to where it is")
    folder = tmp_path_factory.mktemp("cubin")

    def compile(source: Path) -> str:
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "-arch=sm_90",
            "-cubin",
            "-Xptxas",
            "-v",
            "-o",
            folder / f"{source.stem}.cubin",
        ]
        return subprocess.run([*command, source], capture_output=True, text=True, check=True).stderr

    with ThreadPoolExecutor(2) as pool:
        report = "".join(pool.map(compile, SOURCES))
    found = REPORT.findall(report)
    names = subprocess.run(
        ["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True, check=True
    )
    return {
        n: (int(spilled), int(used)) for n, (_, spilled, used) in zip(names.stdout.split("\n"), found, strict=False)
    }


def variant(form: str, x: str, weight: str, round_each_step: str = "false") -> str:
    """A pattern for a kernel's name up to its variant's end."""
    return rf"normalize_\w+<gemma_norm::Variant<gemma_norm::{form}, {x}, {weight}, {round_each_step}>, "


def test_rows_that_models_have_are_not_spilled(kernels: dict[str, tuple[int, int]]) -> None:
    """Longer ones (here, from 131072 16-bit elements on) take blocks of 1024 threads, which have 64 registers each."""
    for_long_rows = re.compile(variant(r"\w+", "gemma_norm::b?float16", r"[\w:]+", r"\w+") + r".*\b1024, (true|false)>")
    spilled = {name: found[0] for name, found in kernels.items() if found[0] and not for_long_rows.search(name)}
    forms = {re.search(r"Variant<gemma_norm::(\w+)", name)[1] for name in kernels}
    assert forms == {"RmsNorm", "AddRmsNorm", "AddToFloat32RmsNorm", "GatedRmsNorm", "GatedInputRmsNorm"}
    assert len(kernels) > 800 and not spilled


def test_as_many_rows_are_in_flight_as_planned(kernels: dict[str, tuple[int, int]]) -> None:
    """The plain bfloat16 kernels: blocks on a multiprocessor of 65536 registers, given out 8 a thread at a time."""

    def blocks(scope: int, vectors: int, threads: int) -> int:
        bfloat16 = "gemma_norm::bfloat16"
        name = variant("RmsNorm", bfloat16, bfloat16) + rf".*{scope}, {vectors}, {threads}, true>"
        (used,) = (found[1] for kernel, found in kernels.items() if re.search(name, kernel))
        return 65536 // (-(-used // 8) * 8 * threads)

    block, cluster = 1, 2  # gemma_norm::Scope
    planned = {
        (block, 2, 256): 6,
        (block, 4, 256): 4,
        (block, 8, 192): 4,
        (block, 8, 256): 3,
        (block, 8, 1024): 1,
        (cluster, 2, 256): 6,
        (cluster, 4, 256): 4,
        (cluster, 8, 256): 3,
    }
    assert {kernel: blocks(*kernel) for kernel in planned} == planned
