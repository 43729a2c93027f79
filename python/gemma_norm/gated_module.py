"""The module for RMSNorm with a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._module_checks import check_choice, check_device_and_dtype, check_flags, check_group_size, check_size_and_eps
from ._ops.gated_rms_norm import gated_rms_norm

ACTIVATIONS = {"silu": False, "swish": False, "sigmoid": True}


class GatedRMSNorm(nn.Module):
    """``y = norm(x) * act(gate)``, or the norm of ``x * act(gate)``: ``RMSNormGated`` in transformers and vLLM.

    :func:`gemma_norm.gated_rms_norm` states formula, dtypes and strides. The defaults compute what the gated norms of
    SGLang and vLLM compute; ``round_each_step=True`` what those of Qwen3-Next and Qwen3.5 in transformers compute;
    ``activation="sigmoid"`` that of Kimi Linear; ``norm_before_gate=False, round_each_step=True`` that of Mamba 2.

    Args:
        hidden_size: size of the last dimension of the inputs.
        eps: a number that is added to the mean of squares, finite in float32 and not negative.
        activation: "silu", its other name "swish", or "sigmoid".
        norm_before_gate, group_size, round_each_step: see :func:`gemma_norm.gated_rms_norm`.
        device, dtype: of the weight. The dtype is float32, float16 or bfloat16; None stands for PyTorch's default.

    Raises:
        ValueError: for an argument that breaks a rule above.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        activation: str = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        round_each_step: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_size_and_eps(name, hidden_size, eps)
        check_choice(name, "activation", activation, tuple(ACTIVATIONS))
        check_flags(name, norm_before_gate=norm_before_gate, round_each_step=round_each_step)
        check_group_size(name, group_size, hidden_size)
        check_device_and_dtype(name, device, dtype)
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.activation = activation
        self.norm_before_gate = norm_before_gate
        self.group_size = group_size
        self.round_each_step = round_each_step
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return the gated norm in a new tensor. Without a gate, it is the norm alone."""
        return gated_rms_norm(
            x,
            gate,
            self.weight,
            self.variance_epsilon,
            sigmoid=ACTIVATIONS[self.activation],
            norm_before_gate=self.norm_before_gate,
            group_size=self.group_size,
            round_each_step=self.round_each_step,
        )

    def extra_repr(self) -> str:
        gate = f"activation={self.activation!r}, norm_before_gate={self.norm_before_gate}"
        return f"{self.hidden_size}, eps={self.variance_epsilon}, {gate}, group_size={self.group_size}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead of this module: it takes no keyword-only arguments with defaults.

        A subclass with a forward of its own is compiled as it is.
        """
        return _Scriptable(self) if type(self).forward is GatedRMSNorm.forward else self


class _Scriptable(nn.Module):
    """``y = norm(x, gate)`` for TorchScript. The operator records the derivative if one is wanted."""

    def __init__(self, norm: GatedRMSNorm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, float(norm.variance_epsilon)
        self.sigmoid = ACTIVATIONS[norm.activation]
        self.norm_before_gate, self.round_each_step = bool(norm.norm_before_gate), bool(norm.round_each_step)
        self.group_size = None if norm.group_size is None else int(norm.group_size)
        self.train(norm.training)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        rows = x
        if gate is not None and gate.shape[-1:] == x.shape[-1:] and gate.numel() == x.numel():
            rows = x.view(gate.shape)
        y: Tensor = torch.ops.gemma_norm.gated_rms_norm(
            rows,
            gate,
            self.weight,
            self.variance_epsilon,
            self.sigmoid,
            self.norm_before_gate,
            self.group_size,
            self.round_each_step,
        )
        return y.view(x.shape)
