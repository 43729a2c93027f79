"""Builds the native libraries.

libgemma_norm_cpu.so is always built; libgemma_norm_cuda.so and libgemma_norm_hip.so if their toolkits are found.

nvcc and hipcc compile the device code without any translation. The PyTorch operators around it are a
torch.utils.cpp_extension against the stable ABI of PyTorch 2.10, so one build serves every later PyTorch, in its CPU,
CUDA and ROCm builds.

Whatever would make the libraries useless stops the build here, with a message of one line. pip runs this file before it
installs other packages, so nothing has been replaced by then. A warning would not do, because pip hides what a
successful build prints.

Environment:
    GEMMA_NORM_BACKENDS    comma-separated, out of cpu, cuda, hip: build exactly these (cpu is always built)
    TORCH_CUDA_ARCH_LIST   as in PyTorch, e.g. "9.0;12.0+PTX"; default: every supported one that nvcc knows
    PYTORCH_ROCM_ARCH      as in PyTorch, e.g. "gfx942;gfx1100"; default: every supported one that hipcc can build
    CUDA_HOME, ROCM_PATH   where the toolkits are, if they are not on the PATH
    CXX                    the C++ compiler, for nvcc too; default: c++
    MAX_JOBS               how many compilers run at a time; default: one for each processor
"""

from __future__ import annotations

import glob
import mmap
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import setuptools


def stop(message: str) -> NoReturn:
    sys.exit(f"gemma_norm: {message}")


def check_build_tools() -> None:
    """Stop if a tool is missing. The imports below would fail then, without an explanation."""
    if sys.platform != "linux":
        stop(f"builds on Linux alone (x86-64, AArch64), got {sys.platform}; Windows has WSL 2, macOS has containers")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        stop(f"needs setuptools 77 or later, got {setuptools.__version__}: pip install 'setuptools>=77' ninja")
    if not find_spec("torch"):
        stop("PyTorch 2.10 or later must be installed first: --no-build-isolation builds against the one that is there")
    # If the environment is not activated, its tools are not on the PATH, but they are next to its Python.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if not shutil.which("ninja"):
        stop("ninja was not found: pip install 'setuptools>=77' ninja")


check_build_tools()
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs it, and pip would show this

import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "python"))  # pip and build run this file without its folder on the path

from setup_packing import BuildModules, PlatformWheel, SourceArchive  # noqa: E402

PACKAGE = "gemma_norm"
CORE = [*(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/core/*.cpp"))), "csrc/ops/ops.cpp"]
CPU = ["csrc/torch/schema.cpp"]
GPU = ["csrc/gpu/backward_plan.cpp", "csrc/gpu/plan.cpp"]
# Error messages contain the paths of source files. Without the folders of this build in them, libraries are the same
# wherever they are built.
PREFIXES = [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, Path(torch.__file__).parents[1])]
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", *PREFIXES]
# libtorch.so must stay a dependency of the libraries. It loads PyTorch's GPU libraries, and the linker would drop it,
# because the libraries refer to symbols of those only weakly.
LINK = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
CUDA_ARCHES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]
ROCM_ARCHES = ["gfx90a", "gfx942", "gfx950"]  # CDNA
ROCM_ARCHES += ["gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"]  # RDNA
CXX = shlex.split(os.environ.get("CXX", "")) or ["c++"]
MAX_JOBS = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Torch:
    """The PyTorch that the libraries will be used with."""

    folder: Path
    version: str
    cuda: str | None
    hip: str | None

    def check(self) -> None:
        release = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])
        if release < (2, 10):
            stop(f"needs PyTorch 2.10 or later, got {self.version}; install one, with the ROCm or CUDA that is wanted")
        if re.match(r"2\.10\.0\.?(a|b|rc|dev)", self.version):
            with (self.folder / "lib/libtorch_cpu.so").open("rb") as file:
                library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                lacks = [s for s in ("torch_library_impl", "torch_parallel_for") if library.find(s.encode()) < 0]
            if lacks:
                stop(f"needs PyTorch 2.10's stable ABI; {self.version} is older than its {' and '.join(lacks)}")


def torch_to_serve() -> Torch | None:
    """The user's own PyTorch, or None if there is none or it cannot be found.

    pip's isolated build has a PyTorch of its own, and puts it first by PYTHONPATH. `python -m build` and uv run an
    interpreter of their own, from which the user's PyTorch cannot be found.
    """
    prefix, temporary = os.path.realpath(sys.prefix), os.path.realpath(tempfile.gettempdir())
    if prefix.startswith(f"{temporary}/build-env-") or re.search(r"/builds-v\d+/", prefix):
        return None
    if "pip-build-env-" not in torch.__file__:
        return Torch(Path(torch.__file__).parent, torch.__version__, torch.version.cuda, torch.version.hip)
    code = "from importlib.util import find_spec; print(find_spec('torch').submodule_search_locations[0])"
    found = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    folder = Path(found.stdout.strip())
    known = runpy.run_path(str(folder / "version.py"))
    return Torch(folder, known["__version__"], known.get("cuda"), known.get("hip"))


def gpu_backend(served: Torch | None) -> dict[str, str]:
    """The GPU library that must not be missing, and why.

    If PyTorch is not installed yet, this depends on the machine's GPU. pip will then install PyPI's PyTorch, which is
    always a CUDA build.
    """
    if served and served.hip:
        return {"hip": f"this PyTorch ({served.version}) is a ROCm {served.hip} build"}
    if served and served.cuda:
        return {"cuda": f"this PyTorch ({served.version}) is a CUDA {served.cuda} build"}
    if not served and Path("/proc/driver/nvidia/version").exists():
        return {"cuda": "this machine has an NVIDIA GPU"}
    return {}


def find_tool(name: str, variables: list[str], home: str | None, places: list[str]) -> str | None:
    """The path of a compiler.

    If one of the variables is set, only its folder counts. Otherwise these are tried: ``home``, where PyTorch found
    the toolkit; the PATH; and the usual places.
    """

    def within(folders: list[str]) -> str | None:
        numbers = lambda path: [int(n) for n in re.findall(r"\d+", path)]  # noqa: E731
        found = (p for f in folders for p in sorted(glob.glob(f"{f}/bin/{name}"), key=numbers, reverse=True))
        return next((p for p in found if shutil.which(p)), None)

    if named := [glob.escape(os.environ[v]) for v in variables if os.environ.get(v)]:
        return within([f for n in named for f in (n, f"{n}/core*")])
    return within([glob.escape(home)] if home else []) or shutil.which(name) or within(places)


def output(*command: str, env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


class Toolkit:
    tool: str
    sources: list[Path]
    variables: list[str]
    install: str
    compiler: str | None

    def missing(self) -> str:
        named = [f"; {v} is {os.environ[v]}, which has no bin/{self.tool}" for v in self.named()]
        return f"{self.tool} was not found: {self.install}{''.join(named)}"

    def named(self) -> list[str]:
        return [v for v in self.variables if os.environ.get(v)]


class Host:
    """The C++ compiler, for the kernels of CPUs."""

    sources, tool = sorted(ROOT.glob("csrc/cpu/*.cpp")), "c++"

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def command(self) -> list[str]:
        """CMake compiles csrc/cpu with the same flags in the same order, so that ccache compiles it once for both."""
        flags = ["-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}/="]
        return [*CXX, *flags, "-std=c++17"]


class Cuda(Toolkit):
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    tool, variables = "nvcc", ["CUDA_HOME", "CUDA_PATH"]
    install = "install the CUDA toolkit, or set CUDA_HOME to where it is"

    def __init__(self) -> None:
        self.compiler = find_tool(self.tool, self.variables, cpp_extension.CUDA_HOME, ["/usr/local/cuda"])
        self.environment: dict[str, str] = {}

    def describe(self) -> tuple[str, list[str]]:
        release = re.search(r"release ([\d.]+)", output(self.compiler, "--version"))
        return f"nvcc {release[1] if release else '?'}", sorted({f.rsplit("code=", 1)[1] for f in self.arch_flags()})

    def arch_flags(self) -> list[str]:
        """PyTorch's own interpretation of TORCH_CUDA_ARCH_LIST, which works in its CPU builds too."""
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            known = output(self.compiler, "--list-gpu-arch").split()
            usable = [a for a in CUDA_ARCHES if f"compute_{a.replace('.', '')}" in known]
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(usable) + "+PTX"
        return cpp_extension._get_cuda_arch_flags()

    def command(self) -> list[str]:
        """CMake compiles csrc/cuda with the same flags in the same order, so that ccache compiles it once for both."""
        parallel = ["--threads", MAX_JOBS] if len(self.arch_flags()) > 1 else []
        arches = [re.sub(r"^-gencode=(.*)code=(\w+)$", r"--generate-code=\1code=[\2]", f) for f in self.arch_flags()]
        return [self.compiler, "-forward-unknown-to-host-compiler", *self.host_compiler(), "-O3", "-DNDEBUG", *arches,
                "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", *parallel, "-Xfatbin", "-compress-all",
                f"-Xcompiler=-ffile-prefix-map={ROOT}/=", "-std=c++17", "-x", "cu"]  # fmt: skip

    def host_compiler(self) -> list[str]:
        """CXX as nvcc's host compiler, unless nvcc's own variables name one: nvcc accepts that option only once."""
        own = " ".join(os.environ.get(f"NVCC_{name}", "") for name in ("PREPEND_FLAGS", "APPEND_FLAGS"))
        if not os.environ.get("CXX") or os.environ.get("NVCC_CCBIN") or re.search("-ccbin|-compiler-bindir", own):
            return []
        compiler = next(word for word in CXX if Path(word).name not in ("ccache", "sccache", "distcc"))
        return ["-ccbin", shutil.which(compiler) or compiler]

    def link(self) -> list[str]:
        """The CUDA runtime. nvcc may be a script that calls another nvcc; then only the other's TOP is the toolkit."""
        command = [self.compiler, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        told = re.findall(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True).stderr, re.M)
        homes = dict.fromkeys(Path(home).resolve() for home in (Path(self.compiler).resolve().parents[1], *told))
        for home in homes:
            for pattern in ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"):
                for lib in home.glob(f"{pattern}/libcudart_static.a"):
                    return [str(lib), "-lrt", "-lpthread", "-ldl"]
        places = " or ".join(map(str, homes))
        stop(f"libcudart_static.a was not found in {places}: install the CUDA runtime's static library")


class Hip(Toolkit):
    sources = sorted(ROOT.glob("csrc/hip/*.hip"))
    tool, variables = "hipcc", ["ROCM_PATH", "ROCM_HOME"]
    install = "install ROCm (on Debian: apt-get install hipcc libamdhip64-dev), or set ROCM_PATH to where it is"

    def __init__(self) -> None:
        places = ["/opt/rocm", "/opt/rocm/core*", "/opt/rocm-*"]
        self.compiler = find_tool(self.tool, self.variables, cpp_extension.ROCM_HOME, places)
        self.environment = {"HIP_PLATFORM": "amd"}  # otherwise hipcc uses nvcc if it finds one
        self._arches: list[str] = []

    def describe(self) -> tuple[str, list[str]]:
        version = re.search(
            r"HIP version: ([\d.]+)", output(self.compiler, "--version", env={**os.environ, **self.environment})
        )
        return f"hipcc {version[1] if version else '?'}", self.arches()

    def arches(self) -> list[str]:
        if not self._arches:
            named = [a for a in re.split(r"[;,\s]+", os.environ.get("PYTORCH_ROCM_ARCH", "")) if a]
            with ThreadPoolExecutor(int(MAX_JOBS)) as pool:
                unknown = [] if named else ROCM_ARCHES
                built = pool.map(lambda arch: self._compiles(f"--offload-arch={arch}"), unknown)
                self._arches = named or [arch for arch, builds in zip(unknown, built, strict=True) if builds]
            if not self._arches:
                stop(f"{self.compiler} builds none of {', '.join(ROCM_ARCHES)}: set PYTORCH_ROCM_ARCH")
        return self._arches

    def _compiles(self, *flags: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.hip"
            probe.write_text("#include <hip/hip_runtime.h>\n__global__ void probe() {}\n")
            command = [self.compiler, *flags, "-c", "-o", f"{probe}.o", str(probe)]
            return subprocess.run(command, capture_output=True, env={**os.environ, **self.environment}).returncode == 0

    def command(self) -> list[str]:
        return [self.compiler, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-mcumode", "-ffp-contract=off",
                *PREFIXES, *self.parallel(), *(f"--offload-arch={a}" for a in self.arches())]  # fmt: skip

    def parallel(self) -> list[str]:
        """The option that compiles several targets at once. ROCm's clang has it, but Debian's hipcc uses LLVM's."""
        flag, first = f"-parallel-jobs={MAX_JOBS}", f"--offload-arch={self.arches()[0]}"
        return [flag] if len(self.arches()) > 1 and self._compiles(first, flag) else []

    def link(self) -> list[str]:
        return []  # not libamdhip64: PyTorch loads its own copy, and two in one process corrupt each other


TOOLKITS = {"cuda": Cuda(), "hip": Hip()}


def backends() -> list[str]:
    asked = [b for b in re.split(r"[,;\s]+", os.environ.get("GEMMA_NORM_BACKENDS", "").strip()) if b]
    for name in asked:
        if name not in ("cpu", *TOOLKITS):
            stop(f"GEMMA_NORM_BACKENDS may name cpu, cuda and hip, got {name}")
    served = torch_to_serve()
    if served:
        served.check()
    needed, built = gpu_backend(served), ["cpu"]
    for name, toolkit in TOOLKITS.items():
        if toolkit.compiler:
            built += [name] if name in asked or not asked else []
        elif name in asked:
            stop(f"GEMMA_NORM_BACKENDS asks for {name}, but {toolkit.missing()}")
        elif not asked and (name in needed or (toolkit.named() and not needed)):
            reason = f"{needed[name]}, but " if name in needed else ""
            stop(f"{reason}{toolkit.missing()}; or set GEMMA_NORM_BACKENDS=cpu to have no GPU kernels")
    return built


def extension(name: str) -> cpp_extension.CppExtension:
    sources = CPU if name == "cpu" else GPU
    return cpp_extension.CppExtension(
        f"{PACKAGE}.lib.libgemma_norm_{name}", [*sources, *CORE, f"csrc/torch/bind_{name}.cpp"],
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")],
        extra_compile_args=FLAGS, extra_link_args=[*LINK, "-Wl,-s"], py_limited_api=True,
    )  # fmt: skip


class BuildLibraries(cpp_extension.BuildExtension):
    """Compiles the kernels of each device with its own compiler, and the rest with PyTorch's extension builder."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # without a Python ABI, since the libraries do not use Python

    def build_extensions(self) -> None:
        if not shutil.which(CXX[0]):
            stop(
                f"{CXX[0]} was not found: install a C++17 compiler (on Debian: apt-get install g++), or set CXX to one"
            )
        info = {"cpu": {"compiler": output(*CXX, "--version").splitlines()[0]}}
        extensions = {ext.name.rsplit("_", 1)[1]: ext for ext in self.extensions}
        for name in [name for name in extensions if name in TOOLKITS]:
            compiler, architectures = TOOLKITS[name].describe()
            info[name] = {"compiler": compiler, "architectures": architectures}
        objects = self.compile_kernels({name: TOOLKITS.get(name) or Host() for name in extensions}, info)
        for name, ext in extensions.items():
            ext.extra_objects = objects[name]
            ext.depends += objects[name]  # else setuptools keeps the library if only the compiler or its flags changed
            ext.extra_link_args += TOOLKITS[name].link() if name in TOOLKITS else []
        super().build_extensions()
        version = self.distribution.get_version()
        text = '"""Written by setup.py."""\n\n'
        text += f"VERSION = {version!r}\nTORCH_VERSION = {torch.__version__!r}\nBUILD = {info!r}\n"
        package = Path(self.build_lib) / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(text)
        self.remove_stale(package)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: copy what was built into the package's own folder."""
        package = ROOT / "python" / PACKAGE
        (package / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / PACKAGE / "_build_info.py", package)
        self.remove_stale(package)

    def remove_stale(self, package: Path) -> None:
        for library in (package / "lib").glob("libgemma_norm_*.so"):
            if library.stem.rsplit("_", 1)[1] not in BACKENDS:
                library.unlink()

    def compile_kernels(self, compilers: dict[str, Host | Toolkit], info: dict) -> dict[str, list[str]]:
        """Compile the kernels of all devices with one ninja, MAX_JOBS sources at a time. Returns each device's objects.

        A source is compiled again only if it, a header or the command has changed.
        """
        folder = ROOT / "build" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        escaped = lambda p: str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        text, objects = "", {}
        for name, compiler in compilers.items():
            targets = {folder / f"{name}_{source.stem}.o": source for source in compiler.sources}
            objects[name] = [str(target) for target in targets]
            words = compiler.command()
            environment = "".join(f"{k}={v} " for k, v in compiler.environment.items())
            launcher = "ccache " if shutil.which("ccache") and Path(words[0]).name != "ccache" else ""
            architectures = ", ".join(info[name].get("architectures", []))
            text += (
                f"rule {name}\n  command = {environment}{launcher}{shlex.join(words).replace('$', '$$')}"
                f" -MD -MT $out -MF $out.d -c $in -o $out\n"
                f"  description = {compiler.tool} $name{architectures and f' for {architectures}'}\n"
                "  depfile = $out.d\n  deps = gcc\n"
                + "".join(
                    f"build {escaped(target)}: {name} {escaped(source)}\n  name = {source.relative_to(ROOT)}\n"
                    for target, source in targets.items()
                )
            )
        (folder / "build.ninja").write_text(text)
        if subprocess.run(["ninja", "-j", MAX_JOBS, "-C", str(folder)], check=False).returncode:
            stop("the kernels were not compiled; what the compiler said is above")
        return objects


BACKENDS = backends()
setup(
    ext_modules=[extension(name) for name in BACKENDS],
    cmdclass={
        "build_ext": BuildLibraries,
        "build_py": BuildModules,
        "bdist_wheel": PlatformWheel,
        "sdist": SourceArchive,
    },
)
