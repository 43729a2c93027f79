"""Which provider ``forward_hip`` chooses, and what it says about the choice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fake_peers import AITER_WITH_FLAG, VLLM_FOUR, VLLM_SIX, Peer, Vllm, called, forget, make
from gemma_norm import GemmaRMSNorm, RMSNorm, routing
from support import assert_right, randn

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("peers")


class Spy:
    """Calls a function or method, and keeps the arguments of every call."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function, self.calls = function, []
        self.cache_clear = getattr(function, "cache_clear", None)

    def __call__(self, *args: object) -> object:
        self.calls.append(args)
        return self.function(*args)

    def __get__(self, instance: object, owner: type) -> Callable[..., object]:
        return lambda *args: self(instance, *args)


NO_HIP = "native: no HIP library here"
NO_AITER = "aiter: ModuleNotFoundError: import of aiter halted; None in sys.modules"
NO_VLLM = "vllm: ModuleNotFoundError: import of vllm._custom_ops halted; None in sys.modules"


@dataclass(frozen=True)
class Machine:
    """What is installed on a machine without our HIP library, and what ``forward_hip`` must do there."""

    peers: list[Peer]
    called: list[str]  # of one norm, as fake_peers.called has it
    level: str
    said: str


@torch.no_grad()
def test_the_first_installed_peer_serves_and_the_choice_is_said_once(peers, monkeypatch, caplog):
    # Without a peer, our own operators serve, and are plain PyTorch. They do not note calls in `called`.
    monkeypatch.setattr(RMSNorm, "_forward_op", ours := Spy(RMSNorm._forward_op))
    for machine in (
        Machine([], [], "WARNING", f"plain PyTorch, which is slow: {NO_HIP}; {NO_AITER}; {NO_VLLM}"),
        Machine([VLLM_FOUR], ["vllm"], "INFO", f"vllm: {NO_HIP}; {NO_AITER}"),
        Machine([AITER_WITH_FLAG], ["aiter"], "INFO", f"aiter: {NO_HIP}"),  # vLLM is still installed
    ):
        forget()
        caplog.clear()
        peers(*machine.peers)
        for hidden in (64, 64, 128):
            make(RMSNorm, hidden).forward_hip(randn(2, hidden, dtype=BF16))
        assert called == 3 * machine.called
        assert len(ours.calls) == 3, "our operators serve the three norms of the first machine alone"
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("gemma_norm", machine.level)
        assert record.message == f"gemma_norm: forward_hip uses {machine.said}"


@dataclass(frozen=True)
class Asked:
    """A way to ask for a provider, where aiter and vLLM are installed and our HIP library is not."""

    provider: str
    module: str  # what the module is given
    environment: str | None  # what GEMMA_NORM_PROVIDER is set to
    used: str  # which provider serves; "" where the call is refused
    said: str  # after "forward_hip uses "

    def __str__(self) -> str:
        return f"{self.provider or 'nothing'}, module {self.module}, environment {self.environment}"


def ways_to_ask() -> list[Asked]:
    by_force = {
        "aiter": "aiter: asked for",
        "vllm": "vllm: asked for",
        "torch": "plain PyTorch: asked for",
    }
    ways = []
    for provider, said in by_force.items():
        ways += [
            Asked(provider, module=provider, environment=None, used=provider, said=said),
            Asked(provider, module="auto", environment=provider, used=provider, said=said),
            # The module's own word counts more than the environment's.
            Asked(provider, module=provider, environment="native", used=provider, said=said),
        ]
    first = f"aiter: {NO_HIP}"
    for provider in ("auto", ""):  # An empty variable is as good as none.
        ways += [
            Asked(provider, module="auto", environment=None, used="aiter", said=first),
            Asked(provider, module="auto", environment=provider, used="aiter", said=first),
            # A module that asks for nothing leaves the word to the environment, which asks for what is not there.
            Asked(provider, module="auto", environment="native", used="", said=""),
        ]
    return ways


@torch.no_grad()
@pytest.mark.parametrize("asked", ways_to_ask(), ids=str)
def test_the_provider_that_is_asked_for_is_used(peers, monkeypatch, caplog, asked):
    peers(AITER_WITH_FLAG, VLLM_SIX)
    if asked.environment is not None:
        monkeypatch.setenv("GEMMA_NORM_PROVIDER", asked.environment)
    module = make(RMSNorm, 64, provider=asked.module)
    if not asked.used:
        with pytest.raises(RuntimeError, match="provider 'native' was asked for"):
            module.forward_hip(randn(2, 64, dtype=BF16))
        return
    for residual in (None, randn(2, 64, dtype=BF16, seed=1)):
        x = randn(2, 64, dtype=BF16)
        s = x if residual is None else x + residual
        y = module.forward_hip(x, residual)
        assert_right(y if residual is None else y[0], s, module.weight)
    assert called == ([] if asked.used == "torch" else [asked.used, asked.used])
    (message,) = caplog.messages
    assert message == f"gemma_norm: forward_hip uses {asked.said}"
    assert caplog.records[0].levelno == logging.INFO


def test_an_unknown_provider_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("GEMMA_NORM_PROVIDER", "hip")
    with pytest.raises(ValueError, match="provider must be one of auto, native, aiter, vllm, torch, got 'hip'"):
        RMSNorm(8).forward_hip(randn(2, 8))


@pytest.mark.parametrize("recording", [False, True])
def test_a_provider_that_is_absent_cannot_be_forced(peers, monkeypatch, recording):
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
        unknown = Vllm("an unknown vllm", "fused_add_rms_norm(Tensor! input, Tensor! residual, float epsilon) -> ()")
        peers(AITER_WITH_FLAG, unknown)
        forget()
        for name, why in {"aiter": "no multiple of 8", "vllm": "unknown schemas: .*residual, float eps"}.items():
            with pytest.raises(RuntimeError, match=why):
                make(RMSNorm, 100, provider=name).forward_hip(x)
    assert not called
    with pytest.raises(ValueError, match="provider must be one of auto, native, aiter, vllm, torch, got 'hip'"):
        RMSNorm(8, provider="hip")


@pytest.fixture(params=["auto", "native"])
def beside_peers(peers, request) -> RMSNorm:
    """A module on a machine where aiter and vLLM are installed, for tests that install our HIP library as well."""
    peers(AITER_WITH_FLAG, VLLM_FOUR)
    return make(RMSNorm, 64, provider=request.param)


@torch.no_grad()
def test_our_library_comes_before_peers(hip, caplog, beside_peers):
    hip()
    x = randn(3, 64, dtype=BF16)
    with torch.enable_grad():
        beside_peers.forward_hip(x)
    assert_right(beside_peers.forward_hip(x), x, beside_peers.weight)
    assert not called and caplog.messages == ["gemma_norm: forward_hip uses our HIP library: it is loaded"]


@torch.no_grad()
def test_a_peer_can_be_forced_beside_our_library_which_records_gradients(hip, monkeypatch, beside_peers):
    hip()
    x = randn(3, 64, dtype=BF16)
    beside_peers.forward_hip(x)
    beside_peers.provider = "vllm"  # also of a module that our library has served
    assert_right(beside_peers.forward_hip(x), x, beside_peers.weight)
    assert called == ["vllm"]
    monkeypatch.setattr(RMSNorm, "forward_native", None)  # Plain PyTorch is not needed for gradients: to call it fails.
    with torch.enable_grad():
        beside_peers.forward_hip(x)


@torch.no_grad()
def test_a_gpu_that_our_library_has_no_code_for_is_served_by_peers(hip, monkeypatch, caplog, beside_peers):
    hip(unserved={-1: "it is gfx942", 1: "cuda:1 is gfx1030"})
    x = randn(3, 64, dtype=BF16)
    if beside_peers.provider == "native":
        with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot be had: it is gfx942$"):
            beside_peers.forward_hip(x)
        return
    assert_right(beside_peers.forward_hip(x), x, beside_peers.weight)
    assert called == ["aiter"] and "uses aiter: native: it is gfx942\n" in caplog.text
    # Without peers it is plain PyTorch, not our operator, which would launch a kernel that has no code.
    monkeypatch.setattr(RMSNorm, "_forward_op", None)
    for package in ("aiter", "vllm._custom_ops"):
        monkeypatch.setitem(sys.modules, package, None)
    forget()
    assert_right(beside_peers.forward_hip(x), x, beside_peers.weight)
    with torch.enable_grad():
        assert_right(beside_peers.forward_hip(x), x, beside_peers.weight)


@torch.no_grad()
def test_our_library_is_chosen_once_for_any_number_of_rows(hip, monkeypatch):
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
    # torch.compile compiles for 3 rows, and from the second number of rows on for any number.
    assert len(choose.calls) == counter.frame_count == 2
    module.provider = "torch"
    assert_right(module.forward_hip(x), x, module.weight, gemma=True)
    assert len(choose.calls) == 3


@torch.no_grad()
def test_the_choice_is_made_for_each_gpu_by_itself(hip, monkeypatch, caplog):
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
    assert [call[-1] for call in choose.calls] == [0, 1, 1], "once for the GPU that our library serves"
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "plain PyTorch, which is slow: native: cuda:1 is gfx1036; " in caplog.messages[1]
    module.provider = "native"
    with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot be had: cuda:1 is gfx1036$"):
        module.forward_hip(x)
    gpus.pop(0)
    assert_right(module.forward_hip(x), x, module.weight)
