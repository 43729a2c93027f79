"""Plain PyTorch serves devices without a native library: it is as right and as strict, and a warning says so once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_norm
from gemma_norm import _registry
from support import LAYOUTS, assert_right, assert_same_bits, make_weight, place, randn, warnings_are

OPS = torch.ops.gemma_norm
# A kind of device that no library of ours serves. To redispatch to it runs its implementation on tensors of the CPU.
ELSEWHERE = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_warned", set())


def elsewhere(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings_are("ignore"):
            return op.redispatch(ELSEWHERE, *args, **kwargs)

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [1, 100, 4096])
def test_right_at_any_stride(dtype, gemma, layout, hidden):
    values = [randn(5, 3, hidden, dtype=dtype, seed=seed) for seed in range(3)]
    weight = make_weight(hidden, torch.float32, "cpu", gemma)
    x, residual, out = (place(v, layout) for v in values)
    y = elsewhere(OPS.rms_norm.default)(x.view, weight, 1e-6, gemma)
    assert y.is_contiguous()
    assert_right(y, x.view, weight, gemma=gemma)
    assert elsewhere(OPS.rms_norm.out)(x.view, weight, 1e-6, gemma, out=out.view) is out.view
    assert_same_bits(out.view, y)
    out.assert_gaps_intact()
    y, s = elsewhere(OPS.add_rms_norm.default)(x.view, residual.view, weight, 1e-6, gemma, values[2])
    assert y.is_contiguous() and s.is_contiguous()
    assert_same_bits(s, values[0] + (values[1] + values[2]))
    assert_right(y, s, weight, gemma=gemma)
    elsewhere(OPS.fused_add_rms_norm.default)(x.view, residual.view, weight, 1e-6, gemma, values[2])
    assert_same_bits(x.view, y)
    assert_same_bits(residual.view, s)
    x.assert_gaps_intact()
    residual.assert_gaps_intact()


def test_in_place_and_without_rows():
    x, weight = randn(3, 20), make_weight(20, torch.float32, "cpu", False)
    want = gemma_norm.rms_norm(x, weight)
    elsewhere(OPS.rms_norm.out)(x, weight, out=x)
    torch.testing.assert_close(x, want)
    none = torch.empty(0, 20)
    elsewhere(OPS.fused_add_rms_norm.default)(none, none.clone(), weight)
    assert elsewhere(OPS.rms_norm.default)(none, weight).shape == (0, 20)


def test_the_warning_comes_once_for_a_type_of_device():
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.warns(UserWarning, match="gemma_norm: plain PyTorch instead of a native kernel on cpu: "):
        OPS.rms_norm.default.redispatch(ELSEWHERE, x, weight, 1e-6, False)
    with warnings_are("error"):
        OPS.rms_norm.default.redispatch(ELSEWHERE, x, weight, 1e-6, False)
        OPS.add_rms_norm.default.redispatch(ELSEWHERE, x, x, weight, 1e-6, False, None)


def test_a_refused_call_says_nothing_of_devices():
    with warnings_are("error"), pytest.raises(RuntimeError, match="rms_norm: weight must have shape"):
        OPS.rms_norm.default.redispatch(ELSEWHERE, torch.ones(2, 4), torch.ones(3), 1e-6, False)


@pytest.mark.parametrize("key", ["CUDA", "XPU", "MPS", "PrivateUse1"])
def test_every_kind_of_device_is_served(key):
    for name in _registry.OPERATORS:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"gemma_norm::{name}", key)


def test_the_dispatcher_skips_autograd_where_nothing_is_recorded():
    """The dispatcher's own fallback for autograd would record nothing either, and would cost each call up to 0.3 us."""
    recording = [name for name, op in _registry.OPERATORS.items() if op.derivative]
    assert len(recording) == 6
    for name in (*_registry.OPERATORS, *(f"_{name}" for name in recording)):
        table = torch._C._dispatch_dump_table(f"gemma_norm::{name}").splitlines()
        lines = [line for line in table if line.startswith(("AutogradCPU", "AutogradCUDA"))]
        assert len(lines) == 2 and all(("fallthrough" in line) == (name not in recording) for line in lines)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "gated_rms_norm", "rms_norm_add_rms_norm"])
def test_the_functions_take_no_detour_in_inference(op, context):
    """By way of the operator's kernel for autograd, which is Python. Its twin, which they call, has none."""
    tensors = [torch.ones(2, 4)] * (1 if op == "rms_norm" else 2)
    tensors += [torch.ones(4)] if op == "rms_norm_add_rms_norm" else []
    with context(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        getattr(gemma_norm, op)(*tensors, torch.ones(4))
    assert [e.name for e in profile.events() if e.name.startswith("gemma_norm")] == [f"gemma_norm::_{op}"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_without_its_library(tmp_path: Path):
    """A package that was built without the GPU's library is right all the same, and says what serves."""
    target = tmp_path / "gemma_norm"
    shutil.copytree(Path(gemma_norm.__file__).parent, target, ignore=shutil.ignore_patterns("libgemma_norm_[!c]*"))
    with (target / "_build_info.py").open("a") as file:
        file.write("\nBUILD = {'cpu': BUILD['cpu']}\n")
    code = """
import torch, warnings, gemma_norm
from gemma_norm import reference
x, weight = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16), torch.randn(256, device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = gemma_norm.rms_norm(x, weight)
    gemma_norm.rms_norm(x, weight)
assert [str(w.message).partition(": the ")[0] for w in caught] == [
    "gemma_norm: plain PyTorch instead of a native kernel on cuda"], caught
assert "library was not built" in str(caught[0].message)
assert reference.ulp_error(y, reference.oracle(x, weight)) <= reference.max_ulp_error(y.dtype, 256)
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True
    )


def test_the_same_address_with_another_dtype_is_a_partial_overlap_everywhere():
    """A float32 residual stream that begins where 16-bit x does: equal strides in elements are not in bytes."""
    memory = torch.zeros(2, 8)
    post, x = memory[:, :4], memory.view(torch.bfloat16).as_strided((2, 4), (8, 1))
    residual = torch.zeros(2, 4)
    call = OPS.fused_add_rms_norm.default
    for function in (call, elsewhere(call)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="got a partial overlap"):
            function(x, residual, None, 1e-6, False, post)
