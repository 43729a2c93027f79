"""Programs made of calls (torch.export, torch.jit.trace, make_fx, torch.compile) and what looks on while they run.

They hold the public operators, under whatever mode they were made, and train. Gradients are compared with PyTorch's own
autograd of the formula in float64.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gemma_norm
from block_of_norms import HIDDEN, Block, inputs
from support import assert_same_bits, randn

OPS = torch.ops.gemma_norm
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
PUBLIC = {"add_rms_norm", "gated_rms_norm", "rms_norm"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return request.param


def block(x: Tensor, residual: Tensor, first: Tensor, a: Tensor, b: Tensor, second: Tensor, gated: Tensor) -> Any:
    """The same through torch.ops, of its parameters."""
    y, s = OPS.add_rms_norm(x, residual, first, 1e-6, True)
    return OPS.gated_rms_norm(OPS.rms_norm(F.linear(y, a, b), second), s, gated), s


def exact(x: Tensor, residual: Tensor, first: Tensor, a: Tensor, b: Tensor, second: Tensor, gated: Tensor) -> Any:
    def norm(t: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(t, (HIDDEN,), w, 1e-6)

    s = x + residual
    return norm(norm(F.linear(norm(s, 1 + first), a, b), second), gated) * F.silu(s), s


def parameters(device: str) -> list[Tensor]:
    return [p.detach().to(device).requires_grad_() for p in Block().parameters()]


def loss(y: Tensor, s: Tensor) -> Tensor:
    return y.sin().sum() + (s * s).mean()


def assert_trains(function: Callable[..., Any], rows: int, leaves: list[Tensor]) -> None:
    """Called in grad mode with inputs that require a gradient: theirs, and those of the leaves, the parameters."""
    x, residual = (t.requires_grad_() for t in inputs(rows, leaves[0].device.type))
    wanted = [x, residual, *leaves]
    got = torch.autograd.grad(loss(*function(x, residual)), wanted)
    wanted64 = [t.detach().double().requires_grad_() for t in wanted]
    want = torch.autograd.grad(loss(*exact(*wanted64)), wanted64)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5 * float(w.abs().max()))


def operators(graph: torch.fx.Graph) -> set[str]:
    names = (re.fullmatch(r"gemma_norm\.(\w+)(\.default)?", str(node.target)) for node in graph.nodes)
    return {name[1] for name in names if name}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_trains(mode, strict):
    """However it was exported, saved and loaded, with its parameters, and after decompositions."""
    with mode():
        module, (x, residual) = Block(), inputs(4)
        shapes = {name: {0: torch.export.Dim("rows")} for name in ("x", "residual")}
        program = torch.export.export(module, (x, residual), dynamic_shapes=shapes, strict=strict)
        assert operators(program.graph) == PUBLIC
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
    if mode is torch.inference_mode:  # whose parameters cannot be trained, wherever they are used
        return
    decomposed = program.run_decompositions()
    assert operators(decomposed.graph) == PUBLIC
    for made in (program, loaded, decomposed):
        trained = made.module()
        assert_trains(trained, 6, list(trained.parameters()))
        with torch.no_grad():
            for a, b in zip(trained(x, residual), module(x, residual), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_traced_module_trains(mode, train):
    module = Block().train(train)
    with mode():
        traced = torch.jit.trace(module, inputs(4))
    assert set(re.findall(r"gemma_norm::(\w+)", str(traced.inlined_graph))) == PUBLIC
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for made in (traced, torch.jit.load(file)):
        assert_trains(made, 6, list(made.parameters()))
        with torch.no_grad():
            for a, b in zip(made(*inputs(6)), Block()(*inputs(6)), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", ["modules", "torch.ops"])
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx(mode, tracing, way):
    module = Block()
    module.first.inplace = False  # of plain tensors in inference mode it would record the operator that writes

    def program(x: Tensor, residual: Tensor, *given: Tensor) -> Any:
        if way == "torch.ops":
            return block(x, residual, *given)
        return torch.func.functional_call(
            module, dict(zip(dict(module.named_parameters()), given, strict=True)), (x, residual)
        )

    leaves = parameters("cpu")
    with mode():
        made = make_fx(program, tracing_mode=tracing)(*inputs(4), *leaves)
    assert operators(made.graph) == PUBLIC
    assert_trains(lambda x, residual: made(x, residual, *leaves), 6 if tracing == "symbolic" else 4, leaves)


def test_make_fx_of_a_gradient():
    """The forward pass and the backward pass are an operator each in the graph."""

    def gradient(x: Tensor, weight: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(OPS.rms_norm(x, weight).sin().sum(), x)[0]

    x, weight = randn(3, HIDDEN), randn(HIDDEN, seed=1)
    made = make_fx(gradient, tracing_mode="symbolic")(x, weight)
    assert operators(made.graph) == {"rms_norm", "rms_norm_backward_input"}
    torch.testing.assert_close(made(x, weight), gradient(x, weight))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["modules", "torch.ops"])
def test_compiled_training(device, way, dynamic, backend):
    module = Block().to(device)
    leaves = list(module.parameters()) if way == "modules" else parameters(device)
    function = module if way == "modules" else lambda x, residual: block(x, residual, *leaves)
    graphs: list[set[str]] = []

    def recording(made: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(operators(made.graph))
        return torch._dynamo.lookup_backend(backend)(made, example)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=recording)
    for rows in (4, 7):
        assert_trains(compiled, rows, leaves)
        with torch.no_grad():
            compiled(*inputs(rows, device))
    assert graphs and graphs == [PUBLIC] * len(graphs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(device, backend):
    leaves = parameters(device)

    def compiled(x: Tensor, residual: Tensor) -> Any:
        return block(x, residual, *leaves)

    x, residual = (t.requires_grad_() for t in inputs(4, device))
    wanted = [x, residual, *leaves]
    want = torch.autograd.grad(loss(*compiled(x, residual)), wanted)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss(*compiled(x, residual)).backward()
    torch.testing.assert_close([t.grad for t in wanted], list(want))


@pytest.mark.parametrize("way", ["modules", "torch.ops"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective", "compiled"])
def test_checkpoint(device, kind, way):
    module = Block().to(device)
    leaves = list(module.parameters()) if way == "modules" else parameters(device)
    function = module if way == "modules" else lambda x, residual: block(x, residual, *leaves)
    seen: set[Any] = set()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.add(op)
        return CheckpointPolicy.MUST_SAVE if op is OPS.rms_norm.default else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)

    def run(x: Tensor, residual: Tensor) -> Any:
        return checkpoint(function, x, residual, **options)

    if kind == "compiled":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    if kind == "reentrant":  # it takes .backward() alone
        wanted = [*(t.requires_grad_() for t in inputs(4, device)), *leaves]
        want = torch.autograd.grad(loss(*function(*wanted[:2])), wanted)
        loss(*run(*wanted[:2])).backward()
        for leaf, gradient in zip(wanted, want, strict=True):
            assert_same_bits(leaf.grad, gradient)
    else:
        assert_trains(run, 4, leaves)
    if kind == "selective":
        assert {OPS.rms_norm.default, OPS.add_rms_norm.default, OPS.gated_rms_norm.default} <= seen
        assert not any(op.name().startswith("gemma_norm::_") for op in seen)


class Onlooker(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gemma_norm":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A tensor that holds another, and notes what is done with it."""

    seen: list[str]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner, made.seen = inner, []
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:
            if isinstance(argument, Wrapper):
                argument.seen.append(func.name())
        results = func(*(a.inner if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapper, results)


def calls(device: str) -> dict[str, tuple[Callable[[Tensor], Any], str]]:
    _, residual = inputs(4, device)
    weight = randn(HIDDEN, device=device, seed=2)
    return {
        "rms_norm": (lambda x: gemma_norm.rms_norm(x, weight), "rms_norm"),
        "add_rms_norm": (lambda x: gemma_norm.add_rms_norm(x, residual, weight)[0], "add_rms_norm"),
        "gated_rms_norm": (lambda x: gemma_norm.gated_rms_norm(x, residual, weight), "gated_rms_norm"),
        "torch.ops rms_norm": (lambda x: OPS.rms_norm(x, weight), "rms_norm"),
        "torch.ops add_rms_norm": (lambda x: OPS.add_rms_norm(x, residual, weight)[0], "add_rms_norm"),
        "torch.ops gated_rms_norm": (lambda x: OPS.gated_rms_norm(x, residual, weight), "gated_rms_norm"),
    }


@pytest.mark.parametrize("name", calls("cpu"))
def test_who_looks_on_sees_the_public_operator(device, mode, name):
    """A mode or a subclass, in inference and, once, while a gradient is recorded."""
    call, op = calls(device)[name]
    with mode():
        x, _ = inputs(4, device)
        want = call(x)
        with Onlooker() as onlooker:
            assert_same_bits(call(x), want)
        wrapped = Wrapper(x)
        assert_same_bits(call(wrapped).inner, want)
        assert onlooker.seen == [f"gemma_norm::{op}"]
        assert [name for name in wrapped.seen if name.startswith("gemma_norm")] == [f"gemma_norm::{op}"]
    if mode is torch.enable_grad:
        leaf = x.requires_grad_()
        want = torch.autograd.grad(call(leaf).sin().sum(), leaf)[0]
        with Onlooker() as onlooker:
            assert_same_bits(torch.autograd.grad(call(leaf).sin().sum(), leaf)[0], want)
        backward = f"{'gated_' if op == 'gated_rms_norm' else ''}rms_norm_backward_input"
        assert onlooker.seen == [f"gemma_norm::{op}", f"gemma_norm::{backward}"]


@pytest.mark.parametrize("op", ["_rms_norm", "_add_rms_norm", "_gated_rms_norm"])
def test_the_operators_twins_refuse_what_they_cannot_record(device, op):
    """They are private. A gradient or a tangent that is lost there would be lost in silence."""
    x, residual = inputs(4, device)
    weight = randn(HIDDEN, device=device, seed=2)
    arguments = (x, weight) if op == "_rms_norm" else (x, residual, weight)
    twin = getattr(OPS, op)
    for wanted in range(len(arguments)):
        given = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(arguments)]
        with pytest.raises(
            RuntimeError, match=rf"^{op[1:]}: \w+ must not require grad while .* call gemma_norm\.{op[1:]},"
        ):
            twin(*given)
        with torch.no_grad():
            twin(*given)
        with torch.autograd.forward_ad.dual_level():
            given = [t.detach() for t in given]
            given[wanted] = torch.autograd.forward_ad.make_dual(given[wanted], given[wanted].clone())
            with pytest.raises(RuntimeError, match=rf"^{op[1:]}: \w+ must not have a tangent, got a dual tensor"):
                twin(*given)
