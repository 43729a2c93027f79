"""What setup.py needs before it builds, and which compilers it chooses. Programs that do nothing stand in for
compilers.
"""

from __future__ import annotations

import glob
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from build_tools import ROOT, run, script


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs setup.py up to its call of setup(), by default without GPU compilers and with a CPU
    PyTorch.
    """
    for name in ("ROCM_PATH", "ROCM_HOME", "CUDA_HOME", "CUDA_PATH", "PYTORCH_ROCM_ARCH", "TORCH_CUDA_ARCH_LIST",
                 "GEMMA_NORM_BACKENDS", "MAX_JOBS", "CXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    script(tmp_path / "bin/ninja", "exit 0")
    script(tmp_path / "python/python", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python/python"))
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(cpp_extension, "ROCM_HOME", None)

    def load(
        version: str = "2.13.0", cuda: str | None = None, hip: str | None = None, **variables: str
    ) -> dict[str, Any]:
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


def refused(load: Callable[..., dict[str, Any]], **options: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        load(**options)
    line = str(stopped.value)
    assert line.startswith("gemma_norm: ") and "\n" not in line
    return line


def no_usual_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides what this machine has in /opt/rocm and /usr/local/cuda."""
    find = glob.glob
    monkeypatch.setattr(
        glob, "glob", lambda pattern: [p for p in find(pattern) if not p.startswith(("/opt/", "/usr/"))]
    )


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_told_that_linux_is_supported(load, monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    assert f"builds on Linux alone (x86-64, AArch64), got {system};" in refused(load)


@pytest.mark.parametrize("version", ["65.5.0", "75.8.2", "76.1.0"])
def test_an_old_setuptools_is_named_with_what_is_needed(load, monkeypatch, version):
    monkeypatch.setattr("setuptools.__version__", version)
    expected = f"gemma_norm: needs setuptools 77 or later, got {version}: pip install 'setuptools>=77' ninja"
    assert refused(load) == expected


def test_a_missing_pytorch_is_named(load, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "PyTorch 2.10 or later must be installed first" in refused(load)


def test_ninja_is_found_beside_a_python_that_is_not_activated(load, tmp_path):
    (tmp_path / "bin/ninja").rename(tmp_path / "python/ninja")
    load()
    assert shutil.which("ninja") == str(tmp_path / "python/ninja")
    (tmp_path / "python/ninja").unlink()
    assert refused(load) == "gemma_norm: ninja was not found: pip install 'setuptools>=77' ninja"


@pytest.mark.parametrize("version", ["2.9.1+rocm7.2", "2.9.1", "1.13.1"])
def test_an_older_pytorch_is_refused(load, version):
    assert f"needs PyTorch 2.10 or later, got {version};" in refused(load, version=version, GEMMA_NORM_BACKENDS="cpu")


@pytest.mark.parametrize("version", ["2.10.0a0+b558c986e8.nv25.11", "2.10.0.dev20251101+rocm7.0"])
def test_a_pre_release_serves_if_it_has_the_stable_abi(load, monkeypatch, tmp_path, version):
    libraries = tmp_path / "torch/lib"
    libraries.mkdir(parents=True)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    (libraries / "libtorch_cpu.so").write_bytes(b"\0torch_library_impl\0torch_parallel_for\0")
    load(version)
    (libraries / "libtorch_cpu.so").write_bytes(b"\0torch_library_impl\0")
    expected = f"needs PyTorch 2.10's stable ABI; {version} is older than its torch_parallel_for"
    assert refused(load, version=version).endswith(expected)


@pytest.mark.parametrize(
    "version", ["2.10.0a0+a36e1d39eb.nv25.11", "2.10.0.dev20251101+rocm7.0", "2.10.0+rocm7.1", "2.13.0"]
)
def test_pip_leaves_the_pytorch_that_is_there(version):
    specifiers = pytest.importorskip("packaging.specifiers")
    (requirement,) = re.findall(r'^dependencies = \["torch(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    wanted = specifiers.SpecifierSet(requirement)
    assert wanted.contains(version, prereleases=True) and not wanted.contains("2.9.1+rocm7.2", prereleases=True)


def test_in_pips_isolated_build_the_users_own_pytorch_is_asked(load, monkeypatch, tmp_path):
    overlay = "/tmp/pip-build-env-1/overlay/lib/python3/site-packages"
    monkeypatch.setattr(torch, "__file__", f"{overlay}/torch/__init__.py")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(cpp_extension.__file__).parents[2])
    )  # as pip sets it, to a PyTorch of its own
    shutil.rmtree(tmp_path / "python")
    made = run(sys._base_executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    assert load()["torch_to_serve"]() is None
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text("raise AssertionError('it need not be imported')")
    (site / "torch/version.py").write_text("__version__ = '2.9.1+rocm7.2'\ncuda = None\nhip = '7.2.26015'\n")
    assert "needs PyTorch 2.10 or later, got 2.9.1+rocm7.2;" in refused(load)


@pytest.mark.parametrize("prefix", ["{tmp}/build-env-5kk_w3hq", "/home/me/.cache/uv/builds-v0/.tmpZ3kD1a"])
def test_in_an_isolated_build_with_its_own_python_the_machine_tells(load, monkeypatch, prefix):
    """`python -m build` and uv build with a PyTorch of their own, PyPI's CUDA build. It tells nothing of the user's."""
    monkeypatch.setattr(sys, "prefix", prefix.format(tmp=tempfile.gettempdir()))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    no_usual_places(monkeypatch)
    defined = load(**CUDA)
    assert defined["torch_to_serve"]() is None and defined["BACKENDS"] == ["cpu"]


def test_a_virtual_environment_with_such_a_name_is_the_users_own(load, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/me/build-env-1")
    assert load(**ROCM, GEMMA_NORM_BACKENDS="cpu")["torch_to_serve"]().hip == ROCM["hip"]


ROCM, CUDA = {"hip": "7.1.0", "version": "2.11.0+rocm7.1"}, {"cuda": "12.8", "version": "2.11.0+cu128"}


@pytest.mark.parametrize(
    ("kind", "build", "tool"), [(ROCM, "ROCm 7.1.0", "hipcc"), (CUDA, "CUDA 12.8", "nvcc")], ids=["rocm", "cuda"]
)
def test_pytorch_for_a_gpu_without_its_compiler_is_an_error(load, monkeypatch, tmp_path, kind, build, tool):
    no_usual_places(monkeypatch)
    said = refused(load, **kind)
    assert f"this PyTorch ({kind['version']}) is a {build} build, but {tool} was not found: install " in said
    assert said.endswith("; or set GEMMA_NORM_BACKENDS=cpu to have no GPU kernels")
    assert load(**kind, GEMMA_NORM_BACKENDS="cpu")["BACKENDS"] == ["cpu"]
    monkeypatch.delenv("GEMMA_NORM_BACKENDS")
    other = {"hipcc": "nvcc", "nvcc": "hipcc"}[tool]
    script(tmp_path / "bin" / other, "exit 0")
    assert f"{tool} was not found" in refused(load, **kind)
    script(tmp_path / "bin" / tool, "exit 0")
    assert load(**kind)["BACKENDS"] == ["cpu", "cuda", "hip"]


def test_an_nvidia_gpu_needs_nvcc_where_no_pytorch_is_installed_yet(load, monkeypatch):
    gpu_backend = load()["gpu_backend"]
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    assert gpu_backend(None) == {"cuda": "this machine has an NVIDIA GPU"}
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert gpu_backend(None) == {}


@pytest.mark.parametrize(("variable", "tool"), [("ROCM_PATH", "hipcc"), ("CUDA_HOME", "nvcc")])
@pytest.mark.parametrize("asked", [False, True])
def test_a_variable_that_names_a_place_without_the_compiler_is_an_error(
    load, monkeypatch, tmp_path, variable, tool, asked
):
    script(tmp_path / "bin" / tool, "exit 0")  # on the PATH, and not what was asked for
    if asked:
        monkeypatch.setenv("GEMMA_NORM_BACKENDS", {"hipcc": "hip", "nvcc": "cuda"}[tool])
    said = refused(load, **{variable: "/elsewhere"})
    assert f"{tool} was not found: install " in said and f"; {variable} is /elsewhere, which has no bin/{tool}" in said
    assert said.startswith("gemma_norm: GEMMA_NORM_BACKENDS asks for ") == asked
    assert load(GEMMA_NORM_BACKENDS="cpu")["BACKENDS"] == ["cpu"]


def test_where_compilers_are_looked_for(load, monkeypatch, tmp_path):
    no_usual_places(monkeypatch)
    places = {name: str(tmp_path / name) for name in ("named", "home", "rocm/core-7.9", "rocm/core-7.10")}
    hipccs = {name: f"{folder}/bin/hipcc" for name, folder in places.items()}
    for hipcc in [*hipccs.values(), tmp_path / "bin/hipcc", tmp_path / "python/hipcc"]:
        script(Path(hipcc), "exit 0")
    find_tool = load()["find_tool"]

    def find(home: str | None = None) -> str | None:
        return find_tool("hipcc", ["ROCM_PATH", "ROCM_HOME"], home, [f"{tmp_path}/rocm", f"{tmp_path}/rocm/core*"])

    monkeypatch.setenv("ROCM_PATH", places["named"])
    assert find(places["home"]) == hipccs["named"]
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    assert find() == hipccs["rocm/core-7.10"]
    monkeypatch.delenv("ROCM_PATH")
    assert find(places["home"]) == hipccs["home"]  # PyTorch's own
    assert find() == str(tmp_path / "bin/hipcc")  # on the PATH
    (tmp_path / "bin/hipcc").unlink()
    assert find() == str(tmp_path / "python/hipcc")  # beside a Python that is not activated
    (tmp_path / "python/hipcc").unlink()
    assert find() == hipccs["rocm/core-7.10"]


def test_asking_for_hip_without_hipcc_ends_in_one_line(tmp_path):
    environment = {"GEMMA_NORM_BACKENDS": "hip", "ROCM_PATH": str(tmp_path)}
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, **environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout
    assert line.startswith(
        "gemma_norm: GEMMA_NORM_BACKENDS asks for hip, but hipcc was not found: install ROCm (on Debian"
    )


@pytest.fixture
def setup_py(load: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """setup.py's definitions, and a hipcc that knows gfx90a and gfx1100."""
    script(tmp_path / "bin/hipcc", 'case "$*" in *=gfx90a\\ *|*=gfx1100\\ *) ;; *) exit 1;; esac')
    return load(ROCM_PATH=str(tmp_path), GEMMA_NORM_BACKENDS="cpu")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("", ["gfx90a", "gfx1100"]),
        ("gfx942", ["gfx942"]),
        ("gfx942;gfx1201", ["gfx942", "gfx1201"]),
        ("gfx90a, gfx1030", ["gfx90a", "gfx1030"]),
        (" gfx1151 gfx950;", ["gfx1151", "gfx950"]),
    ],
)
def test_which_gpus_are_built_for(setup_py, monkeypatch, named, expected):
    monkeypatch.setenv("PYTORCH_ROCM_ARCH", named)
    hip = setup_py["Hip"]()
    assert [a.partition("=")[2] for a in hip.command() if a.startswith("--offload-arch=")] == expected
    assert hip.arches() == expected and hip.link() == []


def test_a_hipcc_that_builds_for_no_gpu_ends_in_one_line(setup_py, tmp_path):
    script(tmp_path / "bin/hipcc", "exit 1")
    with pytest.raises(
        SystemExit, match=r"^gemma_norm: .*/bin/hipcc builds none of gfx90a, .*: set PYTORCH_ROCM_ARCH$"
    ):
        setup_py["Hip"]().arches()


@pytest.mark.parametrize("knows", [True, False])
def test_targets_are_compiled_side_by_side_if_hipcc_can(load, tmp_path, knows):
    script(tmp_path / "bin/hipcc", "exit 0" if knows else 'case "$*" in *-parallel-jobs*) exit 1;; esac')
    hip = load(GEMMA_NORM_BACKENDS="cpu", MAX_JOBS="3", PYTORCH_ROCM_ARCH="gfx90a;gfx942")["Hip"]()
    assert [a for a in hip.command() if "jobs" in a] == (["-parallel-jobs=3"] if knows else [])


def test_nvcc_takes_cxx_unless_its_own_variables_name_a_compiler(load, monkeypatch, tmp_path):
    script(tmp_path / "bin/odd-c++", "exit 0")
    script(tmp_path / "bin/nvcc", "echo compute_90")
    cuda = load(CXX="ccache odd-c++ -m64", GEMMA_NORM_BACKENDS="cpu", MAX_JOBS="3")["Cuda"]()
    command = cuda.command()
    assert command[command.index("-ccbin") + 1] == str(tmp_path / "bin/odd-c++")
    assert command[command.index("--threads") + 1] == "3"
    for name, value in (("NVCC_CCBIN", "g++-13"), ("NVCC_PREPEND_FLAGS", "-ccbin=g++-13")):
        monkeypatch.setenv(name, value)
        assert "-ccbin" not in cuda.command()
        monkeypatch.delenv(name)
    monkeypatch.delenv("CXX")
    assert "-ccbin" not in cuda.command()


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/sbsa-linux/lib", "lib/x86_64-linux-gnu"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_where_the_static_cuda_runtime_is_looked_for(load, monkeypatch, tmp_path, folder, wrapped):
    toolkit = tmp_path / "toolkit" if wrapped else tmp_path
    script(tmp_path / "bin/nvcc", f"echo '#$ TOP={toolkit}/bin/..' >&2")
    cuda = load(GEMMA_NORM_BACKENDS="cpu")["Cuda"]()
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/libcudart_static.a").touch()
    with pytest.raises(SystemExit, match=f"^gemma_norm: libcudart_static.a was not found in {tmp_path}[ :].*install"):
        cuda.link()
    (toolkit / "bin").mkdir(parents=True, exist_ok=True)
    (toolkit / folder).mkdir(parents=True)
    (toolkit / folder / "libcudart_static.a").touch()
    library, *_ = cuda.link()
    assert Path(library).samefile(toolkit / folder / "libcudart_static.a")
