"""Stand-ins for the packages that ``forward_hip`` may choose, and fixtures to install them.

The stand-ins have the published signatures, which these places define:

- ROCm/aiter, aiter/ops/rmsnorm.py: rmsnorm2d_fwd, rmsnorm2d_fwd_with_add and rmsnorm. The last two take ``gemma_norm``
  since ROCm/aiter#3872, which ignores it beyond hidden 8192. ROCm/aiter#4059 added rms_norm_opus and
  fused_add_rms_norm_opus for the rows that the other kernels do not serve.
- ROCm/aiter, aiter/jit/utils/torch_guard.py: wraps each function so that its signature reads ``*args`` and it calls an
  operator ``torch.ops.aiter.<name>``.
- vllm-project/vllm, csrc/torch_bindings.cpp: rms_norm, and fused_add_rms_norm with four arguments.
- AMD's branches of ROCm/vllm: fused_add_rms_norm with six arguments, in the order in which sgl-project/sglang#21188
  passes them. (sgl-project/sglang#31553 has both forms.)

Every stand-in insists on contiguous tensors, as the packages do.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from gemma_norm import RMSNorm, _library, reference, routing
from support import randn

called: list[str] = []  # the peer that served, once for each norm that a peer has computed
FOUR = "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()"
SIX = FOUR.replace("input, Tensor! residual", "out, Tensor input, Tensor! residual_out, Tensor residual")
PLAIN = "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()"


@dataclass(frozen=True)
class Aiter:
    """A version of aiter."""

    name: ClassVar[str] = "aiter"
    label: str
    flag: bool = False
    """rmsnorm and rmsnorm2d_fwd_with_add take ``gemma_norm``."""
    opus: bool = False
    """There are rms_norm_opus and fused_add_rms_norm_opus."""
    guarded: bool = False
    """The functions are wrappers around operators."""

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Vllm:
    """A version of vLLM, by the schema of its fused_add_rms_norm."""

    name: ClassVar[str] = "vllm"
    label: str
    fused: str

    def __str__(self) -> str:
        return self.label


Peer = Aiter | Vllm
AITER_WITHOUT_FLAG = Aiter("aiter without the flag")
AITER_WITH_FLAG = Aiter("aiter with the flag", flag=True)
AITER_WITH_OPUS = Aiter("aiter with opus", flag=True, opus=True)
GUARDED_AITER_WITH_FLAG = replace(AITER_WITH_FLAG, label="guarded aiter with the flag", guarded=True)
GUARDED_AITER_WITH_OPUS = replace(AITER_WITH_OPUS, label="guarded aiter with opus", guarded=True)
VLLM_FOUR = Vllm("vllm with 4 arguments", FOUR)
VLLM_SIX = Vllm("vllm with 6 arguments", SIX)


def norm(name: str, out: Tensor, x: Tensor, weight: Tensor, eps: float, *others: Tensor, gemma: bool = False):
    """What every stand-in computes, into ``out``. ``others`` are further tensors that the peer is given."""
    called.append(name)
    for t in (out, x, weight, *others):
        assert t.is_contiguous() and t.dtype == x.dtype and t.dim() == (1 if t is weight else 2)
    out.copy_(reference.rms_norm(x, weight, eps, gemma))


def make_aiter(version: Aiter) -> types.ModuleType:
    def fast(x: Tensor) -> bool:
        """Whether the first set of kernels, which alone heeds gemma_norm, serves x."""
        return x.dtype != torch.float32 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 8192

    def rmsnorm2d_fwd(input, weight, epsilon, use_model_sensitive_rmsnorm=0):
        assert input.dtype != torch.float32 and input.shape[-1] % 8 == 0
        out = torch.empty_like(input)
        norm("aiter", out, input, weight, epsilon)
        return out

    def rmsnorm(out, input, weight, epsilon, gemma_norm=False):
        assert fast(input)
        norm("aiter", out, input, weight, epsilon, gemma=gemma_norm)

    def rmsnorm_without_flag(out, input, weight, epsilon):
        rmsnorm(out, input, weight, epsilon)

    def add(out, input, residual_in, residual_out, weight, epsilon, gemma_norm=False, use_model_sensitive_rmsnorm=0):
        assert input.dtype != torch.float32 and input.shape[-1] % 8 == 0
        if not version.flag or not fast(input):
            # Composable Kernel's kernels serve this call. They may read a row again after they have written it, so
            # that no output may be an input.
            assert len({t.data_ptr() for t in (out, input, residual_in, residual_out)}) == 4
        torch.add(input, residual_in, out=residual_out)
        gemma = gemma_norm and fast(input)
        norm("aiter", out, residual_out, weight, epsilon, input, residual_in, gemma=gemma)

    def add_without_flag(out, input, residual_in, residual_out, weight, epsilon, use_model_sensitive_rmsnorm=0):
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
    package.rmsnorm2d_fwd = rmsnorm2d_fwd
    package.rmsnorm = rmsnorm if version.flag else rmsnorm_without_flag
    package.rmsnorm2d_fwd_with_add = add if version.flag else add_without_flag
    if version.opus:
        package.rms_norm_opus, package.fused_add_rms_norm_opus = rms_norm_opus, fused_add_rms_norm_opus
    return package


def guard(package: types.ModuleType, library: torch.library.Library) -> None:
    """Hides the package's functions behind operators, as aiter's torch_guard.py does."""
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
    """Makes the next call choose anew, and say anew what it chose."""
    for function in (routing._choose, routing._log_once, routing._aiter, routing._vllm):
        function.cache_clear()
    routing.native_on_all_gpus.clear()
    routing.native_on_gpu.clear()
    called.clear()


@pytest.fixture
def hip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that says what has become of our HIP library.

    ``reason`` is why it is not loaded ("" if it is), ``unserved`` tells for each GPU that it has no code for why. These
    tests use tensors on the CPU, whose GPU index is -1.
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
) -> Iterator[Callable[..., None]]:
    """A function that installs the peers that it is given. None is installed before, nor is our HIP library.

    Log messages of every level are kept for the test to read.
    """
    hip("no HIP library here")
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    monkeypatch.delenv("GEMMA_NORM_PROVIDER", raising=False)
    caplog.set_level(logging.INFO, "gemma_norm")
    libraries: list[torch.library.Library] = []

    def install(*versions: Peer) -> None:
        for version in versions:
            if isinstance(version, Aiter):
                libraries.append(torch.library.Library("aiter", "FRAGMENT"))
                package = make_aiter(version)
                if version.guarded:
                    guard(package, libraries[-1])
                monkeypatch.setitem(sys.modules, "aiter", package)
            else:
                libraries.append(torch.library.Library("_C", "FRAGMENT"))
                fused = six if version is VLLM_SIX else four
                for schema, run in ((PLAIN, lambda *args: norm("vllm", *args)), (version.fused, fused)):
                    libraries[-1].define(schema)
                    libraries[-1].impl(schema.partition("(")[0], run, "CompositeExplicitAutograd")
                monkeypatch.setitem(sys.modules, "vllm._custom_ops", types.ModuleType("vllm._custom_ops"))

    yield install
    for library in libraries:
        library._destroy()
    forget()


def make(kind: type[RMSNorm], hidden: int, dtype: torch.dtype = torch.bfloat16, provider: str = "auto") -> RMSNorm:
    module = kind(hidden, dtype=dtype, provider=provider).requires_grad_(False).eval()
    module.weight.add_(randn(hidden, seed=9).to(dtype) / 20)
    return module
