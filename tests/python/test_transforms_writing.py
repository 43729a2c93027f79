"""Calls that write inside torch.func's transforms and with dual tensors. Most are refused."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap

import gemma_norm
from support import assert_same_bits, randn
from transforms_support import HIDDEN, OPS, TRANSFORMS, tensors


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_vmap_of_a_module_in_inference_writes_nothing(device, context):
    """In inference the module may write in place, but a transform would not see the write."""
    x, residual, _, _ = tensors(device, torch.float32)
    module = gemma_norm.RMSNorm(HIDDEN, device=device).eval()
    kept = x.clone(), residual.clone()
    with context():
        y, s = vmap(module)(x, residual)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    want = gemma_norm.add_rms_norm(x, residual, module.weight.detach())
    torch.testing.assert_close((y, s), want)


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("where", ["native", "meta"])
def test_what_writes_refuses_dual_tensors(where, argument):
    """fused_add_rms_norm would leave the old tangents to the tensors that it writes, and out= would drop tangents."""
    device = "meta" if where == "meta" else "cpu"
    names = ["x", "residual", "weight"]
    with forward_ad.dual_level():
        call = [t.to(device) for t in tensors("cpu", torch.float32)[:3]]
        kept = [t.clone() for t in call]
        call[argument] = forward_ad.make_dual(call[argument], call[argument].clone())
        for op in (OPS.fused_add_rms_norm, gemma_norm.fused_add_rms_norm):
            with pytest.raises(
                RuntimeError, match=f"add_rms_norm: {names[argument]} must not have a tangent, got a dual"
            ):
                op(*call)
        if argument != 1:
            for op in (gemma_norm.rms_norm, OPS.rms_norm.out):
                with pytest.raises(RuntimeError, match=f"rms_norm: {names[argument]} must not have a tangent, got a"):
                    op(call[0], call[2], out=torch.empty_like(call[0]))
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
    """It sees them by a symbol outside of PyTorch's stable ABI. If a PyTorch has it no more, this test must fail: else
    tangents would be dropped in silence.
    """
    x, _, weight, _ = tensors("cpu", torch.float32)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="must not have a tangent"):
        OPS._rms_norm.default(forward_ad.make_dual(x, x.clone()), weight)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("op", ["torch.ops fused_add_rms_norm", "fused_add_rms_norm", "torch.ops out", "out"])
def test_writing_inside_a_transform_is_refused(device, op, transform):
    """A kernel gets the tensor without the transform's wrapper, so that the transform would not see the write."""
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


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("options", [{}, {"scale": torch.ones(1)}, {"return_y": True}], ids=str)
def test_the_advice_of_a_quantising_operator_that_writes_can_be_followed(device, transform, options):
    """Only where a derivative is wanted must the quantised result be given up."""
    _, residual, weight, _ = tensors(device, torch.float32)
    options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}

    def call(t: Tensor, function: object = gemma_norm.fused_add_rms_norm_quant, **more: object) -> Tensor:
        return function(t * 1, residual * 1, weight, **more)[0] * 1.0

    x = tensors(device, torch.float32)[0]
    with pytest.raises(RuntimeError, match=r"^fused_add_rms_norm_quant: ") as caught:
        TRANSFORMS[transform](lambda t: call(t, dtype=torch.int8, **options))(x)
    quantised = transform == "vmap"
    function = "add_rms_norm_quant" if quantised else "add_rms_norm"
    assert str(caught.value).endswith(f": call gemma_norm.{function}")
    more = {"dtype": torch.int8, **options} if quantised else {}
    assert TRANSFORMS[transform](lambda t: call(t, getattr(gemma_norm, function), **more))(x) is not None


@pytest.mark.parametrize("shape", [(2, 5, 64), (5, 1)])
def test_what_replaces_a_write_checks_it(device, shape):
    """PyTorch would broadcast the result, or be silent. torch.compile's front asks the fake implementation before."""
    x, out = randn(5, 64, device=device), torch.empty(shape, device=device)
    with pytest.raises(RuntimeError, match=r"out must have x's shape \[5, 64\]"):
        aot_function(lambda x, out: OPS.rms_norm.out(x, out=out), nop)(x, out)


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
