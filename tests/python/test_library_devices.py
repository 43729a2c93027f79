"""What libraries() says: which native libraries are loaded, and which GPUs they have code for."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch

import gemma_norm
from gemma_norm import _library


def test_libraries_tells_what_is_loaded_here():
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


def test_libraries_tells_why_a_library_is_not_loaded(monkeypatch):
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
    """A function that sets up a machine: GPUs with given properties, and a library compiled for given architectures."""

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
def test_a_gpu_that_the_library_has_no_code_for_is_unsupported(machine, flavour, properties, architectures, expected):
    machine(flavour, architectures, properties)
    library = gemma_norm.libraries()[flavour]
    assert library.unsupported_devices == ((f"cuda:0 (Stand-in) {expected}",) if expected else ())
    assert library.served_devices == (() if expected else ("cuda:0",))


def test_one_gpu_may_be_unsupported_beside_one_that_is_served(machine):
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
def test_which_code_runs_on_which_gpu(architectures, device, expected):
    assert _library.has_code_for(architectures, device) is expected
