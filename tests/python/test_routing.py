"""``forward_hip``'s routes, on CPU tensors, with stand-ins for the other packages.

Their signatures are the published ones. ROCm/aiter, aiter/ops/rmsnorm.py: rmsnorm2d_fwd, rmsnorm2d_fwd_with_add and
rmsnorm, with ``gemma_norm`` (since ROCm/aiter#3872, which dropped it beyond hidden 8192) and without; its
aiter/jit/utils/torch_guard.py: wrappers of ``*args`` around operators ``torch.ops.aiter.<name>``. vllm-project/vllm,
csrc/torch_bindings.cpp: rms_norm and the 4-argument fused_add_rms_norm. AMD's branches of ROCm/vllm: 6 arguments, in
the order of sgl-project/sglang#21188's call (sgl-project/sglang#31553 has both). All insist on contiguous tensors.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemma_norm import GemmaRMSNorm, RMSNorm, _library, reference, routing
from support import assert_right, assert_same_bits, place, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
called: list[str] = []
FOUR = "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()"
SIX = FOUR.replace("input, Tensor! residual", "out, Tensor input, Tensor! residual_out, Tensor residual")
PLAIN = "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()"


def norm(name: str, out: Tensor, x: Tensor, weight: Tensor, eps: float, *others: Tensor, gemma: bool = False):
    called.append(name)
    for t in (out, x, weight, *others):
        assert t.is_contiguous() and t.dtype == x.dtype and t.dim() == (1 if t is weight else 2)
    out.copy_(reference.rms_norm(x, weight, eps, gemma))


def make_aiter(flag: bool) -> types.ModuleType:
    def rmsnorm2d_fwd(input, weight, epsilon, use_model_sensitive_rmsnorm=0):
        out = torch.empty_like(input)
        norm("aiter", out, input, weight, epsilon)
        return out

    def rmsnorm(out, input, weight, epsilon, gemma_norm=False):
        norm("aiter", out, input, weight, epsilon, gemma=gemma_norm)

    def rmsnorm_before(out, input, weight, epsilon):
        rmsnorm(out, input, weight, epsilon)

    def add(out, input, residual_in, residual_out, weight, epsilon, gemma_norm=False, use_model_sensitive_rmsnorm=0):
        torch.add(input, residual_in, out=residual_out)
        gemma = gemma_norm and input.shape[-1] <= 8192
        norm("aiter", out, residual_out, weight, epsilon, input, residual_in, gemma=gemma)

    def add_before(out, input, residual_in, residual_out, weight, epsilon, use_model_sensitive_rmsnorm=0):
        assert use_model_sensitive_rmsnorm == 0
        add(out, input, residual_in, residual_out, weight, epsilon)

    package = types.ModuleType("aiter")
    package.rmsnorm2d_fwd, package.rmsnorm = rmsnorm2d_fwd, rmsnorm if flag else rmsnorm_before
    package.rmsnorm2d_fwd_with_add = add if flag else add_before
    return package


def guard(package: types.ModuleType, library: torch.library.Library) -> None:
    for name, schema in {
        "rmsnorm2d_fwd": "(Tensor input, Tensor weight, float epsilon, int use_model_sensitive_rmsnorm=0) -> Tensor",
        "rmsnorm": "(Tensor(a!) out, Tensor input, Tensor weight, float epsilon, bool gemma_norm=False) -> ()",
        "rmsnorm2d_fwd_with_add": "(Tensor(a!) out, Tensor input, Tensor residual_in, Tensor(b!) residual_out, "
        "Tensor weight, float epsilon, bool gemma_norm=False, int use_model_sensitive_rmsnorm=0) -> ()",
    }.items():
        library.define(name + schema)
        library.impl(name, getattr(package, name), "CPU")
        setattr(package, name, lambda *args, _name=name, **kwargs: getattr(torch.ops.aiter, _name)(*args, **kwargs))


def four(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(input)
    norm("vllm", input, residual, weight, epsilon)


def six(out: Tensor, input: Tensor, residual_out: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    torch.add(input, residual, out=residual_out)
    norm("vllm", out, residual_out, weight, epsilon, input, residual)


def forget() -> None:
    for function in (routing._choose, routing._say, routing._aiter, routing._vllm):
        function.cache_clear()
    called.clear()


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[object]:
    """Nothing is installed until the returned function says so; messages of every level are kept."""
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    monkeypatch.delenv("GEMMA_NORM_BACKEND", raising=False)
    caplog.set_level(logging.INFO, "gemma_norm")
    forget()
    libraries = []

    def install(*names: str) -> None:
        for name in names:
            libraries.append(torch.library.Library("aiter" if "aiter" in name else "_C", "FRAGMENT"))
            if "aiter" in name:
                package = make_aiter("flag" in name)
                if "guarded" in name:
                    guard(package, libraries[-1])
                monkeypatch.setitem(sys.modules, "aiter", package)
                continue
            schema, function = {"vllm 4": (FOUR, four), "vllm 6": (SIX, six)}.get(name, (name, four))
            for text, run in ((PLAIN, lambda *args: norm("vllm", *args)), (schema, function)):
                libraries[-1].define(text)
                libraries[-1].impl(text.partition("(")[0], run, "CPU")
            monkeypatch.setitem(sys.modules, "vllm._custom_ops", types.ModuleType("vllm._custom_ops"))

    yield install
    for library in libraries:
        library._destroy()
    forget()


def make(kind: type[RMSNorm], hidden: int, dtype: torch.dtype = BF16, backend: str = "auto") -> RMSNorm:
    module = kind(hidden, dtype=dtype, backend=backend).requires_grad_(False)
    module.weight.add_(randn(hidden, seed=9).to(dtype) / 20)
    return module


GEMMA = [("aiter flag", BF16), ("aiter guarded flag", F16), ("vllm 4", F32), ("torch", BF16)]
PLAIN_ONES = [("aiter before", BF16), ("vllm 4", BF16), ("vllm 6", F16), ("torch", F16)]
ROUTES = [(GemmaRMSNorm, *route) for route in GEMMA] + [(RMSNorm, *route) for route in PLAIN_ONES]


@pytest.mark.parametrize("layout", ["contiguous", "aligned slice of qkv", "heads before tokens", "padded rows"])
@pytest.mark.parametrize("kind, route, dtype", ROUTES, ids=lambda value: getattr(value, "__name__", str(value)))
@torch.no_grad()
def test_every_route_is_right_in_place_and_at_any_stride(peers, kind, route, dtype, layout):
    expected = [] if route == "torch" else route.split()[:1]
    peers(*[route] * len(expected))
    module = make(kind, 64, dtype, "torch" if route == "torch" else "auto")
    values = [randn(6, 4, 64, dtype=dtype, seed=seed) for seed in range(3)]
    q = place(values[0], layout)
    assert_right(module.forward_hip(q.view), values[0], module.weight, gemma=module.gemma)
    assert_same_bits(q.view, values[0])
    assert called == expected
    for post in (None, values[2]):
        called.clear()
        x, residual = place(values[0], layout), place(values[1], layout)
        y, s = module.forward_hip(x.view, residual.view, post)
        assert y is x.view and s is residual.view and called == expected
        assert_same_bits(s, values[0] + (values[1] if post is None else values[1] + post))
        assert_right(y, s, module.weight, gemma=module.gemma)
        x.assert_gaps_intact()
        residual.assert_gaps_intact()
    assert module.forward_hip(q.view[:0]).shape == (0, 4, 64) and called == expected
    with pytest.raises(RuntimeError, match="post_residual_addition needs a residual"):
        module.forward_hip(q.view, None, values[2])
    with pytest.raises(RuntimeError, match=r"weight must have shape \[32\]"):
        module.forward_hip(values[0][..., :32])


@torch.no_grad()
def test_the_order_and_what_is_said_once(peers, caplog):
    for install, chosen in (([], ""), (["vllm 4"], "vllm"), (["aiter flag"], "aiter")):
        forget()
        caplog.clear()
        peers(*install)
        for hidden in (64, 64, 128):
            make(RMSNorm, hidden).forward_hip(randn(2, hidden, dtype=BF16))
        assert called == [chosen] * 3 * bool(chosen)
        (record,) = caplog.records
        assert record.name == "gemma_norm" and f"uses {chosen or 'plain PyTorch'}" in record.message
        assert record.levelno == (logging.INFO if chosen else logging.WARNING)
        assert f"native: this PyTorch ({torch.__version__})" in record.message
        assert ("aiter: ModuleNotFoundError" in record.message) == (chosen != "aiter")


@pytest.mark.parametrize("install", ["aiter before 64", "aiter flag 16384", "vllm 4 64", "aiter flag 64"])
@torch.no_grad()
def test_a_rounded_weight_is_used_by_force_alone(peers, caplog, install):
    install, _, hidden = install.rpartition(" ")
    flag, hidden = (install, hidden) == ("aiter flag", "64"), int(hidden)
    peers(install)
    x, residual = randn(5, hidden, dtype=BF16), randn(5, hidden, dtype=BF16, seed=1)
    module = make(GemmaRMSNorm, hidden, F32 if flag or "vllm" in install else BF16)
    assert_right(module.forward_hip(x.clone(), residual.clone())[0], x + residual, module.weight, gemma=True)
    assert not called and f"{'the float32' if flag else '1 +'} weight would be rounded to bfloat16" in caplog.text
    module.backend = install.split()[0]
    for _ in range(2):
        y, s = module.forward_hip(x.clone(), residual.clone())
        rounded = module.weight.to(BF16) if flag else (1 + module.weight.float()).to(BF16)
        assert_same_bits(y, reference.rms_norm(s, rounded, gemma=flag))
        assert_same_bits(module.forward_hip(x), reference.rms_norm(x, rounded, gemma=flag))
        module.weight.mul_(-3)  # counts at once
    assert len(called) == 4
    assert [r.levelname for r in caplog.records if "breaks the contract" in r.message] == ["WARNING"]


@pytest.mark.parametrize("recording", [False, True])
def test_what_is_absent_cannot_be_forced(peers, monkeypatch, recording):
    x = randn(2, 100, dtype=BF16)
    absent = {"native": "a CPU build|a CUDA", "aiter": "ModuleNotFound", "vllm": "ModuleNotFound"}
    with torch.set_grad_enabled(recording):
        for name, why in absent.items():
            message = f"backend '{name}' was asked for and cannot be had: .*({why})"
            with pytest.raises(RuntimeError, match=message):
                make(RMSNorm, 100, backend=name).forward_hip(x)
            monkeypatch.setenv("GEMMA_NORM_BACKEND", name)
            forget()
            with pytest.raises(RuntimeError, match=message):
                make(RMSNorm, 100).forward_hip(x)
            make(RMSNorm, 100, backend="torch").forward_hip(x)  # the module's own word counts more
        peers("aiter flag", "fused_add_rms_norm(Tensor! input, Tensor! residual, float epsilon) -> ()")
        forget()
        for name, why in {"aiter": "no multiple of 8", "vllm": "unknown schemas: .*residual, float eps"}.items():
            with pytest.raises(RuntimeError, match=why):
                make(RMSNorm, 100, backend=name).forward_hip(x)
    assert not called
    with pytest.raises(ValueError, match="backend must be one of auto, native, aiter, vllm, torch, got 'hip'"):
        RMSNorm(8, backend="hip")


@pytest.mark.parametrize("backend", ["auto", "aiter", "vllm", "torch"])
def test_gradients_are_recorded_by_our_own(peers, backend):
    peers("aiter flag", "vllm 4")
    module = make(RMSNorm, 64, F16, backend).requires_grad_()
    y, s = module.forward_hip(x := randn(3, 64, dtype=F16), x)
    y.float().sum().backward()
    assert s is not x and bool((module.weight.grad != 0).all()) and not called
    assert_same_bits(x, randn(3, 64, dtype=F16))


@torch.no_grad()
def test_our_library_comes_first_if_it_has_code_for_the_gpu(peers, monkeypatch, caplog):
    peers("aiter flag")
    hip = replace(_library.backends()["hip"], loaded=True, reason="")
    x, module = randn(3, 64, dtype=BF16), make(RMSNorm, 64)
    for unsupported, expected in (((), []), (("cuda:0 is gfx942",), ["aiter"])):
        forget()
        found = {"hip": replace(hip, unsupported_devices=unsupported)}
        monkeypatch.setattr(_library, "backends", lambda found=found: found)
        assert_right(module.forward_hip(x), x, module.weight)
        assert called == expected
    assert "uses our HIP library" in caplog.text and "uses aiter: native: cuda:0 is gfx942" in caplog.text
    monkeypatch.setattr(RMSNorm, "_forward_op", None)  # would call a kernel that is not there
    monkeypatch.setitem(sys.modules, "aiter", None)
    forget()
    assert_right(module.forward_hip(x), x, module.weight)
