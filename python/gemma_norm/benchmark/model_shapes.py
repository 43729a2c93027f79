"""Models with random weights in the shapes of released ones, and the ways of running their norms that are compared."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gemma_norm.integrations import transformers as integration

Variant = Callable[[nn.Module], object]
"""Changes a model in place."""


@dataclass(frozen=True)
class Shape:
    """A causal language model of transformers. ``fields`` are its configuration's, but for the number of layers."""

    architecture: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def build(self, layers: int, device: str, dtype: torch.dtype) -> nn.Module:
        """With random weights, the norms' included: a norm whose weight is 1 hides what rounding does."""
        transformers = importlib.import_module("transformers")
        model_class = getattr(transformers, f"{self.architecture}ForCausalLM")
        config = model_class.config_class(num_hidden_layers=layers, vocab_size=VOCABULARY, **self.fields)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: nn.Module = model_class(config)
        finally:
            torch.set_default_dtype(default)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).eval().requires_grad_(False)


VOCABULARY = 32768  # an eighth of the released models': the last projection is no norm's business

_QWEN3_5_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_QWEN3_5_27B = {
    **_QWEN3_5_4B,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 24,
    "linear_num_value_heads": 48,
}
_GEMMA3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
_TINY_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

SHAPES = {
    "qwen3_5-4b": Shape("Qwen3_5", _QWEN3_5_4B),
    "qwen3_5-27b": Shape("Qwen3_5", _QWEN3_5_27B),
    "gemma3-4b": Shape("Gemma3", _GEMMA3_4B),
    "qwen3_5-tiny": Shape("Qwen3_5", {**_TINY, **_TINY_LINEAR}),
    "gemma3-tiny": Shape("Gemma3", _TINY),
}


def _original(model: nn.Module) -> None:
    pass


def _liger(model: nn.Module) -> None:
    """What Liger's patch of a model instance does to a norm, done to every plain one: its own leaves q and k out."""
    patch = importlib.import_module("liger_kernel.transformers.monkey_patch")._patch_rms_norm_module
    for name in norms(model):
        module = model.get_submodule(name)
        if not type(module).__name__.endswith("Gated"):
            patch(module, offset=1.0, casting_mode="gemma", in_place=False)


def _identity(model: nn.Module) -> None:
    """Each norm returns what it is given. So long would a step take if norms cost nothing; its logits mean nothing."""
    for name in norms(model):
        model.get_submodule(name).forward = lambda x, *_: x


VARIANTS: dict[str, Variant] = {
    "original": _original,
    "liger": _liger,
    "ours": lambda model: integration.patch(model, gated=False),
    "ours+gated": lambda model: integration.patch(model),
    "ours+residual": lambda model: integration.patch(model, fuse_residual=True),
    "ours+rotation": lambda model: integration.patch(model, fuse_residual=True, fuse_rotation=True),
    "ours+native": lambda model: integration.patch(model, compiled="native"),
    "identity": _identity,
}
"""The native one differs from "ours+gated" in compiled code alone."""
NOT_BY_DEFAULT = ("ours+native", "identity")


def absent(variant: str) -> str:
    """Why a variant cannot be had; empty where it can."""
    if variant == "liger":
        try:
            importlib.import_module("liger_kernel.transformers.monkey_patch")
        except Exception as error:  # a library may fail in any way where its device, driver or dependency is missing
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def norms(model: nn.Module) -> list[str]:
    """The names of the modules that ``patch`` would serve."""
    return [entry.name for entry in integration.patch(model, dry_run=True).replaced]


def norms_of_others(model: nn.Module) -> list[str]:
    """The names of the norms that run no kernel of ours, those that Liger has given a forward of its own included."""
    plan = integration.patch(model, dry_run=True)
    return [*(entry.name for entry in plan.replaced), *(entry.name for entry in plan.left)]


def variant_of(model: nn.Module, name: str) -> nn.Module:
    """A model of its own that shares the parameters and buffers of ``model``."""
    shared = itertools.chain(model.parameters(), model.buffers())
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    VARIANTS[name](other)
    return other
