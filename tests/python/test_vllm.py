"""gemma_norm.integrations.vllm on a stand-in for vLLM; tests/engines/test_vllm.py has the real one."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gemma_norm
from gemma_norm import _library
from gemma_norm.integrations import _engine
from gemma_norm.integrations import vllm as integration
from stand_ins import THEIRS
from support import randn
from vllm_stand_in import install_vllm

HIDDEN = 32
NAMES = ("RMSNorm", "GemmaRMSNorm", "RMSNormGated")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    engine = install_vllm(monkeypatch)
    with torch.no_grad():
        yield engine
    integration.uninstall()


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module.weight.data.add_(randn(HIDDEN, seed=9) / 10)
    return module.to(dtype)


def served(vllm: SimpleNamespace) -> list[str]:
    """The layers that are ours when they are made now."""
    x = randn(4, HIDDEN)
    return [name for name in NAMES if getattr(vllm, name)(HIDDEN)(x) is not THEIRS]


def test_the_norms_are_ours(vllm, dtype):
    integration.install()
    x, residual = randn(4, HIDDEN, dtype=dtype), randn(4, HIDDEN, dtype=dtype, seed=1)
    gemma = filled(vllm.GemmaRMSNorm(HIDDEN), dtype)
    assert isinstance(gemma, vllm.GemmaRMSNorm)
    assert torch.equal(gemma(x), gemma_norm.rms_norm(x, gemma.weight, gemma=True))
    want = gemma_norm.add_rms_norm(x, residual, gemma.weight, gemma=True)
    assert all(map(torch.equal, gemma(x, residual), want))
    for weight_dtype in (dtype, torch.float32):
        plain = filled(vllm.RMSNorm(HIDDEN), weight_dtype)
        each_step = weight_dtype == dtype  # vLLM rounds to the weight's dtype before it multiplies
        assert torch.equal(plain(x), gemma_norm.rms_norm(x, plain.weight, round_each_step=each_step))
        want = gemma_norm.add_rms_norm(x, residual, plain.weight, round_each_step=each_step)
        assert all(map(torch.equal, plain(x, residual), want))
    assert torch.equal(vllm.RMSNorm(HIDDEN, has_weight=False)(x), gemma_norm.rms_norm(x))
    gated = filled(vllm.RMSNormGated(HIDDEN, group_size=8, activation="sigmoid"), dtype)
    options = {"sigmoid": True, "norm_before_gate": False, "group_size": 8}
    want = gemma_norm.gated_rms_norm(x, residual, gated.weight, 1e-5, **options)
    assert torch.equal(gated(x, residual), want) and torch.equal(gated(x, residual.view(2, 2, HIDDEN)), want)


def test_what_is_not_ours_is_vllms(vllm):
    integration.install()
    half = torch.bfloat16
    x = randn(4, HIDDEN, dtype=half)
    for module, *arguments in (
        (filled(vllm.RMSNorm(HIDDEN, var_hidden_size=8), half), x),
        (filled(vllm.RMSNorm(HIDDEN), half), x.float()),
        (filled(vllm.RMSNorm(HIDDEN), half), x, x.float()),
        (filled(vllm.GemmaRMSNorm(HIDDEN), half), randn(HIDDEN, 4, dtype=half).t()),
        (filled(vllm.RMSNormGated(HIDDEN), half), x, x.float()),
        (filled(vllm.RMSNormGated(HIDDEN, activation="tanh"), half), x, x),
    ):
        assert module(*arguments) is THEIRS
        assert all(a is b for a, b in zip(vllm.given, arguments, strict=False))


def test_where_the_layers_are_ours(vllm):
    integration.install()
    assert served(vllm) == [*NAMES]
    vllm.config.custom_ops = ["all", "-rms_norm"]
    assert served(vllm) == ["GemmaRMSNorm", "RMSNormGated"]
    vllm.config.custom_ops = ["none", "+rms_norm"]
    assert served(vllm) == ["RMSNorm"]
    vllm.config.mode = 3  # Inductor
    assert served(vllm) == []
    integration.install(under_inductor=True)
    assert served(vllm) == [*NAMES]
    vllm.config.custom_ops = ["none", "-gemma_rms_norm"]
    assert served(vllm) == ["RMSNorm", "RMSNormGated"]
    vllm.envs.VLLM_BATCH_INVARIANT = True
    assert served(vllm) == []
    vllm.envs.VLLM_BATCH_INVARIANT = False
    vllm.platform.is_cpu = lambda: False  # a TPU, say
    assert served(vllm) == []


@pytest.mark.parametrize("current", [0, 1])
def test_a_gpu_that_our_library_has_no_code_for_stays_with_vllm(vllm, monkeypatch, caplog, current):
    monkeypatch.setattr(_engine, "unserved_gpus", functools.cache(_engine.unserved_gpus.__wrapped__))
    monkeypatch.setattr(integration, "unserved_gpus", _engine.unserved_gpus)
    monkeypatch.setattr(_library, "unserved_gpus", lambda: {1: "cuda:1 (an old GPU) is sm_50"})
    integration.install()
    vllm.platform.is_cuda = lambda: True
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    assert served(vllm) == ([] if current else [*NAMES])
    assert caplog.messages == ["gemma_norm: cuda:1 (an old GPU) is sm_50; its norms stay with the engine"], "said once"
    x = SimpleNamespace(is_cpu=False, is_cuda=True, get_device=lambda: current)
    assert _engine.has_kernels(x) == (not current)


def test_a_copy_is_a_layer_of_its_own(vllm):
    integration.install()
    twin = copy.deepcopy(vllm.GemmaRMSNorm(HIDDEN))
    assert twin._forward_method.__self__ is twin and twin.vllm_forward.__self__ is twin


def test_install_twice_and_uninstall(vllm):
    integration.install()
    first = dict(vllm.registry)
    integration.install()
    assert vllm.registry == first and [*first] == [*NAMES]
    layers = [getattr(vllm, name)(HIDDEN) for name in NAMES]
    integration.uninstall()
    integration.uninstall()
    assert vllm.registry == {} and served(vllm) == []
    for layer, name in zip(layers, NAMES, strict=True):
        assert type(layer) is getattr(vllm, name) and layer(randn(4, HIDDEN)) is THEIRS
        assert layer.__dict__.keys() == type(layer)(HIDDEN).__dict__.keys()


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("RMSNorm", "__init__", lambda self, hidden_size, scale=2: None),
        ("GemmaRMSNorm", "forward_native", lambda self, x, out: None),
        ("RMSNormGated", "forward_native", lambda self, x: None),
    ],
)
def test_another_vllm_is_one_error_and_nothing_is_changed(vllm, monkeypatch, kind, name, value):
    monkeypatch.setattr(getattr(vllm, kind), name, value)
    with pytest.raises(RuntimeError, match=rf"{kind}.{name} must be a function of .*, got \(self, ") as error:
        integration.install()
    assert f"This adapter knows vllm {integration.TESTED}; " in str(error.value)
    assert vllm.registry == {}


def test_a_norm_of_another_plugin_stays(vllm):
    vllm.registry["RMSNormGated"] = nn.Identity
    with pytest.raises(RuntimeError, match=r"op_registry_oot\['RMSNormGated'\] must be free, got .*of another plugin"):
        integration.install()
    assert vllm.registry == {"RMSNormGated": nn.Identity}


def test_no_vllm_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r"vllm.model_executor.custom_op must be a module that can be imported"):
        integration.install()


@pytest.mark.parametrize(
    ("value", "layers"), [("", ()), ("0", ()), ("1", ()), ("inductor", NAMES)], ids=["unset", "0", "1", "inductor"]
)
def test_the_plugin_does_what_the_variable_says(vllm, monkeypatch, value, layers):
    monkeypatch.setenv("GEMMA_NORM_VLLM", value)
    vllm.config.mode, vllm.config.custom_ops = 3, ["none"]
    integration.plugin()
    assert served(vllm) == [*layers] and bool(vllm.registry) == (value in ("1", "inductor"))
    monkeypatch.setenv("GEMMA_NORM_VLLM", "yes")
    with pytest.raises(ValueError, match="GEMMA_NORM_VLLM must be 0, 1, inductor or unset, got 'yes'"):
        integration.plugin()
