"""The native libraries: which of them are built, which of them this PyTorch needs, and how they are loaded."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

try:
    from . import _build_info
    from ._build_info import TORCH_VERSION, VERSION
except ImportError as error:
    raise ImportError(
        f"gemma_norm is not built: {Path(__file__).parent / '_build_info.py'} is missing; "
        "run 'pip install --no-build-isolation -e .' in the source tree"
    ) from error

BUILD = cast("dict[str, dict[str, Any]]", _build_info.BUILD)
MINIMUM_TORCH = (2, 10)
LIBRARY_DIR = Path(__file__).parent / "lib"
LIBRARIES = ("cpu", "cuda", "hip")
_torch: Any = torch  # not all of it is typed

# The AMD processors that can run code for a generic processor. From LLVM's "User Guide for AMDGPU Backend"
# (AMDGPUUsage), table "AMDGPU Generic Processors".
GENERIC_PROCESSORS = {
    "gfx9-generic": "gfx900 gfx902 gfx904 gfx906 gfx909 gfx90c",
    "gfx9-4-generic": "gfx942 gfx950",
    "gfx10-1-generic": "gfx1010 gfx1011 gfx1012 gfx1013",
    "gfx10-3-generic": "gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036",
    "gfx11-generic": "gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153",
    "gfx12-generic": "gfx1200 gfx1201",
    "gfx12-5-generic": "gfx1250 gfx1251",
}


@dataclass(frozen=True)
class Library:
    """One native library, as :func:`libraries` describes it."""

    name: str
    built: bool
    loaded: bool
    path: Path
    compiler: str
    architectures: tuple[str, ...]
    reason: str
    """Why the library is not loaded; empty if it is."""
    served_devices: tuple[str, ...]
    """The devices of this machine that the library serves, by PyTorch's names; empty if it is not loaded."""
    unsupported_devices: tuple[str, ...]
    """A sentence for each GPU of this machine that the library has no machine code for.

    Such a GPU does no harm if another one is served: next to the GPU that computes there is often an integrated GPU or
    a display card. The installation is at fault if this is not empty and ``served_devices`` is.
    """


def libraries() -> dict[str, Library]:
    """Describe the native libraries ``cpu``, ``cuda`` and ``hip``.

    A :class:`Library` says whether it is built and loaded, where it is, for which GPUs it was compiled, and why it is
    not loaded. The call may initialise CUDA, since it asks each GPU for its architecture.
    """
    return {name: _describe(name) for name in LIBRARIES}


def library_path(name: str) -> Path:
    return LIBRARY_DIR / f"libgemma_norm_{name}.so"


def gpu_library() -> str | None:
    """The library for the GPUs of this PyTorch, which calls NVIDIA's and AMD's both "cuda"; None for a CPU build."""
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else None


def why_not_native(device_type: str) -> str:
    """The reason why there is no native kernel for tensors of ``device_type``; empty if there is one."""
    name = gpu_library() if device_type == "cuda" else device_type if device_type in LIBRARIES else None
    return _reason(name) if name else "gemma_norm has no kernels for such devices"


def _reason(name: str) -> str:
    if name in _loaded:
        return ""
    if name not in BUILD:
        return f"the {name} library was not built; rebuild with its toolkit installed"
    return f"this PyTorch ({torch.__version__}) is {_torch_flavour()}"


def has_code_for(architectures: tuple[str, ...], device: str) -> bool:
    """Whether a library that was compiled for ``architectures`` contains code that ``device`` can run.

    NVIDIA: code for ``sm_XY`` runs on devices of major version X and minor version Y or later. Code for ``compute_XY``
    (PTX) runs on every device from XY on. A final ``a`` restricts either to XY, a final ``f`` to major version X.

    AMD: both arguments are target IDs, a processor followed by settings of its features, such as
    ``gfx90a:sramecc+:xnack-``. Code runs on the processor that it names, or on all processors that its generic name
    stands for. The device must have each setting that the code names. Code that does not name a feature runs with
    either setting.
    """
    runs = _amd_code_runs if device.startswith("gfx") else _nvidia_code_runs
    return any(runs(architecture, device) for architecture in architectures)


def _amd_code_runs(target: str, device: str) -> bool:
    processor, *settings = target.split(":")
    device_processor, *device_settings = device.split(":")
    processors = GENERIC_PROCESSORS.get(processor, processor).split()
    return device_processor in processors and set(settings) <= set(device_settings)


def _nvidia_code_runs(architecture: str, device: str) -> bool:
    number = int(device.removeprefix("sm_"))
    kind, _, version = architecture.partition("_")
    base = int(version.rstrip("af"))
    if version.endswith("a"):
        return base == number
    same_major = base // 10 == number // 10
    return base <= number and (same_major or (kind == "compute" and not version.endswith("f")))


def unserved_gpus() -> dict[int, str]:
    """A sentence for each GPU that the loaded library has no machine code for, by index. May initialise CUDA."""
    name = gpu_library()
    if name not in _loaded or not torch.cuda.is_available():
        return {}
    architectures = tuple(BUILD[name].get("architectures", ()))
    unserved = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        device = properties.gcnArchName if name == "hip" else f"sm_{properties.major}{properties.minor}"
        if not has_code_for(architectures, device):
            has = f"the {name} library has code for {', '.join(architectures)}"
            unserved[index] = f"cuda:{index} ({properties.name}) is {device}, {has}"
    return unserved


def load() -> None:
    """Load the CPU library, which defines the operators, and the library for this PyTorch's GPUs, if it is built."""
    parsed = re.match(r"(\d+)\.(\d+)", torch.__version__)  # pre-releases too: 2.10.0a0+git, 2.10.0.dev20251101
    if parsed is None or (int(parsed[1]), int(parsed[2])) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"gemma_norm {VERSION} needs PyTorch {minimum} or newer, got {torch.__version__}")
    if "cpu" not in BUILD:
        raise ImportError("gemma_norm: the cpu library was not built, and it defines the operators; rebuild with it")
    for name in ("cpu", gpu_library()):
        if name in BUILD and name not in _loaded:
            _load(name)


def operator_implementations(owner: str) -> Any:
    """Return a torch.library.Library through which ``owner`` registers its implementations of the operators.

    ``owner`` is the name of the module that registers them. That module may run a second time in one process: it may be
    reloaded, or the package imported anew after its modules were dropped from ``sys.modules``. The implementations of
    the first run are then still registered. PyTorch refuses a second registration or warns of it, so those of the first
    run are removed here. Functions and modules of the first import keep working: they call the operators, and the
    operators call the new implementations.

    The Library lives as long as the operators, so ``owner`` need not keep a reference to it.
    """
    libraries: dict[str, Any] = _of_process("python_libraries", {})
    owner = owner.rpartition(".")[2]  # without the package, which may have been imported by another name
    if owner in libraries:
        libraries.pop(owner)._destroy()
    libraries[owner] = _torch.library.Library("gemma_norm", "IMPL")
    return libraries[owner]


_loaded: set[str] = set()


def _of_process(name: str, initial: Any) -> Any:
    """A value that a process has once, like the operators themselves, however often this module runs.

    It is ``initial`` on the first call with this ``name``, and the same object on every later one.
    """
    return vars(_torch.ops.gemma_norm).setdefault(f"_gemma_norm_{name}", initial)


def _load(name: str) -> None:
    path = library_path(name)
    built = f"built against PyTorch {TORCH_VERSION}, running {torch.__version__}"
    if not path.is_file():
        raise ImportError(f"gemma_norm: the {name} library is missing: {path} ({built}); reinstall gemma_norm")
    if damage := _damage(path):
        raise ImportError(f"gemma_norm: the {name} library is damaged: {path}: {damage}; reinstall gemma_norm")
    if str(path.resolve()) in _torch.ops.loaded_libraries:  # an earlier import of this package has loaded it
        version = _of_process("version", VERSION)
        if version != VERSION:
            raise ImportError(
                f"gemma_norm: this process has loaded {path} of version {version}, which has since been replaced by "
                f"version {VERSION}; restart Python"
            )
    else:
        if name == "cpu":
            _refuse_second_copy(path)
        try:
            _torch.ops.load_library(str(path))
        except OSError as error:
            said = error.__cause__ or error  # PyTorch wraps the loader's own error
            raise ImportError(f"gemma_norm: the {name} library does not load: {path} ({built}): {said}") from error
        _of_process("version", VERSION)
    _loaded.add(name)


def _refuse_second_copy(path: Path) -> None:
    """Raise ImportError if the operators are defined already. A second definition would end the process."""
    if not hasattr(_torch.ops.gemma_norm, "rms_norm"):
        return
    others = [Path(other) for other in _torch.ops.loaded_libraries if Path(other).name == path.name]
    if others:
        build_info = others[0].parent.parent / "_build_info.py"
        found = re.search(r"^VERSION = '(.*)'$", build_info.read_text(), re.MULTILINE) if build_info.is_file() else None
        other = f"{others[0]} (version {found[1] if found else 'unknown'})"
    else:
        other = "a library that PyTorch did not load"
    raise ImportError(
        f"gemma_norm: this process has loaded another copy of the library, {other}, and cannot load {path} (version "
        f"{VERSION}) as well; leave one of the two on Python's path (sys.path) and restart Python"
    )


def _damage(path: Path) -> str:
    """What is wrong with a truncated ELF file; empty if it is whole. The loader dies of a bus error on some of them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return f"not a 64-bit ELF file ({size} bytes)"
        phoff, shoff, _, _, phentsize, phnum, shentsize, shnum = struct.unpack_from("<QQIHHHHH", header, 32)
        file.seek(phoff)
        segments = file.read(phentsize * phnum)
    needed = max(phoff + phentsize * phnum, shoff + shentsize * shnum)
    if len(segments) == phentsize * phnum:
        for at in range(0, len(segments), phentsize):
            offset, _, _, file_size = struct.unpack_from("<QQQQ", segments, at + 8)
            needed = max(needed, offset + file_size)
    return f"truncated to {size} of {needed} bytes" if size < needed else ""


def _torch_flavour() -> str:
    if torch.version.hip:
        return f"a ROCm {torch.version.hip} build"
    return f"a CUDA {torch.version.cuda} build" if torch.version.cuda else "a CPU build"


def _describe(name: str) -> Library:
    info = BUILD.get(name, {})
    served: tuple[str, ...] = ("cpu",) if name == "cpu" and name in _loaded else ()
    unserved = {}
    if name in _loaded and name == gpu_library():
        unserved = unserved_gpus()
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        served = tuple(f"cuda:{index}" for index in range(count) if index not in unserved)
    return Library(
        name=name,
        built=name in BUILD,
        loaded=name in _loaded,
        path=library_path(name),
        compiler=str(info.get("compiler", "")),
        architectures=tuple(info.get("architectures", ())),
        reason=_reason(name),
        served_devices=served,
        unsupported_devices=tuple(unserved.values()),
    )
