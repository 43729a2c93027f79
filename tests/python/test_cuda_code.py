"""What ptxas makes of every CUDA kernel for an H100 (sm_90): registers and spills. No GPU is needed, but nvcc is."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from build_tools import CPP_BUILD, ROOT, cmake, one_at_a_time
from kernel_names import KernelName, RopeName, kernel_names

SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
REPORT = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_90'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S
)
REGISTERS = 65536  # of a multiprocessor, which gives them out 8 a thread at a time


@dataclass(frozen=True)
class Kernel:
    name: KernelName | RopeName
    spilled: int  # bytes
    registers: int  # a thread

    @property
    def blocks(self) -> int:
        """How many of its largest blocks a multiprocessor has registers for."""
        return REGISTERS // (-(-self.registers // 8) * 8 * self.name.threads)


def kept_reports() -> str:
    """What ptxas said when `make test-cpp` compiled the sources, brought up to date; "" if it compiles no CUDA."""
    cache = CPP_BUILD / "CMakeCache.txt"
    if not (shutil.which("cmake") and cache.exists() and "GEMMA_NORM_CUDA:BOOL=ON" in cache.read_text()):
        return ""
    with one_at_a_time():
        cmake("--build", str(CPP_BUILD), "--target", "gemma_norm_cuda", "-j2")
    objects = CPP_BUILD / "CMakeFiles/gemma_norm_cuda.dir/csrc/cuda"
    reports = [objects / f"{source.name}.o.report" for source in SOURCES]
    return "".join(report.read_text() for report in reports) if all(report.exists() for report in reports) else ""


def new_reports(nvcc: str, folder: Path) -> str:
    def compile(source: Path) -> str:
        command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-cubin", "-Xptxas", "-v"]
        command += ["-o", str(folder / f"{source.stem}.cubin"), str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    with ThreadPoolExecutor(2) as pool:
        return "".join(pool.map(compile, SOURCES))


@pytest.fixture(scope="module")
def all_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc = shutil.which("nvcc") or shutil.which(f"{cpp_extension.CUDA_HOME or '/usr/local/cuda'}/bin/nvcc")
    if not nvcc:
        pytest.skip("needs nvcc: install the CUDA toolkit, or set CUDA_HOME to where it is")
    found = REPORT.findall(kept_reports())
    if not found:  # or they are of other GPUs
        found = REPORT.findall(new_reports(nvcc, tmp_path_factory.mktemp("cubin")))
    symbols, spilled, registers = zip(*found, strict=True)
    return [
        Kernel(name, int(spilled), int(registers))
        for name, spilled, registers in zip(kernel_names(list(symbols)), spilled, registers, strict=True)
        if isinstance(name, KernelName | RopeName)
    ]


@pytest.fixture(scope="module")
def kernels(all_kernels: list[Kernel]) -> list[Kernel]:
    """Those of the forward operators."""
    return [kernel for kernel in all_kernels if isinstance(kernel.name, KernelName)]


def test_no_kernel_of_heads_is_spilled(all_kernels: list[Kernel]) -> None:
    """And enough of them are resident: 768 threads a multiprocessor in bfloat16 (csrc/gpu/rope_kernel.cuh)."""
    ropes = [kernel for kernel in all_kernels if isinstance(kernel.name, RopeName)]
    assert len(ropes) == 56
    assert [str(k.name) for k in ropes if k.spilled] == []
    halves = [k for k in ropes if k.name.aligned and k.name.x == k.name.weight == k.name.angles != "float"]
    resident = sorted((k.name.x, k.blocks * k.name.threads) for k in halves)
    assert resident == [("bfloat16", 768)] * 3 + [("float16", 640)] * 3


def test_rows_that_models_have_are_not_spilled(kernels: list[Kernel]) -> None:
    """The kernels of longer rows may spill: their blocks have 1024 threads, with 64 registers each. On an H100 they
    serve rows of 131072 16-bit elements and more.
    """
    forms = {kernel.name.form for kernel in kernels}
    assert forms == {
        "RmsNorm",
        "AddRmsNorm",
        "AddToFloat32RmsNorm",
        "GatedRmsNorm",
        "GatedInputRmsNorm",
        "RmsNormAddRmsNorm",
        "RmsNormQuant",
        "AddRmsNormQuant",
        "AddToFloat32RmsNormQuant",
        "GatedRmsNormQuant",
        "GatedInputRmsNormQuant",
    }
    assert len(kernels) > 950
    may_spill = [k for k in kernels if k.name.threads == 1024 and k.name.x in ("float16", "bfloat16")]
    assert [str(k.name) for k in kernels if k.spilled and k not in may_spill] == []


def test_as_many_rows_are_in_flight_as_planned(kernels: list[Kernel]) -> None:
    """How many blocks of the plain bfloat16 kernels a multiprocessor holds: csrc/gpu/tuning.h says how many it
    should.
    """
    plain = [k for k in kernels if (k.name.form, k.name.x, k.name.weight) == ("RmsNorm", "bfloat16", "bfloat16")]
    blocks = {
        (k.name.scope, k.name.vectors, k.name.threads): k.blocks
        for k in plain
        if k.name.aligned and not k.name.round_each_step
    }
    planned = {
        ("block", 2, 256): 6,
        ("block", 4, 256): 4,
        ("block", 8, 192): 4,
        ("block", 8, 256): 3,
        ("block", 8, 1024): 1,
        ("cluster", 2, 256): 6,
        ("cluster", 4, 256): 4,
        ("cluster", 8, 256): 3,
    }
    assert {kernel: blocks[kernel] for kernel in planned} == planned
