"""When RMSNorm and GemmaRMSNorm write into x and the residual, and when they return new tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gemma_norm
from module_support import inputs, make
from support import assert_right, assert_same_bits, randn


def overwrites(module: gemma_norm.RMSNorm, x: Tensor, residual: Tensor, post: Tensor | None = None) -> bool:
    """Calls the module and tells whether it wrote in place. Asserts that the result is right, and that it either wrote
    both x and the residual or returned new tensors and left both alone.
    """
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
        (torch.no_grad, "train", False),  # such as the first forward of a checkpoint
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
        # post_residual_addition is only read, so that it may be a parameter. It must not require a gradient.
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


def test_inplace_false_never_overwrites(device, kind):
    module = make(kind, 128, device=device, inplace=False).eval()
    with torch.inference_mode():
        assert not overwrites(module, *inputs(device))


@pytest.mark.parametrize(
    ("inplace", "mode", "kept_is_kept"), [(True, "eval", False), (True, "train", True), (False, "eval", True)]
)
@pytest.mark.parametrize("kept", ["the tensor", "what it was detached from"])
def test_what_becomes_of_a_kept_hidden_state(device, kind, inplace, mode, kept_is_kept, kept):
    """In eval mode without grad, the next norm overwrites a hidden state that was kept, unless inplace is False."""
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
    """A pre-norm block: its residual is its own input."""

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
    """A reentrant checkpoint runs its first forward without grad, and a second from the same inputs, which must be
    intact.
    """

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


def test_qk_norm_reads_slices_in_place(device):
    """q and k are slices of a fused qkv buffer, as in a layer of Qwen3.5."""
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
