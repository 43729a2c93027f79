"""Loading the native libraries: what libraries() says, and that nothing missing or broken is passed over."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
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


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with these folders first on sys.path."""
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n{code}"
    arguments = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_a_library_that_does_not_load_is_an_error_with_the_loaders_text(copied):
    """An executable is a whole ELF file, and not a library."""
    path = copied / "lib" / CPU_LIBRARY
    shutil.copyfile(Path(sys.executable).resolve(), path)
    message = python("import copied_norm", copied.parent).stderr
    assert f"ImportError: gemma_norm: the cpu library does not load: {path}" in message
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
from pathlib import Path
path = Path({str(copied)!r}) / "lib" / {CPU_LIBRARY!r}
whole = path.read_bytes()
for size in {sizes}:
    path.write_bytes(whole[:size])
    try:
        import copied_norm
        print("loaded")
    except ImportError as error:
        print(error)
"""
    process = python(code, copied.parent)
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


@pytest.mark.parametrize("version", ["2.9.1+cpu", "2.9.0a0+git1234567", "1.13.1", "2.9.0.dev20250901", "unknown"])
def test_an_old_pytorch_is_an_error(copied, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert f"needs PyTorch 2.10 or newer, got {version}" in import_error(copied)


@pytest.mark.parametrize(
    "version", ["2.10.0a0+git", "2.10.0.dev20251101", "2.10a0", "2.11.0rc1", "2.13.0+cu130", "3.0"]
)
def test_pre_releases_have_their_version(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _library.load()


@pytest.fixture
def two_copies(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders for sys.path with a gemma_norm each, of versions 1.2.3 and 4.5.6."""
    folders = (tmp_path / "one", tmp_path / "other")
    for folder, version in zip(folders, ("1.2.3", "4.5.6"), strict=True):
        ignored = shutil.ignore_patterns("__pycache__", "benchmark", "libgemma_norm_[!c]*")
        shutil.copytree(PACKAGE, folder / "gemma_norm", ignore=ignored)
        build_info = folder / "gemma_norm" / "_build_info.py"
        build_info.write_text(
            build_info.read_text().replace(f"VERSION = '{gemma_norm.__version__}'", f"VERSION = '{version}'")
        )
    return folders


FORGET = "for name in [name for name in sys.modules if name.split('.')[0] == 'gemma_norm']: del sys.modules[name]"


def test_a_second_copy_in_one_process_is_an_error(two_copies):
    """As with two environments on the path: the operators can be defined once, and the second time ends the process."""
    one, other = two_copies
    code = f"import gemma_norm\n{FORGET}\nsys.path.insert(0, {str(other)!r})\nimport gemma_norm"
    process = python(code, one)
    assert process.returncode == 1, process.stderr
    loaded, refused = (folder / "gemma_norm" / "lib" / CPU_LIBRARY for folder in two_copies)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gemma_norm: this process has loaded another copy of the library, ")
    assert f"{loaded} (version 1.2.3), and cannot load {refused} (version 4.5.6) as well" in last


def test_operators_that_nobody_knows_the_library_of_are_an_error(two_copies):
    one, _ = two_copies
    code = f"import ctypes, torch; ctypes.CDLL({str(one / 'gemma_norm' / 'lib' / CPU_LIBRARY)!r}); import gemma_norm"
    process = python(code, two_copies[1])
    assert process.returncode == 1 and "a library that PyTorch did not load, and cannot load" in process.stderr


def test_a_library_replaced_by_another_version_while_loaded_is_an_error(two_copies):
    one, _ = two_copies
    code = f"""
import gemma_norm
{FORGET}
with open(gemma_norm._build_info.__file__, "a") as file:
    file.write("VERSION = '4.5.678'")
import gemma_norm
"""
    process = python(code, one)
    assert process.returncode == 1
    assert "of version 1.2.3, which has since been replaced by version 4.5.678; restart Python" in process.stderr


AGAIN = {
    "its modules were dropped": f"{FORGET}\nimport gemma_norm",
    "twice": f"{FORGET}\nimport gemma_norm\n{FORGET}\nimport gc; gc.collect()\nimport gemma_norm; gc.collect()",
    "the package was reloaded": "importlib.reload(gemma_norm)",
    "its modules were reloaded": "for name in ('_library', '_registry', '_ops.rms_norm', 'routing', 'module'):\n"
    "    importlib.reload(sys.modules['gemma_norm.' + name])\nimportlib.reload(gemma_norm)",
    "under another name": "import pathlib, tempfile; alias = pathlib.Path(tempfile.mkdtemp())\n"
    "(alias / 'alias_norm').symlink_to(pathlib.Path(gemma_norm.__file__).parent)\n"
    "sys.path.insert(0, str(alias)); import alias_norm; gemma_norm = alias_norm",
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN.keys())
def test_importing_again_is_harmless(again):
    """As hosts do that reload what they run. Both imports work afterwards, and no registration is left of the first."""
    code = f"""
import gc, importlib, torch, gemma_norm
from torch._subclasses.fake_tensor import FakeTensorMode
old, old_module = gemma_norm, gemma_norm.RMSNorm(8)
old_registry = old._registry
told = []
old_registry._warn_once = told.append  # called by the first import's implementations alone
{again}
x = torch.randn(2, 8)
for package in (old, gemma_norm):
    expected = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    weight = torch.ones(8, requires_grad=True)
    y = package.rms_norm(x, weight)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(package.RMSNorm(8)(x), expected)
    torch.testing.assert_close(old_module(x), expected)
    with FakeTensorMode():
        assert package.rms_norm(torch.empty(3, 8), torch.empty(8)).shape == (3, 8)
    assert package.rms_norm(x.to("meta"), torch.ones(8, device="meta")).shape == (2, 8)
    functional = torch.func.functionalize(lambda x: package.rms_norm(x, weight.detach(), out=torch.empty_like(x)))(x)
    torch.testing.assert_close(functional, expected)
    nested = torch.nested.nested_tensor([x, x], layout=torch.jagged)
    try:
        package.rms_norm(nested, weight.detach())
    except RuntimeError as error:
        assert "x must be a dense tensor" in str(error), error
    else:
        raise AssertionError("a nested tensor was accepted")
    sparse = x.to_sparse()
    try:
        package.rms_norm(sparse, weight.detach())
    except RuntimeError as error:
        assert "must be" in str(error), error
    else:
        raise AssertionError("a sparse tensor was accepted")
assert not told
print("done")
"""
    process = python(code)
    assert process.returncode == 0 and process.stdout == "done\n", process.stderr
    assert process.stderr == ""


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
    libraries = gemma_norm.libraries()
    assert list(libraries) == ["cpu", "cuda", "hip"]
    cpu = libraries["cpu"]
    assert cpu.built and cpu.loaded and cpu.path.is_file() and cpu.compiler and not cpu.reason
    gpu = "hip" if torch.version.hip else "cuda" if torch.version.cuda else None
    for name in ("cuda", "hip"):
        library = libraries[name]
        assert library.loaded == (library.built and name == gpu)
        assert library.loaded or library.reason
        assert not library.built or (library.path.is_file() and library.compiler and library.architectures)
        assert library.unsupported_devices == ()
    assert cpu.served_devices == ("cpu",)
    assert not gpu or len(libraries[gpu].served_devices) == torch.cuda.device_count() * libraries[gpu].loaded


def test_backends_says_why_not(monkeypatch):
    monkeypatch.setattr(_library, "BUILD", {"cpu": {}, "cuda": {"architectures": ["sm_90"], "compiler": "nvcc 13.0"}})
    monkeypatch.setattr(_library, "_loaded", {"cpu"})
    monkeypatch.setattr(torch.version, "hip", None)
    for cuda, expected in ((None, "is a CPU build"), ("13.0", "is a CUDA 13.0 build")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        libraries = gemma_norm.libraries()
        assert expected in libraries["cuda"].reason and torch.__version__ in libraries["cuda"].reason
        assert libraries["cuda"].architectures == ("sm_90",) and libraries["cuda"].compiler == "nvcc 13.0"
        assert not libraries["hip"].built and "the hip library was not built" in libraries["hip"].reason


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A stand-in for GPUs with these properties, and a library compiled for these architectures."""

    def make(flavour: str, architectures: list[str], *gpus: dict[str, object]) -> None:
        monkeypatch.setattr(_library, "BUILD", {"cpu": {}, flavour: {"architectures": architectures}})
        monkeypatch.setattr(_library, "_loaded", {"cpu", flavour})
        monkeypatch.setattr(torch.version, "cuda", "13.0" if flavour == "cuda" else None)
        monkeypatch.setattr(torch.version, "hip", "7.0" if flavour == "hip" else None)
        devices = [types.SimpleNamespace(**{"name": "Stand-in", "total_memory": 2**34, **gpu}) for gpu in gpus]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: devices[int(str(index).removeprefix("cuda:"))]
        )

    return make


@pytest.mark.parametrize(
    ("flavour", "properties", "architectures", "expected"),
    [
        ("cuda", {"major": 8, "minor": 0}, ["sm_90"], "is sm_80, the cuda library has code for sm_90"),
        ("cuda", {"major": 9, "minor": 0}, ["sm_90"], ""),
        (
            "hip",
            {"gcnArchName": "gfx942:sramecc+:xnack-"},
            ["gfx90a", "gfx942:xnack+"],
            "is gfx942:sramecc+:xnack-, the hip library has code for gfx90a, gfx942:xnack+",
        ),
        ("hip", {"gcnArchName": "gfx90a:sramecc+:xnack-"}, ["gfx90a"], ""),
    ],
)
def test_a_gpu_that_the_library_has_no_code_for(machine, flavour, properties, architectures, expected):
    machine(flavour, architectures, properties)
    library = gemma_norm.libraries()[flavour]
    assert library.unsupported_devices == ((f"cuda:0 (Stand-in) {expected}",) if expected else ())
    assert library.served_devices == (() if expected else ("cuda:0",))


def test_a_gpu_without_code_beside_one_with(machine):
    machine("hip", ["gfx1100"], {"gcnArchName": "gfx1036"}, {"gcnArchName": "gfx1100"})
    assert list(_library.unserved_gpus()) == [0]
    library = gemma_norm.libraries()["hip"]
    assert library.served_devices == ("cuda:1",)
    assert library.unsupported_devices == ("cuda:0 (Stand-in) is gfx1036, the hip library has code for gfx1100",)


NVIDIA = [
    (("sm_90",), "sm_90", True),
    (("sm_80",), "sm_86", True),  # a later minor version of the same major one
    (("sm_86",), "sm_80", False),
    (("sm_80", "sm_90"), "sm_100", False),
    (("sm_90", "compute_90"), "sm_120", True),  # PTX
    (("compute_90",), "sm_80", False),
    (("sm_90a",), "sm_90", True),
    (("sm_100a", "compute_100a"), "sm_103", False),  # a: that one alone
    (("sm_100f",), "sm_103", True),  # f: its family
    (("compute_100f",), "sm_103", True),
    (("compute_100f",), "sm_120", False),
    ((), "sm_90", False),
]
# LLVM's "User Guide for AMDGPU Backend", llvm.org/docs/AMDGPUUsage.html. Section "Target ID" and table "AMDGPU Target
# Features": a setting that is named must be the device's, code that names none runs with either. Table "AMDGPU Generic
# Processors": the processors that each generic one stands for.
AMD = [
    (("gfx90a", "gfx942"), "gfx942", True),
    (("gfx90a",), "gfx942", False),
    (("gfx942",), "gfx942:sramecc+:xnack-", True),
    (("gfx942:sramecc+:xnack-",), "gfx942:sramecc+:xnack-", True),
    (("gfx942:xnack-",), "gfx942:sramecc+:xnack-", True),
    (("gfx942:xnack+",), "gfx942:sramecc+:xnack-", False),
    (("gfx942:xnack+", "gfx942:xnack-"), "gfx942:sramecc+:xnack-", True),
    (("gfx90a:sramecc+:xnack-",), "gfx90a:sramecc+:xnack-", True),
    (("gfx90a:sramecc+:xnack-",), "gfx90a:sramecc+:xnack+", False),
    (("gfx90a:sramecc-",), "gfx90a:sramecc+:xnack-", False),
    (("gfx90a:xnack-",), "gfx942:sramecc+:xnack-", False),
    (("gfx1100",), "gfx1036", False),
    (("gfx94",), "gfx942", False),
    (("gfx9-4-generic:xnack-",), "gfx942:sramecc+:xnack-", True),
    (("gfx9-4-generic:xnack+",), "gfx942:sramecc+:xnack-", False),
    (("gfx11-generic",), "gfx1200", False),
    ((), "gfx942", False),
    *(((generic,), device, generic == named)
      for generic in ("gfx9-generic", "gfx9-4-generic", "gfx10-1-generic", "gfx10-3-generic", "gfx11-generic",
                      "gfx12-generic", "gfx12-5-generic")
      for named, devices in {
          "gfx9-generic": ["gfx900:xnack-", "gfx902", "gfx904", "gfx906:sramecc+:xnack-", "gfx909", "gfx90c:xnack-"],
          "none": ["gfx908:sramecc+:xnack-", "gfx90a:sramecc+:xnack-", "gfx803", "gfx1170"],
          "gfx9-4-generic": ["gfx942:sramecc+:xnack-", "gfx950:sramecc+:xnack-"],
          "gfx10-1-generic": ["gfx1010:xnack-", "gfx1011", "gfx1012", "gfx1013"],
          "gfx10-3-generic": ["gfx1030", "gfx1031", "gfx1032", "gfx1033", "gfx1034", "gfx1035", "gfx1036"],
          "gfx11-generic": ["gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153"],
          "gfx12-generic": ["gfx1200", "gfx1201"],
          "gfx12-5-generic": ["gfx1250", "gfx1251"],
      }.items()
      for device in devices),
]  # fmt: skip


@pytest.mark.parametrize(("architectures", "device", "expected"), NVIDIA + AMD)
def test_which_code_runs_where(architectures, device, expected):
    assert _library.has_code_for(architectures, device) is expected


def test_the_libraries_have_no_python_abi():
    """One wheel serves every Python: nothing in the package depends on the interpreter that built it."""
    assert [path.name for path in PACKAGE.rglob("*.so") if ".cpython-" in path.name] == []
    assert b"libpython" not in (PACKAGE / "lib" / CPU_LIBRARY).read_bytes()


def test_importing_does_not_start_cuda():
    code = "import torch, gemma_norm; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_importing_brings_in_nothing_but_the_package():
    """PyTorch's compiler alone, which decorators of torch.compiler import, takes as long as ``import torch``."""
    code = "import torch; before = set(sys.modules); import gemma_norm; print(*sorted(set(sys.modules) - before))"
    process = python(code)
    assert process.returncode == 0, process.stderr
    loaded = process.stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx", "torch.distributed.tensor", "sympy")
    assert [name for name in heavy if name in loaded] == []
    assert packages - {"torch"} == {"gemma_norm"}  # no numpy, sympy, packaging or standard library
    assert len([name for name in loaded if name.startswith("torch")]) <= 20, loaded


def test_public_names_are_documented():
    names: list[ModuleType | type | object] = [getattr(gemma_norm, name) for name in gemma_norm.__all__]
    assert all(getattr(value, "__doc__", None) for value in names)
    assert (PACKAGE / "py.typed").is_file()
