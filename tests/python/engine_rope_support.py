"""What the tests of the engines' functions for q and k of an attention layer share: arguments, the definition, and what
holds of any such function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from rope_support import rotated
from support import randn

HEADS, HEAD_DIM, ROTARY = (4, 2), 64, 24


def arguments(
    dtype: torch.dtype, cache_dtype: torch.dtype, has_gate: bool = True, positions: torch.dtype = torch.int64
) -> dict[str, Any]:
    """As layers of the engines pass them: q with its gates, and k, are slices of one projection."""
    q_size, kv_size = (1 + has_gate) * HEADS[0] * HEAD_DIM, HEADS[1] * HEAD_DIM
    q_gate, k, _ = randn(7, q_size + 2 * kv_size, dtype=dtype).split([q_size, kv_size, kv_size], dim=-1)
    return {
        "q_gate": q_gate,
        "k": k,
        "q_weight": randn(HEAD_DIM, dtype=dtype, seed=1) / 10,
        "k_weight": randn(HEAD_DIM, dtype=dtype, seed=2) / 10,
        "cos_sin_cache": randn(11, ROTARY, seed=3, dtype=cache_dtype),
        "positions": torch.arange(7).to(positions) % 5 + 3,
        "eps": 1e-6,
        "num_q_heads": HEADS[0],
        "num_kv_heads": HEADS[1],
        "head_dim": HEAD_DIM,
        "rotary_dim": ROTARY,
    }


def definition(a: dict[str, Any], gemma: bool, **sections: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and the gate, which is ``[tokens, heads, head_dim]``.

    The norm is in 16 bits, the rotation in float32, and its result in 16 bits again.
    """
    cos, sin = reference.angles(a["cos_sin_cache"].float(), a["positions"], **sections)
    q, k = a["q_gate"].unflatten(-1, (HEADS[0], -1)), a["k"].unflatten(-1, (HEADS[1], -1))

    def computed(x: Tensor, weight: Tensor) -> Tensor:
        n = gemma_norm.rms_norm(x, weight, a["eps"], gemma)
        return rotated(n.float(), cos, sin).to(n.dtype).flatten(-2)

    return computed(q[..., :HEAD_DIM], a["q_weight"]), computed(k, a["k_weight"]), q[..., HEAD_DIM:]


# Of each engine: its integration; the module that defines the function and one that has imported it; its name.


def assert_every_module_gets_its_own_back(integration: ModuleType, modules: list[ModuleType], name: str) -> None:
    own = [getattr(module, name) for module in modules]
    integration.install()
    integration.install()
    assert all(getattr(module, name) is not function for module, function in zip(modules, own, strict=True))
    integration.uninstall()
    assert [getattr(module, name) for module in modules] == own


def assert_nothing_is_replaced_without_it(
    integration: ModuleType, modules: list[ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(modules[0], name)
    theirs = getattr(modules[1], name)
    integration.install()
    assert getattr(modules[1], name) is theirs
    integration.uninstall()
    monkeypatch.setitem(sys.modules, modules[0].__name__, None)  # it cannot be imported
    integration.install()
    assert getattr(modules[1], name) is theirs


def assert_other_parameters_are_an_error(
    integration: ModuleType, modules: list[ModuleType], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules[0], name, lambda q, k: None)
    with pytest.raises(RuntimeError, match=rf"{name} must be a function of \(q_gate, k, .*, got \(q, k\)"):
        integration.install()
