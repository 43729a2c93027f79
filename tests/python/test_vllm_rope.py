"""vLLM's fused_qk_rmsnorm_rope_gate, served by gemma_norm, on a stand-in for vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from gemma_norm.integrations import _vllm_rope
from gemma_norm.integrations import vllm as integration
from rope_support import rotated
from stand_ins import THEIRS
from support import assert_same_bits, randn
from vllm_stand_in import install_vllm

NAME = "fused_qk_rmsnorm_rope_gate"
HEADS, HEAD_DIM, ROTARY = (4, 2), 64, 24
HALF = torch.bfloat16


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """That of the function's definition, and that of a model which has imported it."""
    install_vllm(monkeypatch)
    with torch.no_grad():
        yield [sys.modules[f"vllm.model_executor.{n}"] for n in ("layers.fused_qk_norm_rope", "models.qwen3_next")]
    integration.uninstall()


def arguments(dtype: torch.dtype = HALF, positions: Any = torch.int64, **others: Any) -> dict[str, Any]:
    """As Qwen3-Next's layer passes them: slices of the projection, and the cache in the model's dtype."""
    q_size, kv_size = 2 * HEADS[0] * HEAD_DIM, HEADS[1] * HEAD_DIM
    q_gate, k, _ = randn(7, q_size + 2 * kv_size, dtype=dtype).split([q_size, kv_size, kv_size], dim=-1)
    return {
        "q_gate": q_gate,
        "k": k,
        "q_weight": randn(HEAD_DIM, dtype=dtype, seed=1) / 10,
        "k_weight": randn(HEAD_DIM, dtype=dtype, seed=2) / 10,
        "cos_sin_cache": randn(11, ROTARY, seed=3, dtype=dtype),
        "positions": torch.arange(7).to(positions) % 5 + 3,
        "eps": 1e-6,
        "num_q_heads": HEADS[0],
        "num_kv_heads": HEADS[1],
        "head_dim": HEAD_DIM,
        "rotary_dim": ROTARY,
        "norm_beta": 1.0,
    } | others


def definition(a: dict[str, Any]) -> tuple[Tensor, ...]:
    """The norm in 16 bits, then the rotation in float32, in 16 bits again."""
    sections = a.get("mrope_section")
    cos, sin = reference.angles(a["cos_sin_cache"].float(), a["positions"], False, sections, sections is not None)
    q = a["q_gate"].unflatten(-1, (HEADS[0], -1))
    results = []
    for x, weight in ((q[..., :HEAD_DIM], a["q_weight"]), (a["k"].unflatten(-1, (HEADS[1], -1)), a["k_weight"])):
        n = gemma_norm.rms_norm(x, weight, a["eps"], a["norm_beta"] == 1.0)
        results.append(rotated(n.float(), cos, sin).to(n.dtype).flatten(-2))
    return *results, q[..., HEAD_DIM:].flatten(-2)


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
    own = [getattr(module, NAME) for module in modules]
    integration.install()
    integration.install()
    assert all(getattr(module, NAME) is not function for module, function in zip(modules, own, strict=True))
    integration.uninstall()
    assert [getattr(module, NAME) for module in modules] == own


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
    monkeypatch.delattr(modules[0], NAME)
    theirs = getattr(modules[1], NAME)
    integration.install()
    assert getattr(modules[1], NAME) is theirs
    integration.uninstall()
    monkeypatch.setitem(sys.modules, modules[0].__name__, None)  # it cannot be imported
    integration.install()
    assert getattr(modules[1], NAME) is theirs


def test_other_parameters_are_an_error_and_nothing_is_changed(modules, monkeypatch):
    monkeypatch.setattr(modules[0], NAME, lambda q, k: None)
    with pytest.raises(RuntimeError, match=rf"{NAME} must be a function of \(q_gate, k, .*, got \(q, k\)"):
        integration.install()
    assert not sys.modules["vllm.model_executor.custom_op"].op_registry_oot
