"""vLLM's fused_qk_rmsnorm_rope_gate, served by gemma_norm, on a stand-in for vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import engine_rope_support as engine
from engine_rope_support import HEAD_DIM, HEADS
from gemma_norm.integrations import _vllm_rope
from gemma_norm.integrations import vllm as integration
from stand_ins import THEIRS
from support import assert_same_bits, randn
from vllm_stand_in import install_vllm

NAME = "fused_qk_rmsnorm_rope_gate"
HALF = torch.bfloat16


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """That of the function's definition, and that of a model which has imported it."""
    install_vllm(monkeypatch)
    with torch.no_grad():
        yield [sys.modules[f"vllm.model_executor.{n}"] for n in ("layers.fused_qk_norm_rope", "models.qwen3_next")]
    integration.uninstall()


def arguments(dtype: torch.dtype = HALF, positions: torch.dtype = torch.int64, **others: Any) -> dict[str, Any]:
    """The cache is in the model's dtype."""
    return engine.arguments(dtype, dtype, True, positions) | {"norm_beta": 1.0} | others


def definition(a: dict[str, Any]) -> tuple[Tensor, ...]:
    sections = a.get("mrope_section")
    three = {"mrope_section": sections, "mrope_interleaved": sections is not None}
    y, z, gate = engine.definition(a, a["norm_beta"] == 1.0, **three)
    return y, z, gate.flatten(-2)


def is_ours(function: Any, a: dict[str, Any]) -> None:
    for y, want in zip(function(**a), definition(a), strict=True):
        assert y.is_contiguous()
        assert_same_bits(y, want)


@pytest.mark.parametrize("dtype", [torch.float16, HALF], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_it_is_ours(modules, dtype, index, beta):
    integration.install()
    for module in modules:
        is_ours(getattr(module, NAME), arguments(dtype, index, norm_beta=beta))


def test_a_cache_and_weights_in_float32(modules):
    integration.install()
    names = ("q_weight", "k_weight", "cos_sin_cache")
    a = arguments()
    is_ours(getattr(modules[1], NAME), a | {name: a[name].float() for name in names})


@pytest.mark.parametrize("sizes", [(4, 4, 4), [6, 3, 3]], ids=str)
def test_three_positions_in_turns(modules, sizes):
    integration.install()
    positions = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    is_ours(getattr(modules[1], NAME), arguments() | {"positions": positions, "mrope_section": sizes})


def test_a_cache_that_has_been_written_to_is_read_again_and_kept_no_longer_than_vllm_does(modules):
    integration.install()
    a = arguments()
    is_ours(getattr(modules[1], NAME), a)
    first = _vllm_rope._wide[a["cos_sin_cache"]][1]
    is_ours(getattr(modules[1], NAME), a)
    assert _vllm_rope._wide[a["cos_sin_cache"]][1] is first
    a["cos_sin_cache"].mul_(2)
    is_ours(getattr(modules[1], NAME), a)
    del a
    assert not len(_vllm_rope._wide)
    with torch.inference_mode():
        a = arguments()
        for _ in range(2):
            is_ours(getattr(modules[1], NAME), a)


def test_what_is_not_ours_is_vllms(modules):
    integration.install()
    for a in (
        arguments(torch.float32),
        arguments(norm_beta=0.5),
        arguments(q_weight=randn(HEAD_DIM)),
        arguments(q_gate=randn(7, 4 * HEADS[0] * HEAD_DIM, dtype=HALF)[:, ::2]),
        arguments(positions=torch.int16),
        arguments(rotary_dim=16),
        arguments() | {"positions": torch.zeros(3, 7, dtype=torch.int64)},
        {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in arguments().items()},
    ):
        assert getattr(modules[1], NAME)(**a) is THEIRS
    sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT = True
    assert getattr(modules[1], NAME)(**arguments()) is THEIRS


def test_in_compiled_code_it_is_vllms(modules):
    integration.install()
    function = getattr(modules[1], NAME)
    assert torch.compile(lambda: function(**arguments()), backend="eager")() is THEIRS


def test_uninstall_gives_every_module_its_own_back(modules):
    engine.assert_every_module_gets_its_own_back(integration, modules, NAME)


def test_a_vllm_whose_function_has_its_first_form(modules, monkeypatch):
    def first(
        q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim
    ):
        return THEIRS

    for module in modules:
        monkeypatch.setattr(module, NAME, first)
    integration.install()
    a = arguments(norm_beta=0.0)
    want = definition(a)
    del a["norm_beta"]
    for y, w in zip(getattr(modules[1], NAME)(**a), want, strict=True):
        assert_same_bits(y, w)
    assert getattr(modules[1], NAME)(**{**a, "rotary_dim": 16}) is THEIRS
    integration.uninstall()


def test_a_vllm_without_it(modules, monkeypatch):
    engine.assert_nothing_is_replaced_without_it(integration, modules, NAME, monkeypatch)


def test_other_parameters_are_an_error_and_nothing_is_changed(modules, monkeypatch):
    engine.assert_other_parameters_are_an_error(integration, modules, NAME, monkeypatch)
    assert not sys.modules["vllm.model_executor.custom_op"].op_registry_oot
