"""The parts of vLLM that the adapter looks at, with the signatures of vLLM 0.33.0, or of its repository after it.

The norms' own forwards return THEIRS.
tests/engines has the real vLLM.
"""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

from stand_ins import THEIRS, add_modules


def install_vllm(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    given: list[object] = []  # the arguments of vLLM's own norm that was called last
    config = types.SimpleNamespace(mode=0, backend="inductor", custom_ops=["all"])
    registry: dict[str, type] = {}

    class CustomOp(nn.Module):
        def __new__(cls, *args, **kwargs):
            return super().__new__(registry.get(cls.__name__, cls))

        def __init__(self):
            super().__init__()
            self._enforce_enable = False
            self._forward_method = self.dispatch_forward(compile_native=False)

        def forward(self, *args, **kwargs):
            return self._forward_method(*args, **kwargs)

        def dispatch_forward(self, compile_native):
            return self.forward_native

        @classmethod
        def enabled(cls):
            return ("all" in config.custom_ops or f"+{cls.name}" in config.custom_ops) and (
                f"-{cls.name}" not in config.custom_ops
            )

        @classmethod
        def register_oot(cls, _decorated_op_cls=None, name=None):
            def decorator(op_cls):
                assert name not in registry
                op_cls.name = name
                registry[name] = op_cls
                return op_cls

            return decorator

    class RMSNorm(CustomOp):
        name = "rms_norm"

        def __init__(self, hidden_size, eps=1e-6, var_hidden_size=None, has_weight=True, dtype=None):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size, dtype=dtype)), eps
            self.variance_size_override, self.pass_weight, self.pass_weight_add = (
                var_hidden_size,
                has_weight,
                has_weight,
            )

        def forward_native(self, x, residual=None):
            given[:] = x, residual
            return THEIRS

    class GemmaRMSNorm(CustomOp):
        name = "gemma_rms_norm"

        def __init__(self, hidden_size, eps=1e-6):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(hidden_size)), eps

        def forward_native(self, x, residual=None):
            given[:] = x, residual
            return THEIRS

    class RMSNormGated(CustomOp):
        name = "rms_norm_gated"

        def __init__(
            self,
            hidden_size,
            eps=1e-5,
            group_size=None,
            norm_before_gate=False,
            device=None,
            dtype=None,
            activation="swish",
        ):
            super().__init__()
            self.weight, self.eps, self.bias = nn.Parameter(torch.ones(hidden_size)), eps, None
            self.group_size, self.norm_before_gate, self.activation = group_size, norm_before_gate, activation

        def forward_native(self, x, z=None):
            given[:] = x, z
            return THEIRS

    def fused_qk_rmsnorm_rope_gate(
        q_gate, k, q_weight, k_weight, cos_sin_cache, positions, eps, num_q_heads, num_kv_heads, head_dim, rotary_dim,
        mrope_section=None, norm_beta=0.0,
    ):  # fmt: skip
        return THEIRS

    rope = {"fused_qk_rmsnorm_rope_gate": fused_qk_rmsnorm_rope_gate}
    kinds = {kind.__name__: kind for kind in (RMSNorm, GemmaRMSNorm, RMSNormGated)}
    platform = types.SimpleNamespace(is_cuda=lambda: False, is_rocm=lambda: False, is_cpu=lambda: True)
    add_modules(
        monkeypatch,
        vllm__config={
            "get_cached_compilation_config": lambda: config,
            "CompilationConfig": types.SimpleNamespace,
            "VllmConfig": types.SimpleNamespace,
            "set_current_vllm_config": contextlib.nullcontext,
            "CompilationMode": types.SimpleNamespace(NONE=0, __name__="CompilationMode"),
        },
        vllm__envs={"VLLM_BATCH_INVARIANT": False},
        vllm__platforms={"current_platform": platform},
        vllm__model_executor__custom_op={"CustomOp": CustomOp, "op_registry_oot": registry},
        vllm__model_executor__layers__layernorm=kinds,
        vllm__model_executor__layers__fused_qk_norm_rope=rope,
        vllm__model_executor__models__qwen3_next=rope,
    )
    return types.SimpleNamespace(
        **kinds, given=given, config=config, registry=registry, platform=platform, envs=sys.modules["vllm.envs"]
    )
