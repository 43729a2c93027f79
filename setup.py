"""Builds the native libraries: libgemma_norm_cpu.so always, libgemma_norm_cuda.so and libgemma_norm_hip.so for the toolkits found.

Device code is compiled by nvcc and hipcc as it is; the PyTorch operators around it are a torch.utils.cpp_extension against the
stable ABI of PyTorch 2.10, so one build serves every later PyTorch, and its CPU, CUDA and ROCm builds alike.

Environment:
    GEMMA_NORM_BACKENDS    comma-separated, out of cpu, cuda, hip: build exactly these (cpu is always built)
    TORCH_CUDA_ARCH_LIST   as elsewhere, e.g. "9.0;12.0+PTX"; default: every supported one that nvcc knows
    PYTORCH_ROCM_ARCH      as elsewhere, e.g. "gfx942;gfx1100"; default: every supported one that hipcc can build
    CUDA_HOME, ROCM_PATH   where the toolkits are, when they are not on the PATH
    MAX_JOBS               compilers at a time
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
PACKAGE = "gemma_norm"
CORE = ["csrc/check.cpp", "csrc/overlap.cpp", "csrc/plan.cpp"]
CPU = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# libtorch.so must stay a dependency: it brings the GPU runtime's symbols, to which the libraries' own references are weak.
LINK = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
CUDA_ARCHES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]
ROCM_ARCHES = ["gfx90a", "gfx942", "gfx950"]  # CDNA
ROCM_ARCHES += ["gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"]  # RDNA


def stop(message: str) -> None:
    sys.exit(f"gemma_norm: {message}")


def find_tool(name: str, variables: list[str], folders: list[str]) -> str | None:
    """The path of a compiler: where a variable says, else on the PATH, else in a usual place."""
    for variable in variables:
        if os.environ.get(variable):
            return shutil.which(str(Path(os.environ[variable]) / "bin" / name))
    return shutil.which(name) or next((p for f in folders if (p := shutil.which(f"{f}/bin/{name}"))), None)


def output(*command: str, env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


class Cuda:
    source, object = "csrc/cuda/rms_norm.cu", "cuda_rms_norm.o"
    install = "install the CUDA toolkit, or set CUDA_HOME to where it is"

    def __init__(self) -> None:
        self.compiler = find_tool("nvcc", ["CUDA_HOME", "CUDA_PATH"], ["/usr/local/cuda"])
        self.environment: dict[str, str] = {}

    def describe(self) -> tuple[str, list[str]]:
        release = re.search(r"release ([\d.]+)", output(self.compiler, "--version"))
        return f"nvcc {release[1] if release else '?'}", sorted({f.rsplit("code=", 1)[1] for f in self.arch_flags()})

    def arch_flags(self) -> list[str]:
        """PyTorch's own reading of TORCH_CUDA_ARCH_LIST, for its CPU builds too."""
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            known = output(self.compiler, "--list-gpu-arch").split()
            usable = [a for a in CUDA_ARCHES if f"compute_{a.replace('.', '')}" in known]
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(usable) + "+PTX"
        return cpp_extension._get_cuda_arch_flags()

    def command(self) -> list[str]:
        return [self.compiler, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0",
                "-Xfatbin", "-compress-all", *self.arch_flags()]  # fmt: skip

    def link(self) -> list[str]:
        lib = next(p for p in Path(self.compiler).resolve().parents[1].glob("**/libcudart_static.a"))
        return [str(lib), "-lrt", "-lpthread", "-ldl"]


class Hip:
    source, object = "csrc/hip/rms_norm.hip", "hip_rms_norm.o"
    install = "install ROCm (on Debian: apt-get install hipcc libamdhip64-dev), or set ROCM_PATH to where it is"

    def __init__(self) -> None:
        self.compiler = find_tool("hipcc", ["ROCM_PATH", "ROCM_HOME"], ["/opt/rocm"])
        self.environment = {"HIP_PLATFORM": "amd"}  # else hipcc chooses nvcc where there is one
        self._arches: list[str] = []

    def describe(self) -> tuple[str, list[str]]:
        version = re.search(
            r"HIP version: ([\d.]+)", output(self.compiler, "--version", env={**os.environ, **self.environment})
        )
        return f"hipcc {version[1] if version else '?'}", self.arches()

    def arches(self) -> list[str]:
        if not self._arches:
            named = [a for a in re.split(r"[;,\s]+", os.environ.get("PYTORCH_ROCM_ARCH", "")) if a]
            self._arches = named or [a for a in ROCM_ARCHES if self._builds(a)]
            if not self._arches:
                stop(f"{self.compiler} builds none of {', '.join(ROCM_ARCHES)}: set PYTORCH_ROCM_ARCH")
        return self._arches

    def _builds(self, arch: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.hip"
            probe.write_text("#include <hip/hip_runtime.h>\n__global__ void probe() {}\n")
            command = [self.compiler, f"--offload-arch={arch}", "-c", "-o", f"{probe}.o", str(probe)]
            return subprocess.run(command, capture_output=True, env={**os.environ, **self.environment}).returncode == 0

    def command(self) -> list[str]:
        return [self.compiler, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-mcumode",
                "-ffp-contract=off", *(f"--offload-arch={a}" for a in self.arches())]  # fmt: skip

    def link(self) -> list[str]:
        return []  # not libamdhip64: PyTorch brings its own, and two in one process corrupt each other


TOOLKITS = {"cuda": Cuda(), "hip": Hip()}


def backends() -> list[str]:
    asked = [b for b in re.split(r"[,;\s]+", os.environ.get("GEMMA_NORM_BACKENDS", "").strip()) if b]
    for name in asked:
        if name not in ("cpu", *TOOLKITS):
            stop(f"GEMMA_NORM_BACKENDS may name cpu, cuda and hip, got {name}")
        if name in TOOLKITS and not TOOLKITS[name].compiler:
            compiler = {"cuda": "nvcc", "hip": "hipcc"}[name]
            stop(f"GEMMA_NORM_BACKENDS asks for {name}, but {compiler} was not found: {TOOLKITS[name].install}")
    return ["cpu", *(n for n, t in TOOLKITS.items() if (n in asked if asked else t.compiler))]


def extension(name: str) -> cpp_extension.CppExtension:
    sources = ["csrc/torch/schema.cpp", *CPU] if name == "cpu" else []
    return cpp_extension.CppExtension(
        f"{PACKAGE}.lib.libgemma_norm_{name}", [*sources, *CORE, f"csrc/torch/bind_{name}.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h")],
        extra_compile_args=FLAGS, extra_link_args=[*LINK, "-Wl,-s"], py_limited_api=True,
    )  # fmt: skip


class BuildLibraries(cpp_extension.BuildExtension):
    """Compiles each device's kernels with its own compiler, then everything else with PyTorch's extension builder."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in them, so no Python ABI in their names

    def build_extensions(self) -> None:
        info = {"cpu": {"compiler": output("c++", "--version").splitlines()[0]}}
        for ext in self.extensions:
            name = ext.name.rsplit("_", 1)[1]
            if toolkit := TOOLKITS.get(name):
                compiler, architectures = toolkit.describe()
                info[name] = {"compiler": compiler, "architectures": architectures}
                ext.extra_objects = [self.compile_kernels(toolkit)]
                ext.extra_link_args += toolkit.link()
        super().build_extensions()
        version = self.distribution.get_version()
        text = f'"""Written by setup.py."""\n\nVERSION = {version!r}\nTORCH_VERSION = {torch.__version__!r}\nBUILD = {info!r}\n'
        package = Path(self.build_lib) / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(text)
        self.remove_stale(package)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the package's own folder takes what was built."""
        package = ROOT / "python" / PACKAGE
        (package / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / PACKAGE / "_build_info.py", package)
        self.remove_stale(package)

    def remove_stale(self, package: Path) -> None:
        for library in (package / "lib").glob("libgemma_norm_*.so"):
            if library.stem.rsplit("_", 1)[1] not in BACKENDS:
                library.unlink()

    def compile_kernels(self, toolkit: Cuda | Hip) -> str:
        """Through ninja: compiled again only when a source, a header or the command has changed."""
        folder = ROOT / "build" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        target, source = folder / toolkit.object, ROOT / toolkit.source
        environment = "".join(f"{k}={v} " for k, v in toolkit.environment.items())
        launcher = "ccache " if shutil.which("ccache") else ""
        escaped = lambda p: str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        (folder / f"{toolkit.object}.ninja").write_text(
            f"rule compile\n  command = {environment}{launcher}{' '.join(toolkit.command())} -MD -MF $out.d -c $in -o $out\n"
            f"  depfile = $out.d\n  deps = gcc\nbuild {escaped(target)}: compile {escaped(source)}\n"
        )
        subprocess.run(["ninja", "-C", str(folder), "-f", f"{toolkit.object}.ninja"], check=True)
        return str(target)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: native libraries, but nothing that depends on the Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


BACKENDS = backends()
setup(
    ext_modules=[extension(name) for name in BACKENDS],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
