"""Loading the native libraries: nothing missing or broken is passed over, and importing again is harmless."""

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
    """A copy of the package under another name. It registers no operator as long as its library does not load."""
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
    """Runs the code in a process of its own, with these folders first on sys.path."""
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n{code}"
    arguments = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_a_library_that_does_not_load_is_an_error_with_the_loaders_text(copied):
    """An executable in its place: a whole ELF file, but no library."""
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
    """It must be noticed before it is loaded: the loader would end the process with a bus error."""
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
def test_pre_releases_count_as_their_version(monkeypatch, version):
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
    """As with two environments on the path. PyTorch would end the process when operators are defined a second time."""
    one, other = two_copies
    code = f"import gemma_norm\n{FORGET}\nsys.path.insert(0, {str(other)!r})\nimport gemma_norm"
    process = python(code, one)
    assert process.returncode == 1, process.stderr
    loaded, refused = (folder / "gemma_norm" / "lib" / CPU_LIBRARY for folder in two_copies)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gemma_norm: this process has loaded another copy of the library, ")
    assert f"{loaded} (version 1.2.3), and cannot load {refused} (version 4.5.6) as well" in last


def test_operators_that_an_unknown_library_has_defined_are_an_error(two_copies):
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
    """Some programs reload the modules that they run. Both imports must work afterwards, and must not call the first
    import's implementations.
    """
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
    """On a GPU build of PyTorch, a gemma_norm that has lost its GPU library is an error."""
    monkeypatch.setattr(torch.version, "cuda", "13.0" if flavour == "cuda" else None)
    monkeypatch.setattr(torch.version, "hip", "7.0" if flavour == "hip" else None)
    monkeypatch.setattr(_library, "BUILD", {"cpu": {}, "cuda": {}, "hip": {}})
    monkeypatch.setattr(_library, "_loaded", {"cpu"})
    monkeypatch.setattr(_library, "LIBRARY_DIR", tmp_path)
    with pytest.raises(ImportError, match=rf"the {flavour} library is missing: {tmp_path}/libgemma_norm_{flavour}\.so"):
        _library.load()


def test_the_libraries_have_no_python_abi():
    """One wheel serves every Python: nothing in the package depends on the interpreter that built it."""
    assert [path.name for path in PACKAGE.rglob("*.so") if ".cpython-" in path.name] == []
    assert b"libpython" not in (PACKAGE / "lib" / CPU_LIBRARY).read_bytes()


def test_importing_does_not_start_cuda():
    code = "import torch, gemma_norm; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_importing_brings_in_nothing_but_the_package():
    """PyTorch's compiler, for one, takes as long to import as torch itself, and decorators of torch.compiler
    import it.
    """
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
