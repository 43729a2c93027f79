"""What ``forward_hip`` chooses, and what it says about it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from gemma_norm import GemmaRMSNorm, RMSNorm, routing
from peer_packages import FOUR, SIX, called, forget, make, make_aiter
from support import assert_right, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("peers")


class Spy:
    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.calls = function, []
        self.cache_clear = getattr(function, "cache_clear", None)

    def __call__(self, *args: object) -> object:
        self.calls.append(args)
        return self.function(*args)

    def __get__(self, instance: object, owner: type) -> Callable[..., object]:
        return lambda *args: self(instance, *args)


@torch.no_grad()
def test_the_order_and_what_is_said_once(peers, monkeypatch, caplog):
    monkeypatch.setattr(RMSNorm, "_forward_op", ours := Spy(RMSNorm._forward_op))
    native, aiter = (
        "native: no HIP library here",
        "aiter: ModuleNotFoundError: import of aiter halted; None in sys.modules",
    )
    vllm = "vllm: ModuleNotFoundError: import of vllm._custom_ops halted; None in sys.modules"
    for install, chosen, level, said in (
        ([], "", "WARNING", f"plain PyTorch, which is slow: {native}; {aiter}; {vllm}"),
        (["vllm 4"], "vllm", "INFO", f"vllm: {native}; {aiter}"),
        (["aiter flag"], "aiter", "INFO", f"aiter: {native}"),
    ):
        forget()
        caplog.clear()
        peers(*install)
        for hidden in (64, 64, 128):
            make(RMSNorm, hidden).forward_hip(randn(2, hidden, dtype=BF16))
        assert called == [chosen] * 3 * bool(chosen) and len(ours.calls) == 3
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("gemma_norm", level)
        assert record.message == f"gemma_norm: forward_hip uses {said}"


@torch.no_grad()
@pytest.mark.parametrize("by", ["module", "environment", "both"])
@pytest.mark.parametrize("provider", ["aiter", "vllm", "torch", "auto", ""])
def test_what_is_asked_for_is_used(peers, monkeypatch, caplog, provider, by):
    peers("aiter flag", "vllm 6")
    if by != "module":
        monkeypatch.setenv("GEMMA_NORM_PROVIDER", provider if by == "environment" else "native")
    module = make(RMSNorm, 64, provider=provider or "auto" if by != "environment" else "auto")
    if by == "both" and provider in ("auto", ""):
        with pytest.raises(RuntimeError, match="provider 'native' was asked for"):
            module.forward_hip(randn(2, 64, dtype=BF16))
        return
    used = {"auto": "aiter", "": "aiter"}.get(provider, provider)
    for residual in (None, randn(2, 64, dtype=BF16, seed=1)):
        x = randn(2, 64, dtype=BF16)
        s = x if residual is None else x + residual
        y = module.forward_hip(x, residual)
        assert_right(y if residual is None else y[0], s, module.weight)
    assert called == [used] * 2 * (used != "torch")
    (message,) = caplog.messages
    named = {"aiter": "aiter: asked for", "vllm": "vllm: asked for", "torch": "plain PyTorch: asked for"}.get(provider)
    assert message == f"gemma_norm: forward_hip uses {named or 'aiter: native: no HIP library here'}"
    assert caplog.records[0].levelno == logging.INFO


def test_an_unknown_provider_in_the_environment(monkeypatch):
    monkeypatch.setenv("GEMMA_NORM_PROVIDER", "hip")
    with pytest.raises(ValueError, match="provider must be one of auto, native, aiter, vllm, torch, got 'hip'"):
        RMSNorm(8).forward_hip(randn(2, 8))


@pytest.mark.parametrize("recording", [False, True])
def test_what_is_absent_cannot_be_forced(peers, monkeypatch, recording):
    x = randn(2, 100, dtype=BF16)
    absent = {"native": "no HIP library here", "aiter": "ModuleNotFound", "vllm": "ModuleNotFound"}
    with torch.set_grad_enabled(recording):
        for name, why in absent.items():
            message = f"provider '{name}' was asked for and cannot be had: .*({why})"
            with pytest.raises(RuntimeError, match=message):
                make(RMSNorm, 100, provider=name).forward_hip(x)
            monkeypatch.setenv("GEMMA_NORM_PROVIDER", name)
            forget()
            with pytest.raises(RuntimeError, match=message):
                make(RMSNorm, 100).forward_hip(x)
            make(RMSNorm, 100, provider="torch").forward_hip(x)  # the module's own word counts more
        peers("aiter flag", "fused_add_rms_norm(Tensor! input, Tensor! residual, float epsilon) -> ()")
        forget()
        for name, why in {"aiter": "no multiple of 8", "vllm": "unknown schemas: .*residual, float eps"}.items():
            with pytest.raises(RuntimeError, match=why):
                make(RMSNorm, 100, provider=name).forward_hip(x)
    assert not called
    with pytest.raises(ValueError, match="provider must be one of auto, native, aiter, vllm, torch, got 'hip'"):
        RMSNorm(8, provider="hip")


@torch.no_grad()
@pytest.mark.parametrize("provider", ["auto", "native"])
def test_our_library_comes_first_if_it_has_code_for_the_gpu(peers, hip, monkeypatch, caplog, provider):
    peers("aiter flag", "vllm 4")
    x, module = randn(3, 64, dtype=BF16), make(RMSNorm, 64, provider=provider)
    hip()
    with torch.enable_grad():
        module.forward_hip(x)
    assert_right(module.forward_hip(x), x, module.weight)
    assert not called and caplog.messages == ["gemma_norm: forward_hip uses our HIP library: it is loaded"]
    module.provider = "vllm"
    assert_right(module.forward_hip(x), x, module.weight)
    assert called == ["vllm"]
    with torch.enable_grad(), monkeypatch.context() as patch:
        patch.setattr(RMSNorm, "forward_native", None)
        module.forward_hip(x)
    module.provider = provider
    hip(unserved={-1: "it is gfx942", 1: "cuda:1 is gfx1030"})
    if provider == "native":
        with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot be had: it is gfx942$"):
            module.forward_hip(x)
        return
    assert_right(module.forward_hip(x), x, module.weight)
    assert called == ["aiter"] and "uses aiter: native: it is gfx942\n" in caplog.text
    monkeypatch.setattr(RMSNorm, "_forward_op", None)  # would call a kernel that is not there
    for package in ("aiter", "vllm._custom_ops"):
        monkeypatch.setitem(sys.modules, package, None)
    forget()
    assert_right(module.forward_hip(x), x, module.weight)
    with torch.enable_grad():
        assert_right(module.forward_hip(x), x, module.weight)


@torch.no_grad()
def test_our_library_is_chosen_once(hip, monkeypatch):
    hip()
    torch._dynamo.reset()
    monkeypatch.setattr(routing, "_choose", choose := Spy(routing._choose))
    module, counter = make(GemmaRMSNorm, 64), CompileCounter()
    compiled = torch.compile(module.forward_hip, backend=counter, fullgraph=True)
    for rows in (3, 5, 7, 9):
        x = randn(rows, 64, dtype=BF16)
        assert_right(compiled(x), x, module.weight, gemma=True)
        assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert set(choose.calls) == {("auto", False, BF16, BF16, 64, True, False, -1)}
    assert len(choose.calls) == counter.frame_count == 2  # for any number of rows since the second
    module.provider = "torch"
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert len(choose.calls) == 3


@torch.no_grad()
def test_each_gpu_is_asked_about_by_itself(hip, monkeypatch, caplog):
    """As on a desktop whose processor has an integrated GPU, gfx1036, beside a Radeon, gfx1100."""
    hip(unserved={1: "cuda:1 is gfx1036"})
    gpus = [0, 1, 0, 1, 0, 1, 0]  # of x, in one call after another
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: gpus[0])
    monkeypatch.setattr(RMSNorm, "_forward_op", ours := Spy(RMSNorm._forward_op))
    monkeypatch.setattr(routing, "_choose", choose := Spy(routing._choose))
    x, module = randn(3, 64, dtype=BF16), make(RMSNorm, 64)
    for calls in (1, 1, 2, 2, 3):
        assert_right(module.forward_hip(x), x, module.weight)
        assert len(ours.calls) == calls
        gpus.pop(0)
    assert [call[-1] for call in choose.calls] == [0, 1, 1]  # once for the GPU that ours serves
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "plain PyTorch, which is slow: native: cuda:1 is gfx1036; " in caplog.messages[1]
    module.provider = "native"
    with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot be had: cuda:1 is gfx1036$"):
        module.forward_hip(x)
    gpus.pop(0)
    assert_right(module.forward_hip(x), x, module.weight)


OBJECTIONS = [
    # (dtypes, multiple, gemma up to), (x, weight, hidden, gemma, huge), fatal, why
    ((), (BF16, BF16, 63, False, False), False, ""),
    (((F16,),), (BF16, BF16, 64, False, False), True, "no kernel for bfloat16"),
    (((F16, F32), 8), (F32, F32, 64, False, False), False, ""),
    (((F16,), 8), (F16, F16, 68, False, False), True, "writes beyond rows that are no multiple of 8 long"),
    ((), (F16, F16, 64, False, True), True, "32-bit offsets, and x has 2^31 elements or more"),
    ((), (F16, F16, 64, True, False), False, "no gemma_norm flag: 1 + weight would be rounded to float16"),
    ((), (F32, F32, 64, True, False), False, ""),
    (((F16,), 8, 128), (F16, F16, 128, True, False), False, ""),
    (((F16,), 8, 128), (F16, F16, 136, True, False), False, "no gemma_norm flag beyond hidden 128: 1 + weight would be "
     "rounded to float16"),
    (((F16,), 8, 128), (F16, F32, 64, True, False), False, "the float32 weight would be rounded to float16"),
    ((), (BF16, F32, 64, False, False), False, "the float32 weight would be rounded to bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("peer, call, fatal, why", OBJECTIONS)
def test_objections(peer, call, fatal, why):
    assert routing.Peer(None, None, *peer).objection(*call) == (fatal, why)


UNKNOWN = [
    ("rmsnorm2d_fwd", lambda x, weight, epsilon: None),
    ("rmsnorm2d_fwd", lambda *args, **kwargs: None),  # around no operator
    ("rmsnorm2d_fwd_with_add", lambda out, input, residual_in, weight, epsilon: None),
    ("rmsnorm2d_fwd_with_add", lambda out, x, residual_in, residual_out, weight, epsilon: None),
    (FOUR.replace("float epsilon", "float eps"), None),
    (SIX.replace("Tensor weight", "Tensor w"), None),
    (FOUR.replace("epsilon)", "epsilon, Tensor out)"), None),
]


@torch.no_grad()
@pytest.mark.parametrize("name, function", UNKNOWN)
def test_unknown_signatures_are_not_tried(peers, monkeypatch, caplog, name, function):
    peers("aiter flag" if function else name)
    if function:
        monkeypatch.setattr(sys.modules["aiter"], name, function)
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight)
    provider, what = ("aiter", "parameters") if function else ("vllm", "schemas")
    assert not called and f"{provider}: unknown {what}: " in caplog.text
    module.provider = provider
    with pytest.raises(RuntimeError, match=f"cannot be had: unknown {what}: "):
        module.forward_hip(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm2d_fwd_with_add"])
def test_a_flag_in_one_function_is_none(peers, monkeypatch, name):
    peers("aiter flag")
    monkeypatch.setattr(sys.modules["aiter"], name, getattr(make_aiter(False), name))
    x, module = randn(2, 64, dtype=BF16), make(GemmaRMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert not called


@torch.no_grad()
def test_a_package_that_fails_to_import_is_passed_over(peers, monkeypatch, caplog, tmp_path):
    peers("vllm 4")
    (tmp_path / "aiter.py").write_text("raise RuntimeError('no GPU found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aiter")
    x, module = randn(2, 64, dtype=BF16), make(RMSNorm, 64)
    assert_right(module.forward_hip(x), x, module.weight)
    assert called == ["vllm"] and "aiter: RuntimeError: no GPU found" in caplog.text
