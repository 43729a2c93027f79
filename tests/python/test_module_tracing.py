"""The modules under torch.fx, torch.jit and quantisation."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor, nn

import gemma_norm
from gemma_norm.module import Output
from module_support import inputs, make
from support import assert_same_bits, randn


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("both", ["x and a residual", "one tensor as both"])
def test_a_traced_module_writes_nothing(kind, both):
    """torch.jit.trace ends the process where Python catches an exception of an operator, so that the module may not
    find out by trying whether it can write in place.
    """

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make(kind, 128).eval()

        def forward(self, x: Tensor, residual: Tensor) -> Output:
            return self.norm(x, x if both == "one tensor as both" else residual)

    layer, (x, residual, _) = Layer(), inputs("cpu")
    kept = x.clone(), residual.clone()
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x, residual))
        y, s = traced(x, residual)
    assert_same_bits(x, kept[0])
    assert_same_bits(residual, kept[1])
    want = gemma_norm.add_rms_norm(
        x, x if both == "one tensor as both" else residual, layer.norm.weight.detach(), 1e-5, kind.gemma
    )
    assert_same_bits(y, want[0])
    assert_same_bits(s, want[1])


class Model(nn.Module):
    """Calls a module with and without a residual, and a function."""

    def __init__(self, norm: gemma_norm.RMSNorm) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(norm.hidden_size, norm.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y, residual = self.norm(self.linear(self.norm(x)), residual)
        return y + gemma_norm.rms_norm(residual, self.norm.weight)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_fx_traces_it_as_one_node_a_norm(kind, mode):
    model = Model(make(kind, 16)).train(mode == "train")
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function" and "norm" in node.name]
    assert called == [gemma_norm.rms_norm, gemma_norm.add_rms_norm, gemma_norm.rms_norm]
    x, residual = randn(3, 16), randn(3, 16, seed=1)
    traced(x, residual).sum().backward()
    got, model.norm.weight.grad = model.norm.weight.grad, None
    want = model(x, residual)
    want.sum().backward()
    assert_same_bits(got, model.norm.weight.grad)
    with torch.no_grad():
        assert_same_bits(traced(x, residual), want.detach())


def test_torch_fx_sees_the_function_whichever_argument_is_traced(kind):
    """One argument may be a constant of the graph while another is its input."""
    constant, weight = torch.ones(3, 16), torch.ones(16)
    for traced_argument in range(2):

        def call(t: Tensor, traced_argument: int = traced_argument) -> Tensor:
            arguments = [constant, constant]
            arguments[traced_argument] = t
            y, s = gemma_norm.add_rms_norm(*arguments, weight, gemma=kind.gemma)
            return y + s

        graph = torch.fx.symbolic_trace(call, concrete_args={"traced_argument": traced_argument}).graph
        assert gemma_norm.add_rms_norm in [node.target for node in graph.nodes]


def test_torch_fx_keeps_what_only_writes():
    def call(x: Tensor, residual: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        gemma_norm.fused_add_rms_norm(x, residual, weight)
        gemma_norm.rms_norm(residual, weight, out=out)
        return x

    traced = torch.fx.symbolic_trace(call)
    traced.graph.eliminate_dead_code()
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [gemma_norm.fused_add_rms_norm, gemma_norm.rms_norm]


def test_fx_quantisation_prepares_it(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        model = nn.Sequential(make(kind, 16), nn.Linear(16, 16)).eval()
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (randn(2, 16),))
        torch.testing.assert_close(prepared(randn(2, 16)), model(randn(2, 16)))


SCRIPTED = {
    "RMSNorm": lambda: make(gemma_norm.RMSNorm, 16),
    "GemmaRMSNorm": lambda: make(gemma_norm.GemmaRMSNorm, 16),
    "no weight, eps 1": lambda: gemma_norm.RMSNorm(16, 1, has_weight=False),
    "each step": lambda: make(gemma_norm.RMSNorm, 16, round_each_step=1),
    "GatedRMSNorm": lambda: make(gemma_norm.GatedRMSNorm, 16),
    "groups, sigmoid first": lambda: make(
        gemma_norm.GatedRMSNorm, 16, activation="sigmoid", group_size=4, norm_before_gate=False, round_each_step=True
    ),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
def test_torch_script(kind, saved):
    """A script holds the operator, in grad mode too. TorchScript optimises what it runs the second or third time."""
    model = nn.Sequential(SCRIPTED[kind](), nn.Linear(16, 16))
    scripted = torch.jit.script(model)
    assert list(scripted.state_dict()) == list(model.state_dict())
    if saved:
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        scripted = torch.jit.load(file)
    x = randn(3, 16).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for _ in range(4):
        got = torch.autograd.grad(scripted(x).square().sum(), [x, *scripted.parameters()])
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert_same_bits(scripted(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)], ids=str)
def test_a_scripted_norm_takes_a_gate(shape):
    """Of x's shape or of one in which x can be viewed."""
    module = SCRIPTED["GatedRMSNorm"]()
    scripted = torch.jit.script(module)
    x, gate = randn(6, 16).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    want = torch.autograd.grad(module(x, gate).square().sum(), [x, gate])
    torch.testing.assert_close(torch.autograd.grad(scripted(x, gate).square().sum(), [x, gate]), want)
    with torch.no_grad():
        assert_same_bits(scripted(x, gate), module(x, gate))
    with pytest.raises(RuntimeError, match=r"gate must have x's shape \[6, 16\], got \[5, 16\]"):
        scripted(x, gate.flatten(0, -2)[:5])


class Twice(gemma_norm.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * self.weight


class TwiceGated(gemma_norm.GatedRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * self.weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Twice, TwiceGated])
def test_a_script_of_a_subclass_runs_its_forward(kind):
    x = randn(3, 16)
    assert_same_bits(torch.jit.script(kind(16))(x).detach(), 2 * x)
