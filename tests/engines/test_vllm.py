"""gemma_norm in the real vLLM, on the CPU: its own native forwards are the reference.

GEMMA_NORM_ENGINES=folder python -m pytest tests/engines/test_vllm.py
"""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from conftest import declare_plugin, use

use("vllm")

import vllm.platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

vllm.platforms._current_platform = CpuPlatform()

import vllm.config  # noqa: E402
import vllm.config.vllm as vllm_config  # noqa: E402
from vllm import plugins  # noqa: E402
from vllm.config import CompilationConfig, CompilationMode  # noqa: E402
from vllm.model_executor.custom_op import op_registry_oot  # noqa: E402
from vllm.model_executor.layers import layernorm  # noqa: E402

from gemma_norm import reference  # noqa: E402
from gemma_norm.integrations import vllm as integration  # noqa: E402

HIDDEN = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = 1e-3  # see test_sglang.py
KINDS = (layernorm.RMSNorm, layernorm.GemmaRMSNorm, layernorm.RMSNormGated)


def configure(monkeypatch: pytest.MonkeyPatch, *custom_ops: str, mode: int = CompilationMode.NONE) -> None:
    config = CompilationConfig(mode=mode, backend="inductor", custom_ops=list(custom_ops or ("all",)))
    monkeypatch.setattr(vllm_config, "_current_vllm_config", SimpleNamespace(compilation_config=config))
    vllm.config.get_cached_compilation_config.cache_clear()


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    configure(monkeypatch)
    with torch.inference_mode():
        yield
    integration.uninstall()
    vllm.config.get_cached_compilation_config.cache_clear()


@pytest.fixture
def installed() -> None:
    integration.install()


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind: type, dtype: torch.dtype = torch.bfloat16, **options: object) -> torch.nn.Module:
    module = kind(HIDDEN, **options).to(dtype)
    module.weight.data.add_(randn(HIDDEN, dtype=dtype, seed=9) / 10)
    return module


def is_ours(module: torch.nn.Module) -> bool:
    return module._forward_method == getattr(module, "forward_gemma_norm", None)


def share_that_differs(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
    return float((ours != theirs).float().mean())


def test_the_layers_are_of_vllms_classes_and_look_like_them(installed):
    for kind in KINDS:
        module = make(kind)
        assert isinstance(module, kind) and is_ours(module) and type(module).__name__ == kind.__name__
        assert str(module).startswith(f"{kind.__name__}(") and type(module).name == kind.name
        twin = copy.deepcopy(module)
        assert twin._forward_method.__self__ is twin and twin.vllm_forward.__self__ is twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["like x", "float32", "none"])
def test_rms_norm_has_the_bits_of_forward_native(installed, dtype, weight):
    """With a 16-bit weight vLLM rounds twice, with a float32 weight once."""
    module = make(layernorm.RMSNorm, torch.float32 if weight == "float32" else dtype, has_weight=weight != "none")
    x = randn(64, HIDDEN, dtype=dtype)
    y, want = module(x), module.forward_native(x)
    assert is_ours(module) and (share_that_differs(y, want) < FEW or dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemma_has_the_bits_of_forward_native(installed, dtype):
    module, x = make(layernorm.GemmaRMSNorm, dtype), randn(2, 32, HIDDEN, dtype=dtype)
    assert is_ours(module) and (share_that_differs(module(x), module.forward_native(x)) < FEW or dtype == torch.float32)


@pytest.mark.parametrize("kind", [layernorm.RMSNorm, layernorm.GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_with_a_residual_the_rounded_sum_is_normalised(installed, kind, dtype):
    """As vLLM's CUDA kernel does; its forward_native normalises the sum before it is rounded."""
    module, x, residual = make(kind, dtype), randn(64, HIDDEN, dtype=dtype), randn(64, HIDDEN, dtype=dtype, seed=1)
    y, s = module(x, residual)
    want_y, want_s = module.forward_native(x.clone(), residual.clone())
    assert is_ours(module) and torch.equal(s, want_s) and torch.equal(y, module(s)), "fused is unfused"
    assert 0.1 < share_that_differs(y, want_y) < 0.3
    assert torch.equal(x, randn(64, HIDDEN, dtype=dtype)), "on the CPU vLLM's results are new tensors, and so are ours"


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("gate", ["rows", "none"])
@pytest.mark.parametrize(("before", "size"), [(True, None), (True, 64), (False, None), (False, 64)])
def test_the_gated_norm_has_the_bits_of_forward_native(installed, activation, gate, before, size):
    module = make(layernorm.RMSNormGated, activation=activation, norm_before_gate=before, group_size=size)
    x, z = randn(2, 32, HIDDEN, dtype=torch.bfloat16)
    gates = (None,) if gate == "none" else (z,)
    assert is_ours(module) and share_that_differs(module(x, *gates), module.forward_native(x, *gates)) < FEW


def test_a_strided_gate_of_tokens_and_heads(installed):
    module, x = make(layernorm.RMSNormGated, norm_before_gate=True), randn(32, HIDDEN, dtype=torch.bfloat16)
    z = randn(8, 5 * HIDDEN, dtype=torch.bfloat16, seed=1)[:, : 4 * HIDDEN].view(8, 4, HIDDEN)
    assert share_that_differs(module(x, z), module.forward_native(x, z.reshape(32, HIDDEN))) < FEW


def test_what_is_not_ours_is_left_to_vllm(installed, monkeypatch):
    x = randn(4, HIDDEN, dtype=torch.bfloat16)
    for module, *arguments in (
        (make(layernorm.RMSNorm, var_hidden_size=64), x),
        (make(layernorm.RMSNorm), x.float()),  # vLLM rounds to the weight's 16 bits
        (make(layernorm.RMSNorm), x, x.float()),
        (make(layernorm.GemmaRMSNorm), randn(4, 2 * HIDDEN, dtype=torch.bfloat16)[:, ::2]),
        (make(layernorm.RMSNormGated), x, x.float()),
    ):
        calls = []
        theirs = module.vllm_forward
        module.vllm_forward = lambda *args, theirs=theirs, calls=calls: calls.append(1) or theirs(*args)
        got, want = module(*arguments), module.forward_native(*arguments)
        assert calls and all(
            torch.equal(a, b)
            for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, want)), strict=True)
        )
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not any(is_ours(make(kind)) for kind in KINDS)


def test_custom_ops_say_what_is_enabled(installed, monkeypatch):
    configure(monkeypatch, "all", "-rms_norm")
    assert [is_ours(make(kind)) for kind in KINDS] == [False, True, True]
    configure(monkeypatch, "none", "+gemma_rms_norm")
    assert [is_ours(make(kind)) for kind in KINDS] == [False, True, False]


def test_under_inductor_only_where_asked(monkeypatch):
    integration.install()
    configure(monkeypatch, "none", "+rms_norm", mode=CompilationMode.VLLM_COMPILE)
    assert not any(is_ours(make(kind)) for kind in KINDS)
    integration.install(under_inductor=True)
    configure(monkeypatch, "none", "-gemma_rms_norm", mode=CompilationMode.VLLM_COMPILE)
    assert [is_ours(make(kind)) for kind in KINDS] == [True, False, True]


def test_torch_compile(installed):
    module, x = make(layernorm.RMSNorm), randn(4, HIDDEN, dtype=torch.bfloat16)
    want = module(x), *module(x, x + 1)
    with torch.no_grad():
        got = torch.compile(lambda x: (module(x), *module(x, x + 1)), backend="eager", fullgraph=True)(x.clone())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_uninstall_restores_the_registry_and_the_layers():
    theirs = [make(kind) for kind in KINDS]
    before = dict(op_registry_oot)
    integration.install()
    integration.install()
    ours = [make(kind) for kind in KINDS]
    assert set(op_registry_oot) - set(before) == {kind.__name__ for kind in KINDS}
    integration.uninstall()
    integration.uninstall()
    assert op_registry_oot == before
    for kind, module, fresh in zip(KINDS, ours, theirs, strict=True):
        assert type(module) is kind and module.__dict__.keys() == fresh.__dict__.keys()
        assert module._forward_method.__func__ is fresh._forward_method.__func__
        assert type(make(kind)) is kind


def test_another_signature_or_plugin_is_one_error_and_nothing_is_installed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layernorm.RMSNormGated, "__init__", lambda self, hidden_size, swiglu=False: None)
        with pytest.raises(RuntimeError, match=r"RMSNormGated\.__init__ must be a function of .*swiglu=False"):
            integration.install()
    monkeypatch.setitem(op_registry_oot, "RMSNormGated", object)
    with pytest.raises(RuntimeError, match="of another plugin"):
        integration.install()
    assert integration._installed is None and set(op_registry_oot) == {"RMSNormGated"}


def test_float32_weights_are_not_rounded(installed):
    module, x = make(layernorm.GemmaRMSNorm, torch.float32), randn(4, HIDDEN, dtype=torch.bfloat16)
    assert torch.equal(module(x), reference.rms_norm(x, module.weight, module.variance_epsilon, True))


@pytest.mark.parametrize("value", ["0", "1"])
def test_vllm_loads_the_plugin(monkeypatch, tmp_path, value):
    declare_plugin(tmp_path, "vllm.general_plugins", "gemma_norm.integrations.vllm:plugin")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GEMMA_NORM_VLLM", value)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()
    assert is_ours(make(layernorm.GemmaRMSNorm)) == (value == "1")


@pytest.mark.skipif(find_spec("xgrammar") is None, reason="VllmConfig needs xgrammar: tests/engines/README.md")
def test_the_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving.py", "vllm"])
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serving.py"))
    assert example["main"]() == 0
    assert capsys.readouterr().out.count("gemma_norm") == 3
