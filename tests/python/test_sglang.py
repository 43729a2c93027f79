"""gemma_norm.integrations.sglang on a stand-in for SGLang; tests/engines/test_sglang.py has the real one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gemma_norm
from gemma_norm import _library
from gemma_norm.integrations import sglang as integration
from sglang_stand_in import install_sglang
from stand_ins import THEIRS
from support import randn

HIDDEN = 32


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    engine = install_sglang(monkeypatch)
    with torch.no_grad():
        yield engine
    integration.uninstall()


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module.weight.data.add_(randn(HIDDEN, seed=9) / 10)
    return module.to(dtype)


def rows(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [randn(4, HIDDEN, dtype=dtype, seed=i) for i in range(count)]


def test_the_norms_are_ours(sglang, dtype):
    integration.install()
    x, residual, post = rows(3, dtype)
    gemma, eps = filled(sglang.GemmaRMSNorm(HIDDEN), dtype), 1e-6
    assert torch.equal(gemma(x), gemma_norm.rms_norm(x, gemma.weight, eps, True))
    want = gemma_norm.add_rms_norm(x, residual, gemma.weight, eps, True, post)
    assert all(map(torch.equal, gemma(x, residual, post_residual_addition=post), want))
    want = gemma_norm.add_rms_norm(x, residual, gemma.weight, eps, True)
    assert all(map(torch.equal, gemma(x, residual), want))
    gemma3 = filled(sglang.Gemma3RMSNorm(HIDDEN), dtype)
    assert all(map(torch.equal, gemma3(x, residual), want))
    for each_step in (False, True):
        plain = filled(sglang.RMSNorm(HIDDEN, cast_x_before_out_mul=each_step), dtype)
        assert torch.equal(plain(x), gemma_norm.rms_norm(x, plain.weight, eps, False, each_step))
    for module, weight, zero_centred in (
        (filled(sglang.RMSNorm(HIDDEN, has_weight=False), dtype), False, False),
        (filled(sglang.Gemma4RMSNorm(HIDDEN, with_scale=False), dtype), False, False),
        (filled(sglang.Gemma4RMSNorm(HIDDEN), dtype), True, False),
        (filled(sglang.Gemma4RMSNorm(HIDDEN, scale_shift=1.0), dtype), True, True),
        (sglang.RMSNormWithoutScale(HIDDEN), False, False),
    ):
        want = gemma_norm.rms_norm(x, module.weight if weight else None, eps, zero_centred)
        assert torch.equal(module(x), want)


def test_the_gated_norms_are_ours(sglang, dtype):
    integration.install()
    x, z = rows(2, dtype)
    gated = filled(sglang.Gated(HIDDEN, group_size=8, norm_before_gate=False, activation="sigmoid"), dtype)
    options = {"sigmoid": True, "norm_before_gate": False, "group_size": 8}
    want = gemma_norm.gated_rms_norm(x, z, gated.weight, 1e-5, **options)
    assert torch.equal(gated(x, z), want) and torch.equal(gated(x, z=z.view(2, 2, HIDDEN)), want)
    fused = filled(sglang.FusedRMSNormGated(HIDDEN), dtype)
    assert torch.equal(fused(x, z), gemma_norm.gated_rms_norm(x, z, fused.weight, 1e-5))
    assert fused(x, z, residual=x) is THEIRS and fused(x, z, prenorm=True) is THEIRS
    assert sglang.Gated(HIDDEN, activation="tanh")(x, z) is THEIRS


def test_what_is_not_ours_is_sglangs(sglang):
    integration.install()
    x, r = rows(2, torch.bfloat16)
    half, rms = torch.bfloat16, sglang.RMSNorm

    class OwnForward(rms):
        def forward_cuda(self, x):
            return THEIRS

    quantised = filled(rms(HIDDEN), half)
    quantised.__dict__["_quant_linear"] = nn.Linear(HIDDEN, 4)
    padded = filled(rms(HIDDEN), half)
    padded.x_pad_to_multiple = 256
    for module, *arguments in (
        (filled(rms(HIDDEN, var_hidden_size=8), half), x),
        (filled(rms(HIDDEN, fp32_residual=True), half), x),
        (filled(rms(HIDDEN, override_orig_dtype=torch.float32), half), x),
        (filled(rms(HIDDEN, cast_x_before_out_mul=True), torch.float32), x),
        (quantised, x),
        (padded, x),
        (filled(rms(HIDDEN), half), x, None, None, nn.Linear(HIDDEN, 4)),
        (filled(rms(HIDDEN), half), x, r.float()),
        (filled(OwnForward(HIDDEN), half), x),
        (filled(sglang.GemmaRMSNorm(HIDDEN), half), x, r, r.float()),
        (filled(sglang.GemmaRMSNorm(HIDDEN), half), randn(HIDDEN, 4, dtype=half).t()),
        (filled(sglang.GemmaRMSNorm(HIDDEN), half), x.to("meta")),
        (filled(sglang.Gemma4RMSNorm(HIDDEN, scale_shift=0.5), half), x),
    ):
        assert module(*arguments) is THEIRS
        if not isinstance(module, OwnForward):
            with pytest.raises(NotImplementedError, match="forward_plugin does not serve this call"):
                module.forward_plugin(*arguments)
    plain = filled(rms(HIDDEN), half)
    assert plain(x) is not THEIRS
    sglang.batch_invariant = True
    assert plain(x) is THEIRS


def test_gradients_are_kept_where_somebody_asks_for_them(sglang):
    integration.install()
    norm, x = filled(sglang.GemmaRMSNorm(HIDDEN), torch.float32), rows(1, torch.float32)[0].requires_grad_()
    with torch.enable_grad():
        norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None


def test_install_twice_and_uninstall(sglang):
    kinds = (sglang.RMSNorm, sglang.GemmaRMSNorm, sglang.Gated, sglang.FusedRMSNormGated)
    before = [dict(vars(kind)) for kind in kinds]
    integration.install()
    first = [dict(vars(kind)) for kind in kinds]
    integration.install()
    assert [dict(vars(kind)) for kind in kinds] == first != before
    norm, x = filled(sglang.GemmaRMSNorm(HIDDEN), torch.bfloat16), rows(1, torch.bfloat16)[0]
    assert norm(x) is not THEIRS
    integration.uninstall()
    integration.uninstall()
    assert [dict(vars(kind)) for kind in kinds] == before
    assert norm(x) is THEIRS


@pytest.mark.parametrize(
    ("kind", "name", "value", "difference"),
    [
        ("RMSNorm", "__init__", lambda self, dim: None, r"a function of \(self, hidden_size, .*, got \(self, dim\)"),
        ("Gemma3RMSNorm", "forward_native", lambda self, x, out: None, r"a function of .*, got \(self, x, out\)"),
        ("FusedRMSNormGated", "forward", lambda self, x: None, r"a function of .*, got \(self, x\)"),
        ("GemmaRMSNorm", "forward_plugin", lambda self, x: None, "undefined"),
        ("BaseFusedOp", "priority", (), r"a tuple with KernelBackend.PLUGIN, got \(\)"),
    ],
)
def test_another_sglang_is_one_error_and_nothing_is_changed(sglang, monkeypatch, kind, name, value, difference):
    monkeypatch.setattr(getattr(sglang, kind), name, value, raising=False)
    kinds = (sglang.RMSNorm, sglang.GemmaRMSNorm, sglang.Gemma3RMSNorm, sglang.Gated, sglang.FusedRMSNormGated)
    before = [dict(vars(k)) for k in kinds]
    with pytest.raises(RuntimeError, match=rf"{kind}.{name} must be {difference}") as error:
        integration.install()
    assert f"This adapter knows sglang {integration.TESTED}; " in str(error.value) and "Nothing was changed" in str(
        error.value
    )
    assert [dict(vars(k)) for k in kinds] == before


def test_no_sglang_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(RuntimeError, match=r"sglang.kernels.fused_op must be a module that can be imported"):
        integration.install()


def test_gpus_without_a_native_library_are_an_error(sglang, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "_loaded", {})
    with pytest.raises(RuntimeError, match=r"library must be loaded on a machine with GPUs, got none"):
        integration.install()


@pytest.mark.parametrize(("value", "installs"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_plugin_does_nothing_unless_asked(sglang, monkeypatch, value, installs):
    if value is None:
        monkeypatch.delenv("GEMMA_NORM_SGLANG", raising=False)
    else:
        monkeypatch.setenv("GEMMA_NORM_SGLANG", value)
    integration.plugin()
    assert ("forward_plugin" in vars(sglang.RMSNorm)) == installs


def test_another_value_of_the_variable_is_an_error(sglang, monkeypatch):
    monkeypatch.setenv("GEMMA_NORM_SGLANG", "yes")
    with pytest.raises(ValueError, match="GEMMA_NORM_SGLANG must be 0, 1 or unset, got 'yes'"):
        integration.plugin()
