"""gemma_norm.integrations.kernels on a stand-in for the kernels library, which tests/engines/test_kernels.py has."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

import gemma_norm
from gemma_norm.integrations import kernels as integration
from stand_ins import add_modules
from support import randn

HIDDEN = 32


class Norm(nn.Module):
    """The class of one formula in transformers: its layer name, and its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(1 + randn(HIDDEN, seed=9) / 10), 1e-6

    def normed(self, x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)


class LlamaRMSNorm(Norm):
    kernel_layer_name = "RMSNorm"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * self.normed(hidden_states).to(hidden_states.dtype)


class Olmo2RMSNorm(Norm):
    kernel_layer_name = "RMSNorm"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (self.weight * self.normed(hidden_states)).to(hidden_states.dtype)


class Qwen3_5RMSNorm(Norm):
    kernel_layer_name = "RMSNormZeroCentered"

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * (1.0 + self.weight.float())).type_as(x)


class Qwen3_5RMSNormGated(Norm):
    kernel_layer_name = "RMSNormGated"

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        normed = self.weight * self.normed(hidden_states).to(hidden_states.dtype)
        return (normed * nn.functional.silu(gate.float())).to(hidden_states.dtype)


class KimiLinearRMSNormGated(Norm):
    kernel_layer_name = "RMSNormGated"

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return (self.weight.float() * self.normed(hidden_states) * gate.float().sigmoid()).to(hidden_states.dtype)


class OddRMSNorm(Norm):
    """Its name is wrong: it is none of our formulas."""

    kernel_layer_name = "RMSNorm"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states


FORMULAS = {
    LlamaRMSNorm: lambda x, gate, w: gemma_norm.rms_norm(x, w, round_each_step=True),
    Olmo2RMSNorm: lambda x, gate, w: gemma_norm.rms_norm(x, w),
    Qwen3_5RMSNorm: lambda x, gate, w: gemma_norm.rms_norm(x, w, gemma=True),
    Qwen3_5RMSNormGated: lambda x, gate, w: gemma_norm.gated_rms_norm(x, gate, w, round_each_step=True),
    KimiLinearRMSNormGated: lambda x, gate, w: gemma_norm.gated_rms_norm(x, gate, w, sigmoid=True),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """kernelize is as strict about a layer class as that of kernels 0.17.2."""
    registered: dict[str, dict] = {}

    def register_kernel_mapping(mapping, inherit_mapping=True):
        registered.update(mapping)

    def kernelize(model, *, mode, device=None, use_fallback=True):
        members = {*dir(nn.Module), "can_torch_compile", "has_backward"}
        for module in model.modules():
            name = getattr(type(module), "kernel_layer_name", None)
            if name in registered:
                layer = registered[name][device].load()
                assert layer.__init__ is nn.Module.__init__ and {*dir(layer)} <= members
                module.forward = types.MethodType(layer.forward, module)
        return model

    add_modules(monkeypatch, kernels={"register_kernel_mapping": register_kernel_mapping, "kernelize": kernelize})
    set_transformers(monkeypatch, works=True)
    return types.SimpleNamespace(registered=registered, kernelize=kernelize)


def set_transformers(monkeypatch: pytest.MonkeyPatch, works: bool, enabled: bool = True) -> None:
    bounds = {"KERNELS_MIN_VERSION": "9.1", "KERNELS_MAX_VERSION": "9.2"}
    add_modules(
        monkeypatch,
        transformers__utils__import_utils={"is_kernels_available": lambda: works, **bounds},
        transformers__integrations__hub_kernels={"_kernels_enabled": enabled},
    )


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_norm_is_served_by_what_it_computes(kernels, kind, dtype):
    integration.register_kernels()
    module = kind().to(dtype)
    weight, x, gate = module.weight.detach(), *randn(2, 6, HIDDEN, dtype=dtype)
    gates = (gate,) if kind.kernel_layer_name == "RMSNormGated" else ()
    with torch.no_grad():
        theirs = module(x, *gates)
        ours = kernels.kernelize(module, mode=None, device="cpu")(x, *gates)
    assert torch.equal(ours, FORMULAS[kind](x, gate, weight))
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_what_is_not_ours_keeps_its_forward(kernels, monkeypatch):
    integration.register_kernels()
    x = randn(6, HIDDEN, dtype=torch.bfloat16)
    odd = kernels.kernelize(OddRMSNorm().bfloat16(), mode=None, device="cpu")
    assert torch.equal(odd(x), odd.weight * x)
    llama = kernels.kernelize(LlamaRMSNorm(), mode=None, device="cpu")
    assert llama(x).dtype == torch.float32, "as in transformers, with a float32 weight"
    llama = kernels.kernelize(LlamaRMSNorm().bfloat16(), mode=None, device="cpu")
    transposed = randn(HIDDEN, 6, dtype=torch.bfloat16).t()
    assert torch.equal(llama(transposed), LlamaRMSNorm.forward(llama, transposed))
    assert torch.equal(torch.compile(llama, backend="eager")(x), LlamaRMSNorm.forward(llama, x))


def test_probing_leaves_the_module_as_it_is(kernels):
    integration.register_kernels()
    module = kernels.kernelize(LlamaRMSNorm().bfloat16(), mode=None, device="cpu")
    weight = module.weight
    module(randn(6, HIDDEN, dtype=torch.bfloat16)).sum().backward()
    assert module.weight is weight and weight._version == 0 and weight.grad is not None
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("works", "enabled", "message"),
    [
        (False, True, r"kernels must be of a version that transformers .* works with, 9.1 <= version < 9.2, got"),
        (True, False, "USE_HUB_KERNELS must be unset"),
    ],
)
def test_a_pair_of_versions_that_does_not_work_is_an_error(kernels, monkeypatch, works, enabled, message):
    set_transformers(monkeypatch, works, enabled)
    with pytest.raises(RuntimeError, match=message):
        integration.register_kernels()
    assert not kernels.registered


def test_another_kernels_is_an_error(kernels, monkeypatch):
    import kernels as package

    monkeypatch.setattr(package, "register_kernel_mapping", lambda mapping, device: None)
    with pytest.raises(
        RuntimeError, match=r"register_kernel_mapping must be a function of \(mapping, inherit_mapping=True\)"
    ):
        integration.register_kernels()


class SwitchRMSNorm(Norm):
    kernel_layer_name = "RMSNorm"

    def __init__(self, zero_centred: bool) -> None:
        super().__init__()
        self.zero_centred = zero_centred

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.float() + (1 if self.zero_centred else 0)
        return (weight * self.normed(hidden_states)).to(hidden_states.dtype)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_two_modules_of_one_class_may_compute_different_things(kernels, order):
    integration.register_kernels()
    x = randn(6, HIDDEN)
    for zero_centred in order:
        module = kernels.kernelize(SwitchRMSNorm(zero_centred), mode=None, device="cpu")
        torch.testing.assert_close(module(x), SwitchRMSNorm.forward(module, x))
