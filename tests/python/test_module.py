"""RMSNorm and GemmaRMSNorm."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gemma_norm
from gemma_norm import reference
from gemma_norm.module import Output
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


def inputs(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(7, 128, dtype=dtype, device=device, seed=seed) for seed in range(3)]  # x, residual, post


def overwrites(module: gemma_norm.RMSNorm, x: Tensor, residual: Tensor, post: Tensor | None = None) -> bool:
    """Whether the module writes in place; it is right either way, and returns new tensors if it does not."""
    kept = x.detach().clone(), residual.detach().clone()
    weight = module.weight.detach()
    added = None if post is None else post.detach()
    want = gemma_norm.add_rms_norm(*kept, weight, module.variance_epsilon, module.gemma, added)
    y, s = module(x, residual, post)
    assert_same_bits(y.detach(), want[0])
    assert_same_bits(s.detach(), want[1])
    in_place = y is x and s is residual
    if not in_place:
        assert y is not x and s is not residual
        assert_same_bits(x.detach(), kept[0])
        assert_same_bits(residual.detach(), kept[1])
    return in_place


@pytest.mark.parametrize("with_post", [False, True])
@pytest.mark.parametrize(
    ("context", "mode", "in_place"),
    [
        (torch.no_grad, "eval", True),
        (torch.inference_mode, "eval", True),
        (torch.inference_mode, "train", True),
        (torch.no_grad, "train", False),  # a checkpoint's first forward, or a teacher's
        (torch.enable_grad, "eval", False),
        (torch.enable_grad, "train", False),
    ],
)
def test_with_a_residual_inference_is_in_place(device, dtype, kind, context, mode, in_place, with_post):
    module = make(kind, 128, device=device).train(mode == "train").requires_grad_(context is not torch.enable_grad)
    x, residual, post = inputs(device, dtype)
    with context():
        assert overwrites(module, x, residual, post if with_post else None) == in_place


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("what", ["requires grad", "is a parameter", "is a view of a parameter"])
def test_what_others_may_still_need_is_not_overwritten(device, kind, which, what):
    module = make(kind, 128, device=device).eval()
    arguments = inputs(device)
    if what == "requires grad":
        arguments[which].requires_grad_()
    else:
        parameter = nn.Parameter(arguments[which].clone(), requires_grad=False)
        arguments[which] = parameter if what == "is a parameter" else parameter[:]
    with torch.no_grad():
        # post_residual_addition is only read, so it may be a parameter; a gradient that it requires is another matter.
        assert overwrites(module, *arguments) == (which == 2 and what != "requires grad")


@pytest.mark.parametrize("what", ["one tensor as both", "an expanded residual", "an expanded x", "a partial overlap"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_memory_that_cannot_be_overwritten_works_in_every_mode(device, kind, context, what):
    module = make(kind, 128, device=device).eval()
    x, residual, _ = inputs(device)
    buffer = randn(9, 128, device=device)
    x, residual = {
        "one tensor as both": (x, x),
        "an expanded residual": (x, residual[:1].expand(7, 128)),
        "an expanded x": (x[0].expand(7, 128), residual),
        "a partial overlap": (buffer[:7], buffer[2:]),
    }[what]
    with context():
        assert not overwrites(module, x, residual)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["an inference tensor", "lazily negated"])
def test_tensors_that_cannot_be_written_work_in_inference(device, kind, what, which):
    module = make(kind, 128, device=device).eval()
    arguments = inputs(device)[:2]
    if what == "lazily negated":
        arguments[which] = arguments[which]._neg_view()
    else:
        with torch.inference_mode():
            arguments[which] = arguments[which].clone()
    plain = [t.resolve_neg().clone() for t in arguments]
    with torch.no_grad():
        y, s = module(*arguments)
    want = gemma_norm.add_rms_norm(*plain, module.weight.detach(), 1e-5, kind.gemma)
    assert_same_bits(y, want[0])
    assert_same_bits(s, want[1])
    assert all(torch.equal(t, before) for t, before in zip(arguments, plain, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("both", ["x and a residual", "one tensor as both"])
def test_a_traced_module_writes_nothing(kind, both):
    """torch.jit.trace ends the process where an operator's exception is caught, so none may be tried."""

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


def test_inplace_false_never_overwrites(device, kind):
    module = make(kind, 128, device=device, inplace=False).eval()
    with torch.inference_mode():
        assert not overwrites(module, *inputs(device))


@pytest.mark.parametrize(
    ("inplace", "mode", "kept_is_kept"), [(True, "eval", False), (True, "train", True), (False, "eval", True)]
)
@pytest.mark.parametrize("kept", ["the tensor", "what it was detached from"])
def test_what_becomes_of_a_kept_hidden_state(device, kind, inplace, mode, kept_is_kept, kept):
    """Without grad: in eval mode a state that was kept is overwritten by the next norm, unless inplace is False."""
    module = make(kind, 128, device=device, inplace=inplace).train(mode == "train")
    x, residual, _ = inputs(device)
    before = residual.clone()
    hidden_states = [residual if kept == "the tensor" else residual.requires_grad_()]
    with torch.no_grad():
        module(x, residual if kept == "the tensor" else residual.detach())
    assert torch.equal(hidden_states[0], before) == kept_is_kept


def test_a_bad_argument_is_not_taken_for_memory_that_overlaps(kind):
    x, residual, _ = inputs("cpu")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"residual must have x's shape \[7, 128\], got \[7, 64\]"):
        make(kind, 128).eval()(x, residual[:, :64])


class Block(nn.Module):
    """Pre-norm, so that the residual is the block's own input."""

    def __init__(self, norm: type[nn.Module], hidden: int) -> None:
        super().__init__()
        self.first, self.second = norm(hidden), norm(hidden)
        self.a, self.b = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        y, h = self.second(self.a(self.first(h)), h)
        return h + self.b(torch.relu(y))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("frozen_input", [False, True])
def test_activation_checkpointing(device, kind, use_reentrant, frozen_input):
    """A reentrant checkpoint runs its first forward without grad mode, and its second from the same inputs."""

    def train(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        blocks = nn.ModuleList(Block(kind, 32) for _ in range(3)).to(device)
        embedding = nn.Linear(32, 32).to(device).requires_grad_(not frozen_input)
        h = embedding(randn(4, 32, device=device))
        if frozen_input:
            h = h.requires_grad_()  # as enable_input_require_grads() does
        states = []
        for block in blocks:
            states.append(h)
            h = checkpoint(block, h, use_reentrant=use_reentrant) if checkpointed else block(h)
        loss = h.square().mean() + 0.1 * sum(state.square().mean() for state in states)
        loss.backward()
        return [loss.detach(), *(p.grad for p in blocks.parameters())]

    for got, want in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_autograd_function_that_computes_again(device, kind):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, residual: Tensor, norm: nn.Module) -> Tensor:
            ctx.save_for_backward(x, residual)
            ctx.norm = norm
            return norm(x, residual)[0] * 1

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, residual = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            with torch.enable_grad():
                y = ctx.norm(x, residual)[0]
            return *torch.autograd.grad(y, (x, residual), dy), None

    module = make(kind, 128, device=device)
    x, residual, dy = inputs(device)
    x.requires_grad_()
    want = torch.autograd.grad(module(x, residual)[0], x, dy)[0]
    got = torch.autograd.grad(Again.apply(x * 1, residual * 1, module), x, dy)[0]
    assert_same_bits(got, want)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"eps": None},
            r"eps must be a number, got None; torch\.nn\.RMSNorm takes torch\.finfo\(dtype\)\.eps for None",
        ),
        ({"eps": "1e-6"}, "eps must be a number, got '1e-6'"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, .*, got 0"),
        ({"hidden_size": True}, "hidden_size must be an integer of at least 1, .*, got True"),
        ({"hidden_size": (4, 8)}, r"hidden_size must be an integer of at least 1, .*, got \(4, 8\)"),
        ({"provider": "cudnn"}, "provider must be one of"),
    ],
)
def test_bad_arguments_of_the_constructor(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"hidden_size": 8} | arguments)


@pytest.mark.parametrize("arguments", [{"elementwise_affine": False}, {"has_weight": False}, {"round_each_step": True}])
def test_a_zero_centred_norm_has_a_weight_and_one_rounding(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"GemmaRMSNorm: {name} must be {not value}.*, got {value}"):
        gemma_norm.GemmaRMSNorm(8, **arguments)


class Model(nn.Module):
    """Both signatures of a module, and a function."""

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
    """Each of them may be a constant of the graph while others are its inputs."""
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


@pytest.mark.parametrize("x", [None, [1.0], "x"])
def test_what_is_no_tensor_is_named(kind, x):
    with pytest.raises(RuntimeError, match=r"^rms_norm: x must be a tensor, got "):
        kind(8)(x)
    with pytest.raises(RuntimeError, match=r"^add_rms_norm: x must be a tensor, got "), torch.no_grad():
        kind(8).eval()(x, torch.ones(2, 8))


def test_fx_quantisation_prepares_it(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        model = nn.Sequential(make(kind, 16), nn.Linear(16, 16)).eval()
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (randn(2, 16),))
        torch.testing.assert_close(prepared(randn(2, 16)), model(randn(2, 16)))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_torch_script(kind):
    """A norm without a residual: the native operator in inference, differentiable else."""
    model = nn.Sequential(make(kind, 16), nn.Linear(16, 16))
    scripted = torch.jit.script(model)
    assert list(scripted.state_dict()) == list(model.state_dict())
    x = randn(3, 16).requires_grad_()
    for m in (model, scripted):
        x.grad = model[0].weight.grad = None
        m(x).square().sum().backward()
        if m is model:
            want = x.grad, model[0].weight.grad
        else:
            torch.testing.assert_close((x.grad, model[0].weight.grad), want)
    with torch.no_grad():
        assert_same_bits(scripted[0](x), model[0](x))
