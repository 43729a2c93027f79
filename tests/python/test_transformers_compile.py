"""Patched models under torch.compile, torch.export, torch.func, traces and ONNX export."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from gemma_norm.integrations.transformers import patch
from tiny_models import TOKENS, logits, model

SMALL = {"num_hidden_layers": 2, "full_attention_interval": 2}
FUSE = pytest.mark.parametrize("fuse", [False, "layer", True])


def operators(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "gemma_norm" in str(node.target)]


def compiled(module: torch.nn.Module) -> tuple[torch.Tensor, list[str]]:
    """The logits and the operators of ours in the one graph that there is."""
    torch._dynamo.reset()
    found: list[str] = []

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        found.extend(operators(graph.graph))
        return graph

    return logits(torch.compile(module, backend=backend, fullgraph=True)), found


@FUSE
def test_compiled_formula(fuse):
    """Inductor is handed what the original computes, to fuse it with what is around it."""
    ours = model("Llama", torch.bfloat16, **SMALL)
    report = patch(ours, fuse_residual=fuse)
    got, found = compiled(ours)
    assert not found and torch.equal(got, logits(model("Llama", torch.bfloat16, **SMALL))) and not report.fallbacks


@FUSE
@pytest.mark.parametrize("family", ["Llama", "Qwen3_5Text"])
def test_compiled_native(family, fuse):
    ours = model(family, torch.bfloat16, **SMALL)
    report = patch(ours, fuse_residual=fuse, compiled="native")
    want = logits(ours)
    got, found = compiled(ours)
    assert torch.equal(got, want)
    assert len(found) == len(report.replaced)
    layers = ours.config.num_hidden_layers
    assert found.count("gemma_norm.add_rms_norm.default") == (layers if fuse else 0)


def test_compiled_native_code_asks_before_what_the_operator_would_refuse():
    """There is no way back from inside a graph."""
    ours = model()
    patch(ours, compiled="native")
    want = model().model.norm
    for x in (torch.randn(3, 64).bfloat16(), torch.randn(64, 5).t(), torch.randn(3, 64).double()):
        torch._dynamo.reset()
        got = torch.compile(ours.model.norm, backend="eager", fullgraph=True)(x)
        assert got.dtype == want(x).dtype and torch.equal(got, want(x))


def test_compiled_native_gates():
    """A gate of 16 bits with float32 x is widened; a float32 gate with 16-bit x runs the original."""
    mixer = model("Qwen3_5Text", **SMALL).model.layers[0].linear_attn
    patch(mixer, compiled="native")
    want = model("Qwen3_5Text", **SMALL).model.layers[0].linear_attn
    for weight, x, gate in [(torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16,) * 2 + (torch.float32,)]:
        torch._dynamo.reset()
        for norm in (mixer.norm, want.norm):
            norm.to(weight)
        inputs = torch.randn(3, 16).to(x), torch.randn(3, 16).to(gate)
        got = torch.compile(mixer.norm, backend="eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(got, want.norm(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [False, True], ids=["formula", "native"])
def test_export(native):
    ours = model()
    patch(ours, fuse_residual=True, compiled="native" if native else "formula")
    ours.config.use_cache = False
    want = logits(ours)
    with torch.no_grad():
        program = torch.export.export(ours, (TOKENS,), strict=False)
        got = program.module()(TOKENS).logits
    assert bool(operators(program.graph)) is native
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_onnx_export_has_no_operator_of_ours(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'gemma-norm[test]'")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'gemma-norm[test]'")
    norm = model().model.norm
    patch(norm, compiled="native")
    path = tmp_path / "norm.onnx"
    torch.onnx.export(norm, (torch.randn(2, 64),), str(path), dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}


@FUSE
def test_functorch(fuse):
    ours = model()
    report = patch(ours, fuse_residual=fuse)
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (TOKENS,), {"labels": TOKENS}).loss

    gradients = torch.func.grad(loss)(parameters)
    assert {reason for _, reason in report.fallbacks} == {"inside a torch.func transform or a trace"}
    model_ = model()
    model_(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model_.named_parameters():
        want = parameter.grad
        assert float((gradients[name] - want).abs().max()) <= 1e-5 * max(float(want.abs().max()), 1e-2), name
    x = torch.randn(5, 3, 64)
    assert torch.equal(torch.func.vmap(ours.model.norm)(x), model().model.norm(x))


def test_traces_hold_the_formula():
    norm, x = model().model.norm, torch.randn(2, 3, 64)
    want = norm(x)
    report = patch(norm)
    traced = torch.jit.trace(norm, x, check_trace=False)
    assert "gemma_norm" not in str(traced.graph) and torch.equal(traced(x), want)
    assert report.fallbacks.total() == 1
    symbolic = fx.symbolic_trace(norm)
    assert not operators(symbolic.graph) and torch.equal(symbolic(x), want)
