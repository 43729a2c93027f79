"""RMSNorm and GemmaRMSNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import gemma_norm
from gemma_norm import reference
from support import assert_right, assert_same_bits, randn

KINDS = [gemma_norm.RMSNorm, gemma_norm.GemmaRMSNorm]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[gemma_norm.RMSNorm]:
    return request.param


def make(kind: type[gemma_norm.RMSNorm], hidden: int, **options: object) -> gemma_norm.RMSNorm:
    module = kind(hidden, 1e-5, **options)
    with torch.no_grad():
        module.weight.add_(randn(hidden, seed=7).to(module.weight) / 10)
    return module


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 weight", "own weight"])
def test_forward(device, dtype, kind, weight_dtype):
    module = make(kind, 96, device=device, dtype=weight_dtype or dtype)
    x = randn(3, 5, 96, dtype=dtype, device=device)
    assert_right(module(x).detach(), x, module.weight.detach(), 1e-5, module.gemma)


def test_fresh_weights_are_the_identity(device, kind):
    module = kind(64, device=device, dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and module.weight.device.type == device
    assert module.weight.requires_grad and list(module.state_dict()) == ["weight"]
    x = randn(2, 64, dtype=torch.bfloat16, device=device)
    assert_same_bits(module(x).detach(), gemma_norm.rms_norm(x, torch.ones(64, device=device)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("with_post", [False, True])
def test_with_a_residual_inference_is_in_place(device, dtype, kind, context, with_post):
    module = make(kind, 128, device=device)
    x, residual, post = (randn(7, 128, dtype=dtype, device=device, seed=seed) for seed in range(3))
    addition = post if with_post else None
    want = gemma_norm.add_rms_norm(x, residual, module.weight.detach(), 1e-5, module.gemma, addition)
    with context():
        y, s = module(x, residual, addition)
    assert y is x and s is residual
    assert_same_bits(y, want[0])
    assert_same_bits(s, want[1])


def test_with_a_residual_training_is_functional(device, kind):
    module = make(kind, 128, device=device)
    x, residual = randn(7, 128, device=device), randn(7, 128, device=device, seed=1)
    kept = x.clone(), residual.clone()
    y, s = module(x, residual)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    (y * s).sum().backward()
    assert bool((module.weight.grad != 0).any())
    module.weight.requires_grad_(False)
    y, s = module(x, residual)  # grad mode alone is enough: something may have saved x
    assert y is not x and s is not residual
    assert_same_bits(x, kept[0])


def test_forward_native_agrees_and_never_writes(device, dtype, kind):
    module = make(kind, 256, device=device)
    x, residual, post = (randn(9, 256, dtype=dtype, device=device, seed=seed) for seed in range(3))
    kept = x.clone(), residual.clone()
    with torch.no_grad():
        native = module.forward_native(x)
        assert_right(native, x, module.weight, 1e-5, module.gemma)
        y, s = module.forward_native(x, residual, post)
        assert_same_bits(s, x + (residual + post))
        assert_right(y, s, module.weight, 1e-5, module.gemma)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    dx = torch.autograd.grad(module.forward_native(x.requires_grad_()).float().sum(), x, create_graph=True)[0]
    assert dx.requires_grad


def test_the_device_chooses_the_method(device, kind, monkeypatch):
    called = []
    for name in ("forward_cuda", "forward_hip", "forward_cpu"):
        monkeypatch.setattr(kind, name, lambda self, *args, _name=name: called.append(_name))
    module = kind(8, device=device)
    module(randn(1, 8, device=device))
    assert called == ["forward_cpu" if device == "cpu" else "forward_hip" if torch.version.hip else "forward_cuda"]


def test_on_rocm_a_gpu_is_served_by_forward_hip(kind, monkeypatch):
    """PyTorch calls AMD GPUs cuda; torch.version.hip tells. A stand-in tensor will do, no kernel is run."""
    seen = []
    monkeypatch.setattr(gemma_norm.module, "_on_rocm", True)
    monkeypatch.setattr(kind, "forward_hip", lambda self, x, residual, post: seen.append((residual, post)))
    kind(8).forward(type("X", (), {"is_cuda": True})(), "residual", "post")
    assert seen == [("residual", "post")]


def test_the_methods_may_be_called_directly(device, kind):
    module, x = make(kind, 32, device=device), randn(2, 32, device=device)
    with torch.no_grad():
        for method in (module.forward_cpu, module.forward_cuda, module.forward_hip):
            assert_same_bits(method(x), module(x))
            y, s = method(x.clone(), x.clone(), x)
            assert_same_bits(s, x + (x + x))
            assert_right(y, s, module.weight, 1e-5, module.gemma)


@pytest.mark.parametrize("method", ["forward", "forward_native"])
def test_post_residual_addition_needs_a_residual(kind, method):
    x = randn(2, 8)
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: post_residual_addition needs a residual"):
        getattr(kind(8), method)(x, None, x)


def test_qk_norm_reads_slices_in_place(device):
    """q and k as they lie in a fused qkv buffer of a Qwen3.5-like layer, in place and not."""
    tokens, heads, kv_heads, size = 6, 8, 2, 256
    qkv = randn(tokens, (heads + 2 * kv_heads) * size, dtype=torch.bfloat16, device=device)
    module = make(gemma_norm.GemmaRMSNorm, size, device=device)
    kept = qkv.clone()
    q = qkv[:, : heads * size].view(tokens, heads, size)
    k = qkv[:, heads * size : (heads + kv_heads) * size].view(tokens, kv_heads, size)
    with torch.no_grad():
        for part in (q, k):
            y = module(part)
            assert_right(y, part, module.weight, 1e-5, True)
            assert_same_bits(y, module(part.contiguous()))
    assert_same_bits(qkv, kept)


def test_copies_moves_and_prints(device):
    module = make(gemma_norm.GemmaRMSNorm, 16)
    assert repr(module) == "GemmaRMSNorm(16, eps=1e-05, gemma=True)"
    assert repr(gemma_norm.RMSNorm(4)) == "RMSNorm(4, eps=1e-06, gemma=False)"
    assert_same_bits(copy.deepcopy(module).weight.detach(), module.weight.detach())
    moved = copy.deepcopy(module).to(device, torch.bfloat16)
    x = randn(3, 16, dtype=torch.bfloat16, device=device)
    assert_right(moved(x).detach(), x, moved.weight.detach(), 1e-5, True)
    other = gemma_norm.GemmaRMSNorm(16, 1e-5)
    other.load_state_dict(module.state_dict())
    assert_same_bits(other(randn(3, 16)), module(randn(3, 16)))
    module.reset_parameters()
    assert bool((module.weight == 0).all())


def test_meta_device_and_lazy_materialisation():
    module = gemma_norm.GemmaRMSNorm(16, device="meta")
    y, s = module(torch.empty(2, 16, device="meta"), torch.empty(2, 16, device="meta"))
    assert y.shape == s.shape == (2, 16) and y.device.type == "meta"
    module.to_empty(device="cpu").reset_parameters()
    assert bool((module(randn(2, 16)) != 0).any())


def test_subclass_may_reroute(kind):
    """How a routing layer will choose another implementation for one kind of device."""

    class Routed(kind):
        def forward_cpu(
            self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
        ) -> Tensor:
            return self.forward_native(x, residual, post_residual_addition)

    x = randn(2, 64)
    routed = Routed(64)
    assert_same_bits(routed(x).detach(), reference.rms_norm(x, routed.weight, 1e-6, routed.gemma).detach())
