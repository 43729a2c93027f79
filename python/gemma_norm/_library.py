"""The native libraries: which are built, which this PyTorch needs, and loading them."""

from __future__ import annotations

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
BACKENDS = ("cpu", "cuda", "hip")
_torch: Any = torch  # not all of it is typed


@dataclass(frozen=True)
class Backend:
    """What is known about one native library; see :func:`backends`."""

    name: str
    built: bool
    loaded: bool
    path: Path
    compiler: str
    architectures: tuple[str, ...]
    reason: str
    """Why it is not loaded; empty when it is."""
    unsupported_devices: tuple[str, ...]
    """Devices of this machine that it should serve and has no machine code for, each as a sentence."""


def backends() -> dict[str, Backend]:
    """Describe the native libraries ``cpu``, ``cuda`` and ``hip``: built, loaded, where, for which GPUs, why not.

    Calling it may initialise CUDA, since it asks each GPU for its architecture.
    """
    return {name: _describe(name) for name in BACKENDS}


def library_path(name: str) -> Path:
    return LIBRARY_DIR / f"libgemma_norm_{name}.so"


def gpu_backend() -> str | None:
    """The library that serves this PyTorch's GPUs; both kinds are device type "cuda" to PyTorch."""
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else None


def why_not_native(device_type: str) -> str:
    """Why tensors of ``device_type`` have no native kernel."""
    name = gpu_backend() if device_type == "cuda" else device_type if device_type in BACKENDS else None
    return _reason(name) if name else "gemma_norm has no kernels for such devices"


def _reason(name: str) -> str:
    if name in _loaded:
        return ""
    if name not in BUILD:
        return f"the {name} library was not built; rebuild with its toolkit installed"
    return f"this PyTorch ({torch.__version__}) is {_torch_flavour()}"


def has_code_for(architectures: tuple[str, ...], device: str) -> bool:
    """Does a library compiled for ``architectures`` hold code that ``device`` can run?

    ``sm_XY`` runs on its own major version from minor Y on, ``compute_XY`` (PTX) on everything from XY on, ``sm_XYa``
    on XY alone; a gfx target on itself alone.
    """
    if not device.startswith("sm_"):
        return device in architectures
    number = int(device[3:])
    for architecture in architectures:
        kind, _, version = architecture.partition("_")
        base = int(version.rstrip("af"))
        portable = not version.endswith("a") and base <= number
        if base == number or (portable and (kind == "compute" or base // 10 == number // 10)):
            return True
    return False


def load() -> None:
    """Load the CPU library, which defines the operators, and the one for this PyTorch's GPUs, if built."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"gemma_norm {VERSION} needs PyTorch {minimum} or newer, got {torch.__version__}")
    if "cpu" not in BUILD:
        raise ImportError("gemma_norm: the cpu library was not built, and it defines the operators; rebuild with it")
    for name in ("cpu", gpu_backend()):
        if name in BUILD and name not in _loaded:
            _load(name)


def operator_implementations() -> Any:
    """A torch.library.Library, which adds implementations to the operators for as long as it lives."""
    return _torch.library.Library("gemma_norm", "IMPL")


_loaded: set[str] = set()


def _load(name: str) -> None:
    path = library_path(name)
    built = f"built against PyTorch {TORCH_VERSION}, running {torch.__version__}"
    if not path.is_file():
        raise ImportError(f"gemma_norm: the {name} library is missing: {path} ({built}); reinstall gemma_norm")
    if damage := _damage(path):
        raise ImportError(f"gemma_norm: the {name} library is damaged: {path}: {damage}; reinstall gemma_norm")
    try:
        _torch.ops.load_library(str(path))
    except OSError as error:
        said = error.__cause__ or error  # the loader; PyTorch wraps it
        raise ImportError(f"gemma_norm: the {name} library does not load: {path} ({built}): {said}") from error
    _loaded.add(name)


def _damage(path: Path) -> str:
    """What is wrong with an ELF file that is not all there. The loader itself dies of a bus error on some."""
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


def _describe(name: str) -> Backend:
    info = BUILD.get(name, {})
    architectures = tuple(info.get("architectures", ()))
    unsupported = []
    if name in _loaded and name == gpu_backend() and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            device = (
                properties.gcnArchName.split(":")[0] if name == "hip" else f"sm_{properties.major}{properties.minor}"
            )
            if not has_code_for(architectures, device):
                has = ", ".join(architectures)
                unsupported.append(
                    f"cuda:{index} ({properties.name}) is {device}, the {name} library has code for {has}"
                )
    return Backend(
        name=name,
        built=name in BUILD,
        loaded=name in _loaded,
        path=library_path(name),
        compiler=str(info.get("compiler", "")),
        architectures=architectures,
        reason=_reason(name),
        unsupported_devices=tuple(unsupported),
    )
