"""Gradients of the functional operators agree with PyTorch's own in float64, and operators that record none say so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gemma_norm
from support import assert_same_bits, make_weight, randn

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def exact(s: Tensor, weight: Tensor, gemma: bool) -> Tensor:
    return s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight if gemma else weight)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def assert_close(gradient: Tensor, want: Tensor) -> None:
    error = (gradient.double() - want).abs().max() / want.abs().max()
    assert float(error) < TOLERANCE[gradient.dtype]


@pytest.mark.parametrize("shape", [(64,), (33, 96), (3, 5, 40), (2, 1001)])
def test_rms_norm(device, dtype, gemma, shape):
    for weight_dtype in {dtype, torch.float32}:
        x, weight = leaf(randn(*shape, dtype=dtype, device=device)), leaf(randn(shape[-1], device=device, seed=1))
        weight = leaf(weight.to(weight_dtype))
        dy = randn(*shape, dtype=dtype, device=device, seed=2)
        y = gemma_norm.rms_norm(x, weight, gemma=gemma)
        assert_same_bits(y.detach(), gemma_norm.rms_norm(x.detach(), weight.detach(), gemma=gemma))
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        assert (dx.dtype, dweight.dtype) == (dtype, weight_dtype) and dweight.shape == weight.shape
        x64, weight64 = leaf(x.double()), leaf(weight.double())
        want = torch.autograd.grad(exact(x64, weight64, gemma), (x64, weight64), dy.double())
        assert_close(dx, want[0])
        assert_close(dweight, want[1])


@pytest.mark.parametrize("through", ["y", "sum", "both"])
def test_add_rms_norm(device, dtype, gemma, through):
    """Rounding counts as the identity. So the function in float64 takes the rounded sum for its argument."""
    inputs = [leaf(randn(17, 120, dtype=dtype, device=device, seed=seed)) for seed in range(3)]
    weight = leaf(make_weight(120, torch.float32, device, gemma))
    y, s = gemma_norm.add_rms_norm(*inputs[:2], weight, gemma=gemma, post_residual_addition=inputs[2])
    assert_same_bits(s.detach(), (inputs[0] + (inputs[1] + inputs[2])).detach())
    dy, dsum = (randn(17, 120, dtype=dtype, device=device, seed=seed) for seed in (4, 5))
    s64, weight64 = leaf(s.double()), leaf(weight.double())
    outputs = {"y": [(y, dy)], "sum": [(s, dsum)], "both": [(y, dy), (s, dsum)]}[through]
    outputs64 = {"y": exact(s64, weight64, gemma), "sum": s64}
    want_outputs = [outputs64[name] for name in (["y", "sum"] if through == "both" else [through])]
    got = torch.autograd.grad([o for o, _ in outputs], (*inputs, weight), [d for _, d in outputs])
    want = torch.autograd.grad(want_outputs, (s64, weight64), [d.double() for _, d in outputs], allow_unused=True)
    for gradient in got[:3]:
        assert gradient.dtype == dtype
        assert_same_bits(gradient, got[0])
    assert_close(got[0], want[0])
    if through == "sum":
        assert bool((got[3] == 0).all())
    else:
        assert_close(got[3], want[1])


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_at_a_time(device, wanted):
    tensors = [randn(4, 32, device=device, seed=seed) for seed in range(3)]
    tensors.insert(2, make_weight(32, torch.float32, device, False))  # x, residual, weight, post

    def gradients(required: list[int]) -> list[Tensor]:
        x, residual, weight, post = (t.clone().requires_grad_(i in required) for i, t in enumerate(tensors))
        y, s = gemma_norm.add_rms_norm(x, residual, weight, post_residual_addition=post)
        leaves = [(x, residual, weight, post)[i] for i in required]
        return list(torch.autograd.grad((y * s).sum(), leaves))

    assert_same_bits(gradients([wanted])[0], gradients([0, 1, 2, 3])[wanted])


def test_one_tensor_as_several_arguments(device):
    x, weight = leaf(randn(4, 32, device=device)), make_weight(32, torch.float32, device, False)
    y, _ = gemma_norm.add_rms_norm(x, x, weight, post_residual_addition=x)
    x64 = leaf(x.double())
    want = torch.autograd.grad(exact(3 * x64, weight.double(), False).sum(), x64)[0]
    assert_close(torch.autograd.grad(y.sum(), x)[0], want)


def test_strided_expanded_and_empty_inputs(device):
    weight = leaf(make_weight(48, torch.float32, device, False))
    buffer = leaf(randn(5, 3, 96, device=device))
    gemma_norm.rms_norm(buffer[:, 1, 24:72], weight).sum().backward()
    assert bool((buffer.grad[:, 0] == 0).all()) and bool((buffer.grad[:, 1, 24:72] != 0).any())
    row = leaf(randn(1, 48, device=device))
    gemma_norm.rms_norm(row.expand(7, 48), weight).sum().backward()
    assert row.grad.shape == row.shape
    none = leaf(torch.empty(0, 48, device=device))
    weight.grad = None
    gemma_norm.rms_norm(none, weight).sum().backward()
    assert none.grad.shape == none.shape and bool((weight.grad == 0).all())


def test_no_graph_where_none_is_asked_for(device):
    x, weight = randn(2, 16, device=device), make_weight(16, torch.float32, device, False)
    assert gemma_norm.rms_norm(x, weight).grad_fn is None
    with torch.no_grad():
        assert not gemma_norm.rms_norm(leaf(x), leaf(weight)).requires_grad
        assert not gemma_norm.add_rms_norm(leaf(x), x, weight)[0].requires_grad
        assert not torch.ops.gemma_norm.rms_norm(leaf(x), leaf(weight)).requires_grad
    with torch.inference_mode():
        assert gemma_norm.rms_norm(x, weight).is_inference()
        assert torch.ops.gemma_norm.rms_norm(leaf(x), weight).is_inference()


def test_an_input_changed_before_backward_is_noticed(device):
    x, weight = leaf(randn(2, 16, device=device)), make_weight(16, torch.float32, device, False)
    y = gemma_norm.rms_norm(x, weight)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", ["fused_add_rms_norm", "out"])
def test_an_output_written_over_a_saved_tensor_is_noticed(device, op):
    """The matrix product has saved x for its backward. As x requires no gradient, our checks cannot refuse to
    write it.
    """
    x, weight = randn(4, 16, device=device), make_weight(16, torch.float32, device, False)
    matrix = leaf(randn(16, 16, device=device))
    y = x @ matrix
    if op == "out":
        gemma_norm.rms_norm(x, weight, out=x)
    else:
        gemma_norm.fused_add_rms_norm(x, torch.ones_like(x), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("op", "replaced", "reason"),
    [
        ("fused_add_rms_norm", {"weight": torch.ones(15)}, "weight must have shape"),
        ("fused_add_rms_norm", {"post_residual_addition": torch.ones(4, 15)}, "post_residual_addition must have"),
        ("fused_add_rms_norm", {"eps": -1.0}, "eps must be finite"),
        ("rms_norm.out", {"weight": torch.ones(15)}, "weight must have shape"),
    ],
)
def test_a_refused_write_leaves_the_graphs_of_others_usable(op, replaced, reason):
    """Autograd counts the writes to a tensor, and refuses to use one that was written. A refused write must not
    count.
    """
    x, residual, matrix = randn(4, 16), randn(4, 16, seed=1), leaf(randn(16, 16))
    y = (x @ matrix) * (residual @ matrix)
    arguments = {"x": x, "weight": torch.ones(16), **replaced}
    with pytest.raises(RuntimeError, match=reason):
        if op == "rms_norm.out":
            torch.ops.gemma_norm.rms_norm.out(**arguments, out=residual)
        else:
            torch.ops.gemma_norm.fused_add_rms_norm(residual=residual, **arguments)
    assert x._version == residual._version == 0
    y.sum().backward()


@pytest.mark.parametrize("argument", ["x", "residual", "out"])
def test_an_inference_tensor_is_refused_outside_of_inference_mode_before_anything_is_written(device, argument):
    """No write is counted for the other tensor either, which a graph may have saved."""
    weight, matrix = make_weight(16, torch.float32, device, False), leaf(randn(16, 16, device=device))
    tensors = {name: randn(4, 16, device=device, seed=seed) for seed, name in enumerate(["x", "residual", "out"])}
    with torch.inference_mode():
        tensors[argument] = tensors[argument].clone()
    saved = [t for t in tensors.values() if not t.is_inference()]
    y = sum(t @ matrix for t in saved)
    kept = {name: t.clone() for name, t in tensors.items()}
    with pytest.raises(
        RuntimeError, match=f"rms_norm: {argument} is written and must not be an inference tensor outside"
    ):
        if argument == "out":
            gemma_norm.rms_norm(tensors["x"], weight, out=tensors["out"])
        else:
            gemma_norm.fused_add_rms_norm(tensors["x"], tensors["residual"], weight)
    for name, t in tensors.items():
        assert_same_bits(t, kept[name])
    assert all(t._version == 0 for t in saved)
    y.sum().backward()
    with torch.inference_mode():
        gemma_norm.fused_add_rms_norm(tensors["x"], tensors["residual"], weight)


def test_one_tensor_as_several_arguments_of_a_compiled_call(device):
    module = gemma_norm.RMSNorm(32, device=device)

    def loss(x: Tensor) -> Tensor:
        h = x * 2
        y, s = module(h, h, h)
        return (y * s).sum()

    x = leaf(randn(4, 32, device=device))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_training_lowers_a_loss(device):
    """A zero-centred norm and a linear layer learn a fixed map."""
    torch.manual_seed(0)
    x = randn(64, 32, device=device)
    target = x.flip(-1) * 2
    net = torch.nn.Sequential(gemma_norm.GemmaRMSNorm(32), torch.nn.Linear(32, 32)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert float(net[0].weight.detach().abs().max()) > 0.01
