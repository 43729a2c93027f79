"""Stand-ins for the packages that ``forward_hip`` may choose, with the published signatures, and fixtures to install them.

ROCm/aiter, aiter/ops/rmsnorm.py: rmsnorm2d_fwd, rmsnorm2d_fwd_with_add and rmsnorm, with ``gemma_norm`` (since
ROCm/aiter#3872, which dropped it beyond hidden 8192) and without; rms_norm_opus and fused_add_rms_norm_opus, which
ROCm/aiter#4059 added for what the others' kernels do not serve; its aiter/jit/utils/torch_guard.py: wrappers of
``*args`` around operators ``torch.ops.aiter.<name>``. vllm-project/vllm, csrc/torch_bindings.cpp: rms_norm and the
4-argument fused_add_rms_norm. AMD's branches of ROCm/vllm: 6 arguments, in the order of sgl-project/sglang#21188's call
(sgl-project/sglang#31553 has both). All insist on contiguous tensors.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_norm import RMSNorm, _library, reference, routing
from support import randn

called: list[str] = []
FOUR = "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()"
SIX = FOUR.replace("input, Tensor! residual", "out, Tensor input, Tensor! residual_out, Tensor residual")
PLAIN = "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()"


def norm(name: str, out: Tensor, x: Tensor, weight: Tensor, eps: float, *others: Tensor, gemma: bool = False):
    called.append(name)
    for t in (out, x, weight, *others):
        assert t.is_contiguous() and t.dtype == x.dtype and t.dim() == (1 if t is weight else 2)
    out.copy_(reference.rms_norm(x, weight, eps, gemma))


def make_aiter(flag: bool, opus: bool = False) -> types.ModuleType:
    def fast(x: Tensor) -> bool:
        return x.dtype != torch.float32 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 8192

    def rmsnorm2d_fwd(input, weight, epsilon, use_model_sensitive_rmsnorm=0):
        assert input.dtype != torch.float32 and input.shape[-1] % 8 == 0
        out = torch.empty_like(input)
        norm("aiter", out, input, weight, epsilon)
        return out

    def rmsnorm(out, input, weight, epsilon, gemma_norm=False):
        assert fast(input)
        norm("aiter", out, input, weight, epsilon, gemma=gemma_norm)

    def rmsnorm_before(out, input, weight, epsilon):
        rmsnorm(out, input, weight, epsilon)

    def add(out, input, residual_in, residual_out, weight, epsilon, gemma_norm=False, use_model_sensitive_rmsnorm=0):
        assert input.dtype != torch.float32 and input.shape[-1] % 8 == 0
        if not flag or not fast(input):  # Composable Kernel's, which may read a row again after it has written
            assert len({t.data_ptr() for t in (out, input, residual_in, residual_out)}) == 4
        torch.add(input, residual_in, out=residual_out)
        gemma = gemma_norm and fast(input)
        norm("aiter", out, residual_out, weight, epsilon, input, residual_in, gemma=gemma)

    def add_before(out, input, residual_in, residual_out, weight, epsilon, use_model_sensitive_rmsnorm=0):
        assert use_model_sensitive_rmsnorm == 0
        add(out, input, residual_in, residual_out, weight, epsilon)

    def rms_norm_opus(out, input, weight, epsilon, model_sensitive=0, gemma_norm=False):
        assert not fast(input) and model_sensitive == 0 and out.data_ptr() != input.data_ptr()
        norm("aiter", out, input, weight, epsilon, gemma=gemma_norm)

    def fused_add_rms_norm_opus(input, residual, weight, epsilon, model_sensitive=0, gemma_norm=False):
        assert not fast(input) and model_sensitive == 0 and input.data_ptr() != residual.data_ptr()
        residual.add_(input)
        norm("aiter", input, residual, weight, epsilon, gemma=gemma_norm)

    package = types.ModuleType("aiter")
    package.rmsnorm2d_fwd, package.rmsnorm = rmsnorm2d_fwd, rmsnorm if flag else rmsnorm_before
    package.rmsnorm2d_fwd_with_add = add if flag else add_before
    if opus:
        package.rms_norm_opus, package.fused_add_rms_norm_opus = rms_norm_opus, fused_add_rms_norm_opus
    return package


def guard(package: types.ModuleType, library: torch.library.Library) -> None:
    for name, schema in {
        "rmsnorm2d_fwd": "(Tensor input, Tensor weight, float epsilon, int use_model_sensitive_rmsnorm=0) -> Tensor",
        "rmsnorm": "(Tensor(a!) out, Tensor input, Tensor weight, float epsilon, bool gemma_norm=False) -> ()",
        "rmsnorm2d_fwd_with_add": "(Tensor(a!) out, Tensor input, Tensor residual_in, Tensor(b!) residual_out, "
        "Tensor weight, float epsilon, bool gemma_norm=False, int use_model_sensitive_rmsnorm=0) -> ()",
    }.items():
        library.define(name + schema)
        library.impl(name, getattr(package, name), "CompositeExplicitAutograd")
        result = torch.empty_like if name == "rmsnorm2d_fwd" else None
        torch.library.register_fake(
            f"aiter::{name}", lambda x, *_, _result=result, **__: _result and _result(x), lib=library
        )
        setattr(package, name, lambda *args, _name=name, **kwargs: getattr(torch.ops.aiter, _name)(*args, **kwargs))


def four(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(input)
    norm("vllm", input, residual, weight, epsilon)


def six(out: Tensor, input: Tensor, residual_out: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    torch.add(input, residual, out=residual_out)
    norm("vllm", out, residual_out, weight, epsilon, input, residual)


def forget() -> None:
    for function in (routing._choose, routing._log_once, routing._aiter, routing._vllm):
        function.cache_clear()
    routing.native_on_all_gpus.clear()
    routing.native_on_gpu.clear()
    called.clear()


@pytest.fixture
def hip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what has become of our HIP library: loaded, or why not, and which GPUs it has no code for, and why.

    A tensor on the CPU is on "GPU" -1.
    """

    def say(reason: str = "", unserved: dict[int, str] | None = None) -> None:
        forget()
        found = {"hip": _library.Library("hip", True, not reason, Path(), "", (), reason, (), ())}
        monkeypatch.setattr(_library, "libraries", lambda: found)
        monkeypatch.setattr(_library, "unserved_gpus", lambda: unserved or {})

    return say


@pytest.fixture
def peers(
    hip: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[object]:
    """Nothing is installed until the returned function says so; messages of every level are kept."""
    hip("no HIP library here")
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    monkeypatch.delenv("GEMMA_NORM_PROVIDER", raising=False)
    caplog.set_level(logging.INFO, "gemma_norm")
    libraries = []

    def install(*names: str) -> None:
        for name in names:
            libraries.append(torch.library.Library("aiter" if "aiter" in name else "_C", "FRAGMENT"))
            if "aiter" in name:
                package = make_aiter("flag" in name or "opus" in name, "opus" in name)
                if "guarded" in name:
                    guard(package, libraries[-1])
                monkeypatch.setitem(sys.modules, "aiter", package)
                continue
            schema, function = {"vllm 4": (FOUR, four), "vllm 6": (SIX, six)}.get(name, (name, four))
            for text, run in ((PLAIN, lambda *args: norm("vllm", *args)), (schema, function)):
                libraries[-1].define(text)
                libraries[-1].impl(text.partition("(")[0], run, "CompositeExplicitAutograd")
            monkeypatch.setitem(sys.modules, "vllm._custom_ops", types.ModuleType("vllm._custom_ops"))

    yield install
    for library in libraries:
        library._destroy()
    forget()


def make(kind: type[RMSNorm], hidden: int, dtype: torch.dtype = torch.bfloat16, provider: str = "auto") -> RMSNorm:
    module = kind(hidden, dtype=dtype, provider=provider).requires_grad_(False).eval()
    module.weight.add_(randn(hidden, seed=9).to(dtype) / 20)
    return module
