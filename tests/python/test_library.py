"""Loading the native libraries: what backends() says, and that nothing missing or broken is passed over."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gemma_norm
from gemma_norm import _library

PACKAGE = Path(gemma_norm.__file__).parent
CPU_LIBRARY = "libgemma_norm_cpu.so"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package under another name: nothing is registered as long as its library does not load."""
    target = tmp_path / "copied_norm"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "benchmark", "libgemma_norm_[!c]*"))
    return target


def import_error(package: Path) -> str:
    sys.path.insert(0, str(package.parent))
    importlib.invalidate_caches()
    try:
        with pytest.raises(ImportError) as caught:
            importlib.import_module(package.name)
        return str(caught.value)
    finally:
        sys.path.remove(str(package.parent))
        for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
            del sys.modules[name]


def test_a_missing_library_is_an_error(copied):
    path = copied / "lib" / CPU_LIBRARY
    path.unlink()
    message = import_error(copied)
    assert f"the cpu library is missing: {path}" in message and "reinstall" in message


def test_a_library_that_does_not_load_is_an_error_with_the_loaders_text(copied):
    """An executable is a whole ELF file, and not a library."""
    path = copied / "lib" / CPU_LIBRARY
    shutil.copyfile(Path(sys.executable).resolve(), path)
    message = import_error(copied)
    assert f"the cpu library does not load: {path}" in message
    assert f"running {torch.__version__}" in message
    assert "dynamically load" in message  # "cannot dynamically load (position-independent) executable"


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02" + bytes(20)])
def test_a_file_that_is_no_library_is_an_error(copied, content):
    path = copied / "lib" / CPU_LIBRARY
    path.write_bytes(content)
    assert f"the cpu library is damaged: {path}: not a 64-bit ELF file ({len(content)} bytes)" in import_error(copied)


def test_a_truncated_library_is_an_error(copied):
    """In a process of its own, since the loader dies of a bus error on a truncated file, unless it is stopped."""
    whole = (copied / "lib" / CPU_LIBRARY).read_bytes()
    sizes = [64, 4096, len(whole) // 4, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 1]
    code = f"""
import sys
from pathlib import Path
path = Path({str(copied)!r}) / "lib" / {CPU_LIBRARY!r}
whole = path.read_bytes()
sys.path.insert(0, {str(copied.parent)!r})
for size in {sizes}:
    path.write_bytes(whole[:size])
    try:
        import copied_norm
        print("loaded")
    except ImportError as error:
        print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(sizes)
    for line, size in zip(lines, sizes, strict=True):
        assert f"the cpu library is damaged: {copied / 'lib' / CPU_LIBRARY}: truncated to {size} of" in line


def test_a_package_that_was_not_built_says_how(copied):
    (copied / "_build_info.py").unlink()
    message = import_error(copied)
    assert "gemma_norm is not built" in message and "pip install --no-build-isolation -e ." in message


def edit_build(package: Path, line: str) -> None:
    with (package / "_build_info.py").open("a") as file:
        file.write(f"\n{line}\n")


def test_a_package_without_the_cpu_library_is_an_error(copied):
    edit_build(copied, "BUILD = {'cuda': {}}")
    assert "the cpu library was not built" in import_error(copied)


def test_an_old_pytorch_is_an_error(copied, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    message = import_error(copied)
    assert "needs PyTorch 2.10 or newer, got 2.9.1+cpu" in message


@pytest.mark.parametrize("flavour", ["cuda", "hip"])
def test_the_gpu_library_that_this_pytorch_needs_must_load(monkeypatch, tmp_path, flavour):
    """As on a GPU build of PyTorch whose gemma_norm has lost its library."""
    monkeypatch.setattr(torch.version, "cuda", "13.0" if flavour == "cuda" else None)
    monkeypatch.setattr(torch.version, "hip", "7.0" if flavour == "hip" else None)
    monkeypatch.setattr(_library, "BUILD", {"cpu": {}, "cuda": {}, "hip": {}})
    monkeypatch.setattr(_library, "_loaded", {"cpu"})
    monkeypatch.setattr(_library, "LIBRARY_DIR", tmp_path)
    with pytest.raises(ImportError, match=rf"the {flavour} library is missing: {tmp_path}/libgemma_norm_{flavour}\.so"):
        _library.load()


def test_backends_here():
    backends = gemma_norm.backends()
    assert list(backends) == ["cpu", "cuda", "hip"]
    cpu = backends["cpu"]
    assert cpu.built and cpu.loaded and cpu.path.is_file() and cpu.compiler and not cpu.reason
    gpu = "hip" if torch.version.hip else "cuda" if torch.version.cuda else None
    for name in ("cuda", "hip"):
        backend = backends[name]
        assert backend.loaded == (backend.built and name == gpu)
        assert backend.loaded or backend.reason
        assert not backend.built or (backend.path.is_file() and backend.compiler and backend.architectures)
        assert backend.unsupported_devices == ()


def test_backends_says_why_not(monkeypatch):
    monkeypatch.setattr(_library, "BUILD", {"cpu": {}, "cuda": {"architectures": ["sm_90"], "compiler": "nvcc 13.0"}})
    monkeypatch.setattr(_library, "_loaded", {"cpu"})
    monkeypatch.setattr(torch.version, "hip", None)
    for cuda, expected in ((None, "is a CPU build"), ("13.0", "is a CUDA 13.0 build")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        backends = gemma_norm.backends()
        assert expected in backends["cuda"].reason and torch.__version__ in backends["cuda"].reason
        assert backends["cuda"].architectures == ("sm_90",) and backends["cuda"].compiler == "nvcc 13.0"
        assert not backends["hip"].built and "the hip library was not built" in backends["hip"].reason


@pytest.mark.parametrize(
    ("flavour", "properties", "architectures", "expected"),
    [
        ("cuda", {"major": 8, "minor": 0}, ["sm_90"], "is sm_80, the cuda library has code for sm_90"),
        ("cuda", {"major": 9, "minor": 0}, ["sm_90"], ""),
        (
            "hip",
            {"gcnArchName": "gfx942:sramecc+:xnack-"},
            ["gfx90a"],
            "is gfx942, the hip library has code for gfx90a",
        ),
        ("hip", {"gcnArchName": "gfx90a:sramecc+:xnack-"}, ["gfx90a"], ""),
    ],
)
def test_a_gpu_that_the_library_has_no_code_for(monkeypatch, flavour, properties, architectures, expected):
    monkeypatch.setattr(_library, "BUILD", {"cpu": {}, flavour: {"architectures": architectures}})
    monkeypatch.setattr(_library, "_loaded", {"cpu", flavour})
    monkeypatch.setattr(torch.version, "cuda", "13.0" if flavour == "cuda" else None)
    monkeypatch.setattr(torch.version, "hip", "7.0" if flavour == "hip" else None)
    device = type("Properties", (), {"name": "Stand-in", **properties})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    unsupported = gemma_norm.backends()[flavour].unsupported_devices
    assert unsupported == ((f"cuda:0 (Stand-in) {expected}",) if expected else ())


@pytest.mark.parametrize(
    ("architectures", "device", "expected"),
    [
        (("sm_90",), "sm_90", True),
        (("sm_80",), "sm_86", True),  # a later minor version of the same major one
        (("sm_86",), "sm_80", False),
        (("sm_80", "sm_90"), "sm_100", False),
        (("sm_90", "compute_90"), "sm_120", True),  # PTX
        (("compute_90",), "sm_80", False),
        (("sm_90a",), "sm_90", True),
        (("sm_100a", "compute_100a"), "sm_103", False),  # a: that one alone
        (("sm_100f",), "sm_103", True),  # f: its family
        (("gfx90a", "gfx942"), "gfx942", True),
        (("gfx90a",), "gfx942", False),
        ((), "sm_90", False),
    ],
)
def test_which_code_runs_where(architectures, device, expected):
    assert _library.has_code_for(architectures, device) is expected


def test_the_libraries_have_no_python_abi():
    """One wheel serves every Python: nothing in the package depends on the interpreter that built it."""
    assert [path.name for path in PACKAGE.rglob("*.so") if ".cpython-" in path.name] == []
    assert b"libpython" not in (PACKAGE / "lib" / CPU_LIBRARY).read_bytes()


def test_importing_does_not_start_cuda():
    code = "import torch, gemma_norm; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_public_names_are_documented():
    names: list[ModuleType | type | object] = [getattr(gemma_norm, name) for name in gemma_norm.__all__]
    assert all(getattr(value, "__doc__", None) for value in names)
    assert (PACKAGE / "py.typed").is_file()
