"""Tiny transformers models with random weights, for the tests of patch, which skip without transformers."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

tf = pytest.importorskip(
    "transformers", minversion="5", reason="needs transformers 5: pip install 'gemma-norm[example]'"
)

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_gated = pytest.importorskip("transformers.models.mamba2.modeling_mamba2").MambaRMSNormGated
# Older versions normalise all groups of Mamba 2 together.
MAMBA2_GROUPS = ", groups of 64" if "group_size" in inspect.signature(_gated).parameters else ""
TOKENS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FAMILIES: dict[str, dict] = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {},
    "Olmo2": {},
    "Granite": {"residual_multiplier": 0.5},
    "Qwen3_5Text": {**LINEAR, "num_hidden_layers": 4},
    "Qwen3Next": {
        **LINEAR,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "Mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16, "expand": 2},
}


def model(family: str = "Llama", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """In eval mode, with weights of which no norm's are ones."""
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **options})
    made = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    randomise(made)
    return made


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 10)


@torch.no_grad()
def logits(module: nn.Module, **options: object) -> Tensor:
    return module(TOKENS, use_cache=False, **options).logits


def norms(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if "Norm" in type(m).__name__}


def is_ours(module: nn.Module) -> bool:
    return "_gemma_norm_swap" in type(module).__dict__


class Additions(TorchDispatchMode):
    """Notes every call of the operators that add and normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operators = torch.ops.gemma_norm
        if function in (operators.add_rms_norm.default, operators.rms_norm_add_rms_norm.default):
            self.calls.append(str(function))
        return function(*args, **(kwargs or {}))
