"""setup.py builds the HIP library, and a stand-in for a ROCm PyTorch loads it: a CPU build of PyTorch that says it is
one.

hipcc compiles the kernels for one GPU. Beneath the loaded library lies C that notes what is launched; nothing runs.
"""

from __future__ import annotations

import filecmp
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import gemma_norm
from build_tools import ROOT, run, script

PACKAGE = Path(gemma_norm.__file__).parent
HIP_LIBRARY = "libgemma_norm_hip.so"
HIPCC = shutil.which("hipcc") or shutil.which("/opt/rocm/bin/hipcc")
pytestmark = pytest.mark.skipif(
    bool(torch.version.hip or torch.version.cuda), reason="needs a CPU build of PyTorch: make test-python installs one"
)

ROCM = """
import torch
torch.version.hip, torch.version.cuda = "7.0.0", None
"""
BUILD = f"""{ROCM}
torch.cuda._is_compiled = lambda: True
import runpy, setuptools, sys
from torch.utils import cpp_extension
from torch.utils.hipify import hipify_python

def refuse(*args, **options):
    raise AssertionError("PyTorch was asked to translate or compile device code")

def hip_alone(ext_modules, **options):
    setup(ext_modules=[e for e in ext_modules if e.name.endswith("_hip")], **options)

assert cpp_extension.IS_HIP_EXTENSION
cpp_extension.CUDAExtension = hipify_python.hipify = refuse
setup, setuptools.setup = setuptools.setup, hip_alone
sys.argv = ["setup.py", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
runpy.run_path("setup.py", run_name="__main__")
"""
RUNTIME = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef struct { unsigned x, y, z; } dim3;
void** __hipRegisterFatBinary(const void* binary) { static void* handle; return &handle; }
void __hipRegisterFunction(void) {}
void __hipUnregisterFatBinary(void** handle) {}
int __hipPopCallConfiguration(void) { abort(); }  // of <<<>>>, which is not used
int hipGetDevice(int* device) { return *device = 0; }
int hipDeviceGetAttribute(int* value, int attribute, int device) { *value = 64; return 0; }
const char* hipGetErrorString(int error) { return "an error of the stand-in"; }
int aoti_torch_get_current_device_index(int32_t* index) { *index = 3; return 0; }
int aoti_torch_create_device_guard(int32_t index, void** guard) { printf("device %d\n", index); *guard = 0; return 0; }
int aoti_torch_get_current_cuda_stream(int32_t index, void** stream) { *stream = (void*)0x5eed; return 0; }
int hipLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared, void* stream) {
  printf("grid %u %u %u stream %p\n", grid.x, grid.y, grid.z, stream);
  fflush(stdout);
  return getenv("LAUNCH_ERROR") ? atoi(getenv("LAUNCH_ERROR")) : 0;
}
"""
LOAD = f"""{ROCM}
import json, logging, os
logging.basicConfig(format="%(message)s", level=logging.INFO)
import gemma_norm
print(json.dumps({{name: [b.loaded, b.reason] for name, b in gemma_norm.libraries().items()}}), flush=True)
x, weight = torch.ones(5, 2048), torch.zeros(2048)
with torch.no_grad():  # the operator's own CUDA kernel, under the name that ROCm goes by, with tensors of the CPU
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    torch.ops.gemma_norm.rms_norm.default.redispatch(gpu, x, weight)
    os.environ["LAUNCH_ERROR"] = "209"  # hipErrorNoBinaryForGpu
    try:
        torch.ops.gemma_norm.rms_norm.default.redispatch(gpu, x, weight)
    except RuntimeError as error:
        print(error)
    norm, seen = gemma_norm.GemmaRMSNorm(2048, eps=0.0), []
    assert bool((norm.forward_hip(x) == 1).all())  # logs its choice
    type(norm).forward_hip = lambda self, *args: seen.append(args)
    norm(type("OnGpu", (), {{"is_cuda": True}})())
    assert len(seen) == 1
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which the HIP library was built into out/gemma_norm. hipcc.log has hipcc's
    arguments.
    """
    if not HIPCC:
        pytest.skip("hipcc is missing: apt-get install hipcc libamdhip64-dev")
    tree = tmp_path_factory.mktemp("rocm")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    shutil.copytree(tree / "csrc", tree / "before/csrc")
    # With ccache, kernels that the package's own build has compiled for this GPU are not compiled again. CCACHE_BASEDIR
    # makes the paths relative, so that both builds have the same.
    cached = f"-u CCACHE_DISABLE CCACHE_BASEDIR={tree} ccache" if shutil.which("ccache") else ""
    script(
        tree / "rocm/bin/hipcc",
        f'echo "$HIP_PLATFORM" "$@" >> {tree}/hipcc.log; exec env -u ROCM_PATH {cached} {HIPCC} "$@"',
    )
    environment = {"ROCM_PATH": str(tree / "rocm"), "PYTORCH_ROCM_ARCH": "gfx90a", "GEMMA_NORM_BACKENDS": "hip"}
    done = run(sys.executable, "-c", BUILD, cwd=tree, **environment, MAX_JOBS="2", CCACHE_DISABLE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tree


def test_hipcc_compiles_the_kernels_as_they_are(tree):
    compilations = [line.split() for line in (tree / "hipcc.log").read_text().splitlines() if " -c " in line]
    assert {command[command.index("-c") + 1] for command in compilations} == set(map(str, tree.glob("csrc/hip/*.hip")))
    for command in compilations:
        assert command[0] == "amd" and [a for a in command if "--offload-arch" in a] == ["--offload-arch=gfx90a"]
    sources = {p.relative_to(tree / "before") for p in (tree / "before").rglob("*") if p.is_file()}
    assert sources and {p.relative_to(tree) for p in (tree / "csrc").rglob("*") if p.is_file()} == sources
    assert all(filecmp.cmp(tree / "before" / p, tree / p, shallow=False) for p in sources)
    built = runpy.run_path(str(tree / "out/gemma_norm/_build_info.py"))["BUILD"]
    assert built["hip"]["architectures"] == ["gfx90a"] and re.fullmatch(r"hipcc \d[\d.]+", built["hip"]["compiler"])
    assert list(built) == ["cpu", "hip"]


def test_the_hip_runtime_is_the_one_that_pytorch_brings(tree):
    library = tree / "out/gemma_norm/lib" / HIP_LIBRARY
    dynamic = run("readelf", "-dW", library, cwd=tree).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed and not any("hip" in name or "python" in name for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    undefined = set(run("nm", "-D", "--undefined-only", "--format=just-symbols", library, cwd=tree).stdout.split())
    assert {"hipLaunchKernel", "__hipRegisterFatBinary"} <= undefined
    assert not [name for name in undefined if name.startswith("cuda")]


def test_the_library_does_not_say_where_it_was_built(tree):
    built = (tree / "out/gemma_norm/lib" / HIP_LIBRARY).read_bytes()
    assert b"csrc/torch/bind_hip.cpp" in built  # error messages name it
    folders = [str(tree).encode(), str(Path(torch.__file__).parent).encode()]
    assert not [folder for folder in folders if folder in built]


@pytest.fixture(scope="module")
def site(tree: Path) -> Path:
    """The package with the HIP library that was built, the CPU library, and a CUDA library that must not be loaded."""
    package = tree / "site/gemma_norm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "benchmark", "libgemma_norm_[!c]*"))
    shutil.copy(tree / "out/gemma_norm/lib" / HIP_LIBRARY, package / "lib")
    (package / "lib/libgemma_norm_cuda.so").write_text("no library at all")
    info = (tree / "out/gemma_norm/_build_info.py").read_text()
    (package / "_build_info.py").write_text(f"{info}BUILD['cuda'] = {{}}\n")
    return package.parent


def test_a_rocm_pytorch_loads_and_calls_the_hip_library(tree, site):
    (tree / "runtime.c").write_text(RUNTIME)
    made = run("cc", "-w", "-shared", "-fPIC", "-o", "runtime.so", "runtime.c", cwd=tree)
    assert made.returncode == 0, made.stderr
    done = run(sys.executable, "-c", LOAD, cwd=tree, PYTHONPATH=str(site), LD_PRELOAD=str(tree / "runtime.so"))
    assert done.returncode == 0, done.stderr
    libraries, *calls = done.stdout.splitlines()
    rocm = f"this PyTorch ({torch.__version__}) is a ROCm 7.0.0 build"
    assert json.loads(libraries) == {"cpu": [True, ""], "cuda": [False, rocm], "hip": [True, ""]}
    # The tensors' device (a CPU tensor's index is -1) is made current, the kernel launched in PyTorch's stream.
    assert calls[:4] == ["device -1", "grid 5 1 1 stream 0x5eed"] * 2
    assert "rms_norm: " in calls[4] and "no code for this GPU" in calls[4] and len(calls) == 5
    assert "forward_hip uses our HIP library" in done.stderr


def test_without_a_hip_runtime_the_loaders_words_are_shown(tree, site):
    done = run(sys.executable, "-c", LOAD, cwd=tree, PYTHONPATH=str(site))
    error = done.stderr.splitlines()[-1]
    assert done.returncode and error.startswith("ImportError: gemma_norm: the hip library does not load: ")
    assert f"{site / 'gemma_norm/lib' / HIP_LIBRARY} " in error
    assert f"running {torch.__version__}" in error and re.search(r"undefined symbol: \w*[hH]ip", error)
