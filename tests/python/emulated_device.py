"""The fixture ``emulated``: the GPU kernels compiled for the host, as a module of tests/cpp/emulated_module.cpp."""

from __future__ import annotations

import importlib
import shutil
import sys
from types import ModuleType

import pytest

from build_tools import CPP_BUILD, ROOT, cmake, one_at_a_time


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    for tool in ("cmake", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not on the PATH")
    pybind11 = pytest.importorskip("pybind11")
    options = {
        "GEMMA_NORM_PYTHON": "ON",
        "Python3_EXECUTABLE": sys.executable,
        "PYTHON_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    build = CPP_BUILD  # `make test-cpp` has compiled the kernels already.
    if not (build / "CMakeCache.txt").exists():
        build = ROOT / "build" / "emulated"
        options |= {"GEMMA_NORM_CUDA": "OFF", "GEMMA_NORM_TESTS": "OFF"}
    with one_at_a_time():
        cmake("-S", str(ROOT), "-B", str(build), *(f"-D{k}={v}" for k, v in options.items()))
        cmake("--build", str(build), "--target", "gemma_norm_emulated_module", "-j2")
    sys.path.insert(0, str(build / "tests" / "cpp"))
    return importlib.import_module("gemma_norm_emulated_module")
