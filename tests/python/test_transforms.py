"""Derivatives of higher order and in forward mode, torch.func's transforms, and torch.compile around them.

What PyTorch differentiates by itself is compared with: the formula in float64, or F.rms_norm.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import gemma_norm
from support import assert_same_bits, randn

HIDDEN = 8
EPS = 1e-6
OPS = torch.ops.gemma_norm
Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def tensors(device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, residual, weight, and something that makes a result a scalar."""
    made = [randn(3, HIDDEN, seed=0), randn(3, HIDDEN, seed=1), randn(HIDDEN, seed=2), randn(3, HIDDEN, seed=3)]
    return [t.to(device, dtype) for t in made]


def functions(device: str) -> dict[str, tuple[Function, Function]]:
    """Functions of x, of the residual and of the weight through each way into the library, and in PyTorch."""
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
THROUGH_AUTOGRAD = [way for way in WAYS if not way.startswith("torch.ops")]  # those record nothing, and say so


def scalar(f: Function) -> Function:
    return lambda t: (f(t) * torch.sin(f(t) + torch.arange(HIDDEN, device=t.device))).sum()


def first(f: Function) -> Function:
    return grad(scalar(f))


def second(f: Function) -> Function:
    return grad(lambda t: first(f)(t).square().sum())


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": first,
    "grad of grad": second,
    "hessian": lambda f: hessian(scalar(f)),
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jvp": lambda f: lambda t: jvp(f, (t,), (torch.cos(t),))[1],
    "vjp": lambda f: lambda t: vjp(f, t)[1](torch.cos(t))[0],
    "vmap": lambda f: lambda t: vmap(f)(torch.stack([t, 2 * t])),
    "vmap over the last dimension": lambda f: lambda t: vmap(f, in_dims=-1)(torch.stack([t, 2 * t], -1)),
    "vmap of grad": lambda f: lambda t: vmap(first(f))(torch.stack([t, 2 * t])),
}


def assert_close(got: Tensor, want: Tensor) -> None:
    """Relative to the largest element, as a derivative is a sum of terms that may cancel; to 1 where all of them are 0."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = float((got.double() - want).abs().max()) / (float(want.abs().max()) or 1)
    assert error < 2e-5, f"relative error {error:.1e}"


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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_vmap_of_a_module_in_inference_writes_nothing(device, context):
    """There the module may write in place, but not inside a transform."""
    x, residual, _, _ = tensors(device, torch.float32)
    module = gemma_norm.RMSNorm(HIDDEN, device=device).eval()
    kept = x.clone(), residual.clone()
    with context():
        y, s = vmap(module)(x, residual)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    want = gemma_norm.add_rms_norm(x, residual, module.weight.detach())
    torch.testing.assert_close((y, s), want)


def test_an_ensemble_of_modules(device):
    """vmap over stacked parameters, with the module on the meta device, as PyTorch's tutorial does it."""
    modules = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), gemma_norm.GemmaRMSNorm(HIDDEN)).to(device) for _ in range(3)]
    for seed, module in enumerate(modules):
        module[1].weight.data.copy_(randn(HIDDEN, seed=seed))
    x, _, _, _ = tensors(device, torch.float32)
    parameters, buffers = stack_module_state(modules)
    base = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), gemma_norm.GemmaRMSNorm(HIDDEN)).to("meta")
    got = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([module(x) for module in modules]))


@pytest.mark.parametrize("way", THROUGH_AUTOGRAD)
def test_second_derivatives_through_autograd(device, way):
    """A penalty on the gradient, and Hessians by both of autograd's means: double backward and batched gradients."""
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


def test_a_gradient_penalty_reaches_the_parameters(device):
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


@pytest.mark.parametrize("way", THROUGH_AUTOGRAD)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_dual_tensors(device, way, context):
    mine, exact = functions(device)[way]
    x, _, _, direction = tensors(device, torch.float32)

    def tangent(f: Function, t: Tensor, along: Tensor) -> Tensor:
        with context(), forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(t, along))).tangent

    assert_close(tangent(mine, x, direction), tangent(exact, x.double(), direction.double()))


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("where", ["native", "meta"])
def test_operators_that_record_no_derivative_refuse_dual_tensors(where, argument):
    """fused_add_rms_norm would keep the old tangents, and the others would drop them."""
    device = "meta" if where == "meta" else "cpu"
    names = ["x", "residual", "weight"]
    with forward_ad.dual_level():
        call = [t.to(device) for t in tensors("cpu", torch.float32)[:3]]
        kept = [t.clone() for t in call]
        call[argument] = forward_ad.make_dual(call[argument], call[argument].clone())
        for op in (OPS.fused_add_rms_norm, OPS.add_rms_norm, gemma_norm.fused_add_rms_norm):
            with pytest.raises(
                RuntimeError, match=f"add_rms_norm: {names[argument]} must not have a tangent, got a dual"
            ):
                op(*call)
        if argument != 1:
            for op in (OPS.rms_norm, lambda x, w: gemma_norm.rms_norm(x, w, out=torch.empty_like(x))):
                with pytest.raises(RuntimeError, match=f"rms_norm: {names[argument]} must not have a tangent, got a"):
                    op(call[0], call[2])
        for t, before in zip(call, kept, strict=True):
            assert where == "meta" or torch.equal(t, before)


def test_a_dual_level_changes_nothing_for_tensors_without_a_tangent(device):
    x, residual, weight, _ = tensors(device, torch.float32)
    want = gemma_norm.add_rms_norm(x, residual, weight)
    with forward_ad.dual_level():
        for a, b in zip(gemma_norm.add_rms_norm(x, residual, weight), want, strict=True):
            assert_same_bits(a, b)
        OPS.fused_add_rms_norm(x, residual, weight)
    assert_same_bits(x, want[0])


def test_the_native_library_sees_tangents():
    """By a symbol outside of PyTorch's stable ABI. This fails, rather than tangents in silence, if PyTorch drops it."""
    x, _, weight, _ = tensors("cpu", torch.float32)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="must not have a tangent"):
        OPS.rms_norm.default(forward_ad.make_dual(x, x.clone()), weight)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("op", ["torch.ops fused_add_rms_norm", "fused_add_rms_norm", "torch.ops out", "out"])
def test_writing_inside_a_transform_is_refused(device, op, transform):
    """A kernel gets the tensor inside the transform's wrapper: the derivative would be that of something else."""
    _, residual, weight, _ = tensors(device, torch.float32)

    def call(t: Tensor) -> Tensor:
        y, s = t * 1, (residual * 1 if transform != "vmap" else residual[0] * 1)
        if "out" in op:
            function = OPS.rms_norm if "ops" in op else gemma_norm.rms_norm
            return function(y, weight, out=torch.empty_like(y))
        (OPS.fused_add_rms_norm if "ops" in op else gemma_norm.fused_add_rms_norm)(y, s, weight)
        return y

    name, advice = ("rms_norm", "rms_norm without out") if "out" in op else ("fused_add_rms_norm", "add_rms_norm")
    with pytest.raises(RuntimeError, match=rf"{name}: .* inside a torch\.func transform.* call gemma_norm\.{advice}"):
        TRANSFORMS[transform](call)(tensors(device, torch.float32)[0])


def test_functionalize_replaces_what_writes(device):
    x, residual, weight, _ = tensors(device, torch.float32)

    def program(x: Tensor, residual: Tensor) -> Tensor:
        OPS.fused_add_rms_norm(x, residual, weight)
        return gemma_norm.rms_norm(x, weight, out=torch.empty_like(x)) + residual

    mine, theirs = (x.clone(), residual.clone()), (x.clone(), residual.clone())
    torch.testing.assert_close(torch.func.functionalize(program)(*mine), program(*theirs))
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(RuntimeError, match=r"inside a torch\.func transform"):
        vmap(torch.func.functionalize(program))(x, residual)


def test_bad_arguments_inside_a_transform_are_named(device):
    x, residual, weight, _ = tensors(device, torch.float32)
    with pytest.raises(RuntimeError, match=r"^rms_norm: weight must have shape \[8\], got \[7\]"):
        vmap(lambda t: gemma_norm.rms_norm(t, weight[:7]))(x)
    with pytest.raises(RuntimeError, match=r"^add_rms_norm: residual must have x's shape \[8\], got \[2\]"):
        vmap(lambda t: gemma_norm.add_rms_norm(t, residual[0, :2], weight))(x)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_16_bit_gradient_inside_a_transform_is_rounded_once(device, op):
    x, residual, weight = (t.to(torch.bfloat16) for t in tensors(device, torch.float32)[:3])

    def f(t: Tensor) -> Tensor:
        y = gemma_norm.rms_norm(t, weight) if op == "rms_norm" else gemma_norm.add_rms_norm(t, residual, weight)[0]
        return y.float().square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0], rtol=2**-7, atol=2**-9)
