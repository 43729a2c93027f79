"""Ways in which patch once went wrong, each on the smallest module that shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from gemma_norm.integrations.transformers import patch, patched, unpatch

SIZE = 64


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(SIZE) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = Norm(), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.norm(x))
        h = x + h
        return h


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), Norm()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LayerWithPost(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.post = Norm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.norm(x))
        h = self.post(h)
        h = x + h
        return h


class ModelWithPosts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LayerWithPost(), LayerWithPost()])


class OtherLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(self.norm(x))
        h = x + 3 * h
        return h


def test_a_class_that_is_given_another_forward_runs_that_one(monkeypatch):
    x = torch.randn(2, SIZE)
    for forward in (Layer.forward, OtherLayer.forward, Layer.forward):
        monkeypatch.setattr(Layer, "forward", forward)
        model = Model()
        with torch.no_grad():
            want = model(x)
            with patched(model, fuse_residual=True) as report:
                assert len(report.fused) == 2
                torch.testing.assert_close(model(x), want)


def test_a_norm_that_is_given_another_forward_falls_back_to_that_one(monkeypatch):
    unpatch_first = Norm()
    patch(unpatch_first)
    unpatch(unpatch_first)
    original = Norm.forward
    monkeypatch.setattr(Norm, "forward", lambda self, x: original(self, x) if x.dtype != torch.float64 else x * 7)
    norm, x = Norm(), torch.randn(2, SIZE, dtype=torch.float64)
    patch(norm)
    assert torch.equal(norm.double()(x), x * 7)


@pytest.mark.parametrize("change", ["eps", "dtype", "data"])
def test_a_norm_takes_no_offer_that_was_computed_with_other_values(change):
    model, original = Model(), Model()
    patch(model, fuse_residual=True)
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        results = []
        for one in (model, original):
            h = one.layers[0](x)
            norm = one.layers[1].norm
            if change == "eps":
                norm.eps = 10.0
            elif change == "dtype":
                norm.to(torch.float64)
            else:
                norm.weight.data = norm.weight.data * 4
            results.append(norm(h))
    torch.testing.assert_close(*results)


def test_a_weight_that_is_not_there_between_the_layers_is_not_read():
    """As FSDP's is. Reading it ended the process."""
    model = Model()
    patch(model, fuse_residual=True)
    model.layers[1].norm.weight.untyped_storage().resize_(0)
    with torch.no_grad():
        assert model.layers[0](torch.randn(2, SIZE)).isfinite().all()


def stacked(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.stack([t.detach(), t.detach() * 2]) for name, t in module.named_parameters()}


@pytest.mark.parametrize("fuse", [False, "layer", True])
@pytest.mark.parametrize("posts", [False, True])
def test_parameters_may_be_batched(fuse, posts):
    """What stands for a batch of weights has neither storage nor address."""
    model, original = (ModelWithPosts() if posts else Model() for _ in range(2))
    patch(model, fuse_residual=fuse)
    x, parameters = torch.randn(2, SIZE), stacked(model)
    with torch.no_grad():
        got = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
        want = torch.func.vmap(lambda p: torch.func.functional_call(original, p, (x,)))(parameters)
    assert torch.equal(got, want)


def in_vmap(norm: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda p: torch.func.functional_call(norm, p, (x,)))(stacked(norm))


def with_an_inference_tensor(norm: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        weight = norm.weight * 2
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


@pytest.mark.parametrize("call", [in_vmap, with_an_inference_tensor])
def test_an_offer_is_not_taken_where_the_weight_cannot_be_identified(call):
    model, original = Model(), Model()
    patch(model, fuse_residual=True)
    with torch.no_grad():
        x = model.layers[1](torch.randn(2, SIZE))
        torch.testing.assert_close(call(model.norm, x), call(original.norm, x))


@pytest.mark.filterwarnings("error")
def test_a_fake_model_runs():
    """A fake tensor has no address, and warns when it is asked for one."""
    model = Model()
    patch(model, fuse_residual=True)
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = {name: mode.from_tensor(t) for name, t in model.named_parameters()}
        assert torch.func.functional_call(model, fakes, (torch.empty(2, SIZE),)).shape == (2, SIZE)


def test_a_weight_of_a_subclass_without_memory_serves():
    model, original, x = Model(), Model(), torch.randn(2, SIZE)
    patch(model, fuse_residual=True)
    for one in (model, original):
        one.layers[1].norm.weight = nn.Parameter(TwoTensor(one.layers[1].norm.weight.data, torch.ones(SIZE)))
    with torch.no_grad():
        for part in ("a", "b"):
            torch.testing.assert_close(getattr(model(x), part), getattr(original(x), part))


def test_a_model_with_joined_additions_is_traced():
    model, x = Model(), torch.randn(2, SIZE)
    patch(model, fuse_residual=True)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), Model()(x))


def test_a_gate_that_the_original_broadcasts_is_broadcast():
    class Gated(Norm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return (super().forward(x) * nn.functional.silu(gate.float())).to(x.dtype)

    norm, x, gate = Gated(), torch.randn(4, 1, SIZE), torch.randn(1, 4, SIZE)
    with torch.no_grad():
        want = norm(x, gate)
        report = patch(norm)
        assert len(report.replaced) == 1
        torch.testing.assert_close(norm(x, gate), want)
    assert list(report.fallbacks) == [("", "the gate has another shape than x")]


def test_a_patch_that_fails_changes_nothing():
    class Closed(Norm):
        def __init_subclass__(cls, *, allowed: bool, **options: object) -> None:
            super().__init_subclass__(**options)

    model = Model()
    model.last = Closed()
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="allowed"):
        patch(model, fuse_residual=True)
    assert [type(module) for module in model.modules()] == before


def test_a_norm_that_drops_out_in_training_is_left():
    class Dropping(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    assert [row.reason for row in patch(Dropping().eval()).left] == ["computes something else in training"]


def test_a_list_of_layers_may_have_gaps():
    model = nn.Module()
    model.layers = nn.ModuleList([None, Layer()])  # type: ignore[list-item]
    assert len(patch(model, fuse_residual=True).replaced) == 1


def test_a_weightless_norm_of_a_fixed_size_refuses_another_size():
    norm = nn.RMSNorm(SIZE, eps=1e-6, elementwise_affine=False)
    patch(norm)
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(2, 32))


def test_a_norm_whose_weight_is_taken_away_runs_the_original():
    norm, x = nn.RMSNorm(SIZE, eps=1e-6), torch.randn(2, SIZE)
    patch(norm)
    norm.weight = None
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (SIZE,), eps=1e-6))


@pytest.mark.parametrize("fuse", [False, "layer"])
def test_joined_or_not_in_inference_strides_are_the_originals(fuse):
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = x + x
            r = h
            h = self.norm(h)
            return h, r

    layer, x = Inside(), torch.randn(3, 2, SIZE).transpose(0, 1)
    with torch.no_grad():
        want = layer(x)
        patch(layer, fuse_residual=fuse)
        got = layer(x)
    assert [t.stride() for t in got] == [t.stride() for t in want]
    for ours, original in zip(got, want, strict=True):
        torch.testing.assert_close(ours, original)


def test_a_default_device_of_the_program_is_not_that_of_the_probe():
    class Unseen(Norm):
        """No other test has had it classified."""

    norm = Unseen()
    with torch.device("meta"):
        report = patch(norm)
    assert len(report.replaced) == 1
