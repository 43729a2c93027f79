"""Compilers that compile csrc/hip for AMD GPUs without ROCm.

Debian's hipcc 5.2.3 stops at gfx90a. Its headers and device libraries serve clang-19 and ziglang's clang 22 for newer
GPUs: all that the libraries lack for those is one constant, the ISA version, generated here. Outputs stay in
build/amdgpu, by a hash of the sources and the command.

With HIP_7=<a folder into which pip has put triton 3.9.0>, every target is compiled by clang 22 with the headers of HIP
7.1 and the device libraries of ROCm 7, which that package holds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from file_lock import locked

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/hip").glob("*.hip"))
BUILD = ROOT / "build/amdgpu"
BITCODE = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")  # Debian's rocm-device-libs
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-mcumode"]  # setup.py's
HOST = [p for folder in ("core", "ops", "gpu") for p in sorted((ROOT / "csrc" / folder).glob("*.cpp"))]
HIP_7 = Path(os.environ["HIP_7"]).resolve() if os.environ.get("HIP_7") else None
HIP_5 = ["--rocm-path=/usr", "--hip-version=5.2.3", "-mcode-object-version=5", "-D__HIP_PLATFORM_AMD__"]


class Missing(Exception):
    """A tool is missing. The message says what to install."""


@dataclass(frozen=True)
class Target:
    arch: str
    isa_version: int  # as the device libraries count: 9402 is gfx942
    compiler: str  # a key of COMPILERS
    wave: int
    registers: int  # vector registers a SIMD has for each lane
    granule: int  # in which they are allocated
    max_waves: int  # a SIMD holds
    like: str = ""  # another target with nearly the same instructions for our kernels, which stands for it in make test

    def waves(self, registers: int) -> int:
        """How many waves a SIMD holds whose kernel needs that many registers."""
        allocated = -(-max(registers, 1) // self.granule) * self.granule
        return min(self.max_waves, self.registers // allocated)

    @property
    def rounds_to_bfloat16(self) -> bool:
        """It has an instruction for that, v_cvt_pk_bf16_f32."""
        return self.arch in ("gfx950", "gfx1250")


TARGETS = {
    t.arch: replace(t, compiler="zig, HIP 7") if HIP_7 else t
    for t in (
        Target("gfx90a", 9010, "hipcc", 64, 512, 8, 8, like="gfx942"),
        Target("gfx942", 9402, "clang", 64, 512, 8, 8),
        Target("gfx950", 9500, "zig", 64, 512, 8, 8, like="gfx942"),
        Target("gfx1100", 11000, "clang", 32, 1536, 24, 16),
        Target("gfx1101", 11001, "clang", 32, 1536, 24, 16, like="gfx1100"),
        Target("gfx1102", 11002, "clang", 32, 1024, 16, 16, like="gfx1100"),
        Target("gfx1150", 11500, "clang", 32, 1024, 16, 16, like="gfx1100"),
        Target("gfx1151", 11501, "clang", 32, 1536, 24, 16, like="gfx1100"),
        Target("gfx1200", 12000, "clang", 32, 1536, 24, 16, like="gfx1100"),
        Target("gfx1201", 12001, "clang", 32, 1536, 24, 16, like="gfx1100"),
        Target("gfx1250", 12500, "zig", 32, 1024, 16, 16, like="gfx1100"),
    )
}


def need(*tools: str, install: str) -> None:
    if missing := [t for t in tools if not (shutil.which(t) or Path(t).exists())]:
        raise Missing(f"{', '.join(missing)}: {install}")


def device_libraries(packages: Path | None = None) -> Path:
    """ROCm's device libraries for every target: Debian's, or those that triton brings where pip has put it."""
    need("llvm-as-15", install="apt-get install llvm-15")
    folder = BUILD / ("devlib-7" if packages else "devlib")
    with locked(folder / "lock"):
        return _make_device_libraries(folder, packages)


def _make_device_libraries(folder: Path, packages: Path | None) -> Path:
    newer = list((packages / "triton/backends/amd/lib").glob("oc*.bc")) if packages else []
    for library in [*newer, *BITCODE.glob("*.bc")]:  # Debian's have the constants, which the newer ones need too.
        if not (folder / library.name).exists():
            (folder / library.name).symlink_to(library)
    for target in TARGETS.values():
        out = folder / f"oclc_isa_version_{target.arch[3:]}.bc"
        if not out.exists():
            kind = "linkonce_odr hidden local_unnamed_addr addrspace(4) constant i32"
            text = f"@__oclc_ISA_version = {kind} {target.isa_version}\n"
            subprocess.run(["llvm-as-15", "-o", out, "-"], input=text.encode(), check=True)
    return folder


def hipcc() -> list[str]:
    need("hipcc", "/usr/include/hip/hip_runtime.h", install="apt-get install hipcc libamdhip64-dev")
    return ["hipcc", *FLAGS]


def clang() -> list[str]:
    need("clang++-19", "lld-19", install="apt-get install clang-19 lld-19 libclang-rt-19-dev clang-tools-19")
    need("/usr/include/hip/hip_runtime.h", str(BITCODE / "ockl.bc"), install="apt-get install hipcc libamdhip64-dev")
    libraries = f"--rocm-device-lib-path={device_libraries()}"
    return ["clang++-19", "-x", "hip", *FLAGS, *HIP_5, libraries, "-Wno-linker-warnings"]


def zig() -> list[str]:
    macros = "-D__AMDGCN_WAVEFRONT_SIZE=64"  # HIP 5's headers want it, clang 22 has dropped it
    return [*zig_clang(), *HIP_5, f"--rocm-device-lib-path={device_libraries()}", macros]


def zig_clang() -> list[str]:
    if not importlib.util.find_spec("ziglang"):
        raise Missing("ziglang: pip install ziglang")
    resources = next((p.parents[1] for p in Path("/usr/lib").glob("**/include/__clang_hip_runtime_wrapper.h")), None)
    if not resources:  # ziglang leaves HIP's wrapper headers out
        raise Missing("__clang_hip_runtime_wrapper.h: apt-get install hipcc libamdhip64-dev")
    resources_flags = ["-resource-dir", str(resources), "-Wno-linker-warnings"]
    return [sys.executable, "-m", "ziglang", "clang", "-x", "hip", *FLAGS, *resources_flags]


def zig_7() -> list[str]:
    assert HIP_7
    # The last version that is named is the one that counts.
    headers = [*HIP_5, "--hip-version=7.1", f"-I{hip_7_headers(HIP_7)}"]
    return [*zig_clang(), *headers, f"--rocm-device-lib-path={device_libraries(HIP_7)}"]


def hip_7_headers(packages: Path) -> Path:
    """HIP 7.1's headers, in the folder into which pip has put triton 3.9.0."""
    headers = packages / "triton/backends/amd/include"
    need(str(headers / "hip/hip_runtime.h"), install="pip install --no-deps --target <folder> triton==3.9.0")
    return headers


COMPILERS = {"hipcc": hipcc, "clang": clang, "zig": zig, "zig, HIP 7": zig_7}


@cache
def sources_hash() -> str:
    files = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".hip", ".cpp"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def build(name: str, command: list[str], inputs: str) -> Path:
    """Runs the command, plus `-o <result>`, unless build/amdgpu has its result already."""
    key = hashlib.sha256("\0".join([*command, inputs]).encode()).hexdigest()[:16]
    out = BUILD / key / name
    with locked(out.parent / "lock"):
        if not out.exists():
            _run(command, out)
    return out


def _run(command: list[str], out: Path) -> None:
    partial = out.with_name(f"partial-{out.name}")
    # ccache does not see that a compiler reads the device libraries.
    libraries = os.pathsep.join(map(str, sorted(BITCODE.glob("*.bc"))))
    environment = {**os.environ, "HIP_PLATFORM": "amd", "CCACHE_EXTRAFILES": libraries}
    done = subprocess.run([*command, "-o", str(partial)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.rename(out)


def _assembly(arch: str, source: Path) -> Path:
    compiler = TARGETS[arch].compiler
    launcher = ["ccache"] if shutil.which("ccache") and compiler in ("hipcc", "clang") else []
    command = [*launcher, *COMPILERS[compiler](), "--offload-device-only", f"--offload-arch={arch}", "-S"]
    return build(f"{arch}_{source.stem}.s", [*command, str(source)], sources_hash())


_compiling: dict[str, list[Future[Path]]] = {}
_two_at_a_time = ThreadPoolExecutor(2)


def compile_assemblies(arch: str) -> list[Future[Path]]:
    """Begins to compile for that target, unless that was begun before. See :func:`assemblies`."""
    if arch not in _compiling:
        sources = [source for source in SOURCES if source.stem != "entry"]
        _compiling[arch] = [_two_at_a_time.submit(_assembly, arch, source) for source in sources]
    return _compiling[arch]


def assemblies(arch: str) -> list[Path]:
    """The assembly of each source that has kernels. Raises Missing if there is no compiler for the target."""
    return [compiled.result() for compiled in compile_assemblies(arch)]


def compile_no_more() -> None:
    """Drops the compilations that have not begun: else Python would finish them before it exits."""
    _two_at_a_time.shutdown(wait=False, cancel_futures=True)


def shared_library(name: str, command: list[str], sources: list[Path], inputs: str) -> Path:
    """A library of C++ sources, and of what `command` makes of the HIP sources; their HIP symbols stay undefined."""
    link = ["g++", "-shared", "-fPIC", "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    hip_sources = SOURCES if command else []
    objects = [build(f"{name}_{source.stem}.o", [*command, "-c", str(source)], inputs) for source in hip_sources]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}"]
    return build(f"lib{name}.so", [*link, *includes, *map(str, [*sources, *objects])], inputs)


def hip_library(compiler: str, arches: list[str]) -> Path:
    """The HIP library without PyTorch, as setup.py builds it but for its visible symbols."""
    offload = [f"--offload-arch={arch}" for arch in arches]
    return shared_library(f"hip_{compiler}", [*COMPILERS[compiler](), *offload], HOST, sources_hash())


def cases_library() -> Path:
    """The C++ tests' cases and the kernels compiled for the host, for cases.cpp."""
    parts = [
        "cases",
        "all_cases",
        "gradient_cases",
        "operand",
        "reference",
        "gradient_reference",
        "runner",
        "rope_cases",
        "rope_runner",
        "host_target",
    ]
    tests = [ROOT / f"tests/cpp/{part}.cpp" for part in parts] + sorted((ROOT / "tests/cpp").glob("emulated_*.cpp"))
    tests = [source for source in tests if source.stem not in ("emulated_module", "emulated_machine_test")]
    inputs = b"".join(p.read_bytes() for p in sorted((ROOT / "tests/cpp").glob("*.*"))).hex() + sources_hash()
    here = Path(__file__).with_name("cases.cpp")
    return shared_library("cases", [], [here, *tests, *HOST], inputs + here.read_text())


def code_object(arch: str) -> Path:
    """What the loader takes, made of the assembly, for a GPU that no compiler here can put into a library."""
    need("ld.lld-19", install="apt-get install lld-19")
    zig_clang = [sys.executable, "-m", "ziglang", "clang"]
    assemble = [*zig_clang, "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-x", "assembler", "-c"]
    sources = assemblies(arch)
    text = "".join(source.read_text() for source in sources)
    objects = [build(f"{source.stem}.o", [*assemble, str(source)], text) for source in sources]
    # Two sources have sum_chunks(), the same in both.
    link = ["ld.lld-19", "-shared", "--allow-multiple-definition"]
    return build(f"{arch}.hsaco", [*link, *map(str, objects)], text)
