"""Derivatives of higher order and in forward mode, torch.func's transforms, and torch.compile around them.

The results are compared with what PyTorch differentiates by itself: the formula in float64, or F.rms_norm.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap

import gemma_norm
from support import randn
from transforms_support import HIDDEN, OPS, TRANSFORMS, Function, assert_close, scalar, tensors

EPS = 1e-6


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def functions(device: str) -> dict[str, tuple[Function, Function]]:
    """Functions of one tensor, which is x, the residual or the weight: through each way into the library, and in
    PyTorch.
    """
    x, residual, weight, _ = tensors(device, torch.float32)
    x64, residual64, weight64, _ = tensors(device)

    def exact(s: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(s, (HIDDEN,), w, EPS)

    module = gemma_norm.RMSNorm(HIDDEN, device=device)
    zero_centred = gemma_norm.GemmaRMSNorm(HIDDEN, device=device)
    return {
        "rms_norm of x": (lambda t: gemma_norm.rms_norm(t, weight), lambda t: exact(t, weight64)),
        "rms_norm of weight": (lambda t: gemma_norm.rms_norm(x, t[0]), lambda t: exact(x64, t[0])),
        "add_rms_norm of x": (
            lambda t: gemma_norm.add_rms_norm(t, residual, weight)[0],
            lambda t: exact(t + residual64, weight64),
        ),
        "add_rms_norm of residual, both results": (
            lambda t: torch.mul(*gemma_norm.add_rms_norm(x, t, weight)),
            lambda t: (x64 + t) * exact(x64 + t, weight64),
        ),
        "add_rms_norm of post_residual_addition": (
            lambda t: gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=t)[0],
            lambda t: exact(x64 + residual64 + t, weight64),
        ),
        "torch.ops rms_norm of x": (lambda t: OPS.rms_norm(t, weight), lambda t: exact(t, weight64)),
        "torch.ops add_rms_norm of x": (
            lambda t: OPS.add_rms_norm(t, residual, weight)[0],
            lambda t: exact(t + residual64, weight64),
        ),
        "torch.ops rms_norm of weight": (lambda t: OPS.rms_norm(x, t[0], gemma=True), lambda t: exact(x64, 1 + t[0])),
        "torch.ops add_rms_norm of residual, both results": (
            lambda t: torch.mul(*OPS.add_rms_norm(x, t, weight)),
            lambda t: (x64 + t) * exact(x64 + t, weight64),
        ),
        "gated_rms_norm of x": (
            lambda t: gemma_norm.gated_rms_norm(t, residual, weight),
            lambda t: exact(t, weight64) * F.silu(residual64),
        ),
        "torch.ops gated_rms_norm of gate": (
            lambda t: OPS.gated_rms_norm(x, t, weight, sigmoid=True),
            lambda t: exact(x64, weight64) * torch.sigmoid(t),
        ),
        "torch.ops gated_rms_norm of gate, which comes first": (
            lambda t: OPS.gated_rms_norm(x, t, weight, norm_before_gate=False),
            lambda t: exact(x64 * F.silu(t), weight64),
        ),
        "module of x": (lambda t: module(t), lambda t: exact(t, torch.ones_like(weight64))),
        "module of x, with a residual": (
            lambda t: module(t, residual)[0],
            lambda t: exact(t + residual64, torch.ones_like(weight64)),
        ),
        "module of weight": (
            lambda t: functional_call(zero_centred, {"weight": t[0]}, (x,)),
            lambda t: exact(x64, 1 + t[0]),
        ),
    }


WAYS = list(functions("cpu"))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", WAYS)
def test_torch_func(device, way, transform):
    mine, exact = functions(device)[way]
    x, _, _, _ = tensors(device, torch.float32)
    assert_close(TRANSFORMS[transform](mine)(x), TRANSFORMS[transform](exact)(x.double()))


@pytest.mark.parametrize("transform", ["grad", "hessian", "jvp", "vmap of grad"])
@pytest.mark.parametrize(
    "way",
    [
        "rms_norm of weight",
        "add_rms_norm of residual, both results",
        "torch.ops rms_norm of x",
        "module of x, with a residual",
        "module of weight",
    ],
)
def test_torch_compile_around_torch_func(device, way, transform):
    mine, exact = functions(device)[way]
    x, _, _, _ = tensors(device, torch.float32)
    compiled = torch.compile(TRANSFORMS[transform](mine), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), TRANSFORMS[transform](exact)(x.double()))


def test_an_ensemble_of_modules(device):
    """vmap over the stacked parameters of several modules and one module on the meta device, as in PyTorch's
    tutorial.
    """
    modules = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), gemma_norm.GemmaRMSNorm(HIDDEN)).to(device) for _ in range(3)]
    for seed, module in enumerate(modules):
        module[1].weight.data.copy_(randn(HIDDEN, seed=seed))
    x, _, _, _ = tensors(device, torch.float32)
    parameters, buffers = stack_module_state(modules)
    base = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), gemma_norm.GemmaRMSNorm(HIDDEN)).to("meta")
    got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([module(x) for module in modules]))


@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_through_autograd(device, way):
    """A penalty on the gradient, and Hessians by autograd: with double backward, and with batched gradients."""
    mine, exact = functions(device)[way]
    x, _, _, _ = tensors(device, torch.float32)

    def penalty(f: Function, t: Tensor) -> Tensor:
        t = t.clone().requires_grad_()
        (first,) = torch.autograd.grad(scalar(f)(t), t, create_graph=True)
        (scalar(f)(t) + first.square().sum()).backward()
        return t.grad

    assert_close(penalty(mine, x), penalty(exact, x.double()))
    functional = torch.autograd.functional
    for vectorize in (False, True):
        assert_close(
            functional.jacobian(mine, x, vectorize=vectorize),
            functional.jacobian(exact, x.double(), vectorize=vectorize),
        )
        assert_close(
            functional.hessian(scalar(mine), x, vectorize=vectorize),
            functional.hessian(scalar(exact), x.double(), vectorize=vectorize),
        )
    forward = {"vectorize": True, "strategy": "forward-mode"}
    assert_close(functional.jacobian(mine, x, **forward), functional.jacobian(exact, x.double(), **forward))


def test_a_penalty_on_the_gradient_of_x_has_a_gradient_for_every_parameter(device):
    def gradients(norm: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), norm, nn.Linear(HIDDEN, 1)).to(device, dtype)
        t = tensors(device, dtype)[0].requires_grad_()
        loss = net(t).square().mean()
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        (loss + slope.square().sum()).backward()
        return [p.grad for p in net.parameters()]

    got = gradients(gemma_norm.RMSNorm(HIDDEN), torch.float32)
    want = gradients(nn.RMSNorm(HIDDEN, EPS), torch.float64)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_tangents_of_dual_tensors(device, way, context):
    mine, exact = functions(device)[way]
    x, _, _, direction = tensors(device, torch.float32)

    def tangent(f: Function, t: Tensor, along: Tensor) -> Tensor:
        with context(), forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(t, along))).tangent

    assert_close(tangent(mine, x, direction), tangent(exact, x.double(), direction.double()))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_16_bit_gradient_inside_a_transform_is_rounded_once(device, op):
    x, residual, weight = (t.to(torch.bfloat16) for t in tensors(device, torch.float32)[:3])

    def f(t: Tensor) -> Tensor:
        y = gemma_norm.rms_norm(t, weight) if op == "rms_norm" else gemma_norm.add_rms_norm(t, residual, weight)[0]
        return y.float().square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("way", WAYS)
def test_the_tangent_of_a_gradient_whose_norm_has_none(device, way):
    """As in a Hessian-vector product of later parameters. A gradient is linear in the one that arrives."""
    f = functions(device)[way][0]
    x, _, _, direction = tensors(device, torch.float32)
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    arrives = torch.ones_like(y)
    along = direction.expand_as(y) if y.dim() else direction.sum()
    (want,) = torch.autograd.grad(f(leaf), leaf, along)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(arrives, along.clone()))
        assert_close(forward_ad.unpack_dual(gradient).tangent, want)


def test_a_gradient_of_zeros_without_memory(device):
    """PyTorch's tensors of zeros that have no memory stand for the gradient of what a result does not depend on."""
    x, gate, weight, _ = tensors(device, torch.float32)
    leaf = x.clone().requires_grad_()
    zeros = torch._efficientzerotensor(x.shape, device=device)
    for y in (gemma_norm.rms_norm(leaf, weight), gemma_norm.gated_rms_norm(leaf, gate, weight)):
        (gradient,) = torch.autograd.grad(y, leaf, zeros)
        assert torch.equal(gradient, torch.zeros_like(x))
