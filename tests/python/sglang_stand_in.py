"""The parts of SGLang that the adapter looks at, with the signatures of SGLang 0.5.23. The norms' own forwards return
THEIRS. tests/engines has the real SGLang.
"""

from __future__ import annotations

import enum
import types
from typing import ClassVar

import pytest
import torch
from torch import nn

from stand_ins import THEIRS, add_modules


def install_sglang(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    class KernelBackend(str, enum.Enum):
        PLUGIN = "plugin"
        TORCH = "torch"

    class DeviceType(str, enum.Enum):
        CUDA, HIP, CPU = "cuda", "hip", "cpu"

    class CapabilityRequirement:
        def __init__(self, device: DeviceType) -> None:
            self.device = device

    CapabilityRequirement.CUDA = CapabilityRequirement(DeviceType.CUDA)
    CapabilityRequirement.HIP = CapabilityRequirement(DeviceType.HIP)

    class BaseFusedOp(nn.Module):
        priority = (KernelBackend.PLUGIN, KernelBackend.TORCH)
        capabilities: ClassVar[dict] = {}

        def __init__(self):
            super().__init__()
            self._forward_method = self._original_forward_method = None

        def backend_eligible(self, backend, *args, **kwargs):
            return True

        def forward_plugin(self, *args, **kwargs):
            raise NotImplementedError

        def _forward_backend_dynamic(self, *args, **kwargs):
            if self.backend_eligible(KernelBackend.PLUGIN, *args, **kwargs):
                return self.forward_plugin(*args, **kwargs)
            return self.forward_native(*args, **kwargs)

        def forward(self, *args, **kwargs):
            if self._forward_method is None:
                plugin = KernelBackend.PLUGIN in self.capabilities
                self._forward_method = self._forward_backend_dynamic if plugin else self.forward_native
                self._dynamic_backend_candidates = (KernelBackend.PLUGIN,)
            return self._forward_method(*args, **kwargs)

    class RMSNorm(BaseFusedOp):
        _quant_linear = None

        def __init__(
            self,
            hidden_size,
            eps=1e-6,
            var_hidden_size=None,
            cast_x_before_out_mul=False,
            fp32_residual=False,
            has_weight=True,
            weight_dtype=None,
            override_orig_dtype=None,
            x_pad_to_multiple=0,
            force_native=False,
        ):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(hidden_size, dtype=weight_dtype))
            self.variance_epsilon, self.hidden_size, self.has_weight = eps, hidden_size, has_weight
            self.cast_x_before_out_mul, self.fp32_residual = cast_x_before_out_mul, fp32_residual
            self.override_orig_dtype, self.variance_size_override = override_orig_dtype, var_hidden_size

        def forward_native(self, x, residual=None, post_residual_addition=None, quant_linear=None):
            return THEIRS

    class GemmaRMSNorm(BaseFusedOp):
        def __init__(self, hidden_size, eps=1e-6):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(hidden_size)), eps

        def forward_native(self, x, residual=None, post_residual_addition=None):
            return THEIRS

    class Gemma3RMSNorm(BaseFusedOp):
        def __init__(self, dim, eps=1e-6):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

        def forward_native(self, x, residual=None):
            return THEIRS

    class Gemma4RMSNorm(BaseFusedOp):
        def __init__(self, dim, eps=1e-6, scale_shift=0.0, with_scale=True):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
            self.scale_shift, self.with_scale = scale_shift, with_scale

        def forward_native(self, x):
            return THEIRS

    class RMSNormWithoutScale(BaseFusedOp):
        def __init__(self, hidden_size, eps=1e-6):
            super().__init__()
            self.hidden_size, self.eps = hidden_size, eps

        def forward_native(self, x):
            return THEIRS

    class Gated(nn.Module):
        def __init__(
            self,
            hidden_size,
            eps=1e-5,
            group_size=None,
            norm_before_gate=True,
            device=None,
            dtype=None,
            activation="swish",
        ):
            super().__init__()
            self.weight, self.eps, self.bias = nn.Parameter(torch.ones(hidden_size)), eps, None
            self.group_size, self.norm_before_gate, self.activation = group_size, norm_before_gate, activation

        def forward(self, x, z=None):
            return THEIRS

    class FusedRMSNormGated(nn.Module):
        def __init__(self, hidden_size, elementwise_affine=True, eps=1e-5, activation="swish", device=None, dtype=None):
            super().__init__()
            self.weight, self.eps, self.bias = nn.Parameter(torch.ones(hidden_size)), eps, None
            self.activation = activation

        def forward(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
            return THEIRS

    def fused_qk_gemma_rmsnorm_rope_gate(
        q_gate,
        k,
        q_weight,
        k_weight,
        cos_sin_cache,
        positions,
        eps,
        num_q_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        has_gate=True,
        mrope_axis_map=None,
    ):
        return THEIRS

    rope = {"fused_qk_gemma_rmsnorm_rope_gate": fused_qk_gemma_rmsnorm_rope_gate}
    norms = (RMSNorm, GemmaRMSNorm, Gemma3RMSNorm, Gemma4RMSNorm, RMSNormWithoutScale)
    engine = types.SimpleNamespace(
        **{kind.__name__: kind for kind in (*norms, FusedRMSNormGated, BaseFusedOp)}, Gated=Gated, batch_invariant=False
    )
    spec = (KernelBackend, DeviceType, CapabilityRequirement)
    add_modules(
        monkeypatch,
        sglang__kernels__spec={kind.__name__: kind for kind in spec},
        sglang__kernels__fused_op={"BaseFusedOp": BaseFusedOp},
        sglang__srt__batch_invariant_ops={"is_batch_invariant_mode_enabled": lambda: engine.batch_invariant},
        sglang__srt__layers__layernorm={kind.__name__: kind for kind in norms},
        sglang__kernels__ops__attention__fla__layernorm_gated={"RMSNorm": Gated},
        sglang__kernels__ops__attention__fla__fused_norm_gate={"FusedRMSNormGated": FusedRMSNormGated},
        sglang__kernels__ops__attention__fused_qk_rmsnorm_rope_gate=rope,
        sglang__srt__models__qwen3_5=rope,
    )
    return engine
