"""fuse_rotation: the norms of q and k and their rotation in one operator have the bits that they have apart."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_norm.integrations._rotation import Rotation, rotation
from gemma_norm.integrations.transformers import patch, patched, unpatch
from test_transformers_rewrite import Norm
from tiny_models import TOKENS, logits, model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
JOINED = {"Qwen3": 3, "Gemma3Text": 3, "Qwen3_5Text": 1, "Qwen3Next": 1, "Llama": 0, "Olmo2": 0}
GATED = ("Qwen3_5Text", "Qwen3Next")


class Rotations(TorchDispatchMode):
    """Counts the calls of the operator that normalises and rotates, and those that make a gate contiguous as well."""

    calls = gates = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operator = torch.ops.gemma_norm.qk_norm_rope
        self.gates += function is operator.copies
        self.calls += function in (operator.default, operator.copies)
        return function(*args, **(kwargs or {}))


@DTYPES
@pytest.mark.parametrize("family", JOINED)
def test_a_family(family, dtype):
    plain, fused = model(family, dtype), model(family, dtype)
    patch(plain)
    report = patch(fused, fuse_rotation=True)
    row = ("q_norm", "k_norm", "gate" if family in GATED else "")
    assert [(r.q_norm, r.k_norm, r.gate) for r in report.rotated] == [row] * JOINED[family]
    want = logits(plain)
    with Rotations() as seen:
        got = logits(fused)
    assert torch.equal(got, want) and seen.calls == JOINED[family] and not report.rotations
    assert seen.gates == (seen.calls if family in GATED else 0)
    assert f"{JOINED[family]} rotations joined" in str(report) or not JOINED[family]
    unpatch(fused)
    assert not any("_gemma_norm" in m.__dict__ for m in fused.modules())
    assert torch.equal(logits(fused), logits(model(family, dtype)))


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3_5Text"])
def test_decoding_with_a_cache(family):
    plain, fused = model(family, torch.bfloat16), model(family, torch.bfloat16)
    patch(plain, fuse_residual=True)
    patch(fused, fuse_residual=True, fuse_rotation=True)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with Rotations() as seen:
        got = fused.generate(TOKENS, **options).logits
    want = plain.generate(TOKENS, **options).logits
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and seen.calls == 5 * JOINED[family]


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3_5Text"])
def test_gradients_reach_every_parameter(family):
    fused, plain = model(family), model(family)
    patch(plain)
    patch(fused, fuse_rotation=True)
    with Rotations() as seen:
        losses = [m(TOKENS, labels=TOKENS).loss for m in (plain, fused)]
    assert torch.equal(*losses) and seen.calls == JOINED[family] and seen.gates == (family in GATED)
    for loss in losses:
        loss.backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * max(float(b.grad.abs().max()), 1e-2)


def a_hook_on_a_norm(m: nn.Module) -> None:
    m.model.layers[1].self_attn.q_norm.register_forward_hook(lambda module, args, output: output * 2)


def another_eps(m: nn.Module) -> None:
    m.model.layers[1].self_attn.k_norm.variance_epsilon = 1e-3


def another_dtype(m: nn.Module) -> None:
    m.model.layers[1].self_attn.q_norm.to(torch.float32)
    m.model.layers[1].self_attn.k_norm.to(torch.float32)


def angles_in_float32(m: nn.Module) -> None:
    def pre(module, args, kwargs):
        kwargs["position_embeddings"] = tuple(t.float() for t in kwargs["position_embeddings"])
        return args, kwargs

    m.model.layers[1].self_attn.register_forward_pre_hook(pre, with_kwargs=True)
    m.model.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, output: output.float())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_hook_on_a_norm, "the norms have hooks, or a forward of their own"),
        (another_eps, "the norms of q and k are of two kinds"),
        (another_dtype, "the weight has another dtype, for which the original computes what no operator here does"),
        (angles_in_float32, "q, k, cos and sin are not tensors of one dtype and device"),
    ],
)
def test_calls_that_do_not_suit_run_as_before_and_are_counted(change, reason):
    random = torch.Generator().manual_seed(0)
    h = torch.randn(2, 9, 64, generator=random).bfloat16()
    angles = tuple(torch.randn(2, 9, 16, generator=random).bfloat16() for _ in range(2))
    results = []
    for fuse in (False, True):
        m = model("Qwen3", torch.bfloat16)
        report = patch(m, fuse_rotation=fuse)
        change(m)
        try:
            with torch.no_grad():
                results.append(m.model.layers[1].self_attn(h, position_embeddings=angles, attention_mask=None)[0])
        except RuntimeError as error:  # of the attention, whose k and v then have two dtypes: the same in both
            results.append(str(error))
    a, b = results
    assert a == b if isinstance(a, str) else torch.equal(a, b)
    assert dict(report.rotations) == {("model.layers.1.self_attn", reason): 1} and reason in str(report)


def test_copies_pickles_and_contexts():
    m = model("Qwen3", torch.bfloat16)
    before = logits(m)
    with patched(m, fuse_rotation=True):
        want = logits(m)
        for made in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            with Rotations() as seen:
                assert torch.equal(logits(made), want) and seen.calls == 3
            assert isinstance(made.model.layers[0].self_attn, type(model("Qwen3").model.layers[0].self_attn))
    assert torch.equal(logits(m), before)
    report = patch(m, fuse_rotation=True, dry_run=True)
    assert len(report.rotated) == 3 and "3 rotations would join" in str(report)
    assert "_gemma_norm_rotate" not in dir(m.model.layers[0].self_attn)


def test_compiled_code_is_the_originals():
    m = model("Qwen3", torch.float32, num_hidden_layers=1)
    patch(m, fuse_rotation=True)
    want, called = logits(m), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        got = torch.compile(m, backend=backend, fullgraph=True)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(got, want)
    assert called and not any("gemma_norm" in target for target in called)


def turned(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def whole(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return turned(q, cos, sin), turned(k, cos, sin)


def in_float32(q, k, cos, sin):
    return tuple(y.to(q.dtype) for y in whole(q.float(), k.float(), cos.float(), sin.float()))


def backwards(q, k, cos, sin):
    return whole(q, k, cos, -sin)


def neighbours(q, k, cos, sin):
    def one(x):
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

    return one(q), one(k)


@pytest.mark.parametrize("function", [in_float32, backwards, neighbours, functools.partial(whole), len])
def test_a_function_that_computes_something_else_is_not_known(function):
    assert rotation(function) == Rotation(full=False, partial=False)


def test_the_functions_of_transformers_are_known():
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3").apply_rotary_pos_emb
    qwen3_5 = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5").apply_rotary_pos_emb
    assert rotation(qwen3) == rotation(whole) == Rotation(full=True, partial=False)
    assert rotation(qwen3_5) == Rotation(full=True, partial=True)


def test_a_function_is_tried_on_the_cpu_whatever_the_default_device_and_dtype_are():
    rotation.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            assert rotation(whole).full
    finally:
        torch.set_default_dtype(before)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = Norm(16), Norm(16)


class InPlace(Attention):
    def forward(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        scale = 2.0
        q, k = whole(q, k, cos, sin)
        return q * scale, k


class Transposed(Attention):
    def forward(self, q, k, cos, sin):
        k = k * 1
        q = self.q_norm(q.transpose(1, 2)).transpose(1, 2)
        k = self.k_norm(k.transpose(1, 2)).transpose(1, 2)
        q, k = whole(q, k, cos, sin)
        return q * 2, k


class ReadBetween(Attention):
    def forward(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        other = q * 2
        q, k = whole(q, k, cos, sin)
        return q, k + other[:, :1]


class OneNorm(Attention):
    def forward(self, q, k, cos, sin):
        q = self.q_norm(q)
        q, k = whole(q, k, cos, sin)
        return q, self.k_norm(k)


class Swapped(Attention):
    def forward(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        k, q = whole(q, k, cos, sin)
        return q, k


class Unknown(Attention):
    def forward(self, q, k, cos, sin):
        q = self.q_norm(q)
        k = self.k_norm(k)
        q, k = in_float32(q, k, cos, sin)
        return q, k


@pytest.mark.parametrize("kind", [InPlace, Transposed, ReadBetween, OneNorm, Swapped, Unknown])
def test_which_statements_are_known(kind):
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 16, generator=random) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 16, generator=random) for _ in range(2))
    attention = kind()
    patch(attention)
    want = attention(q, k, cos, sin)
    unpatch(attention)
    report = patch(attention, fuse_rotation=True)
    known = kind in (InPlace, Transposed)
    assert len(report.rotated) == known
    assert [row.reason for row in report.unrotated] == (
        ["the function that rotates is not of a known kind"] if kind is Unknown else []
    )
    got = attention(q, k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not report.rotations


def test_fuse_rotation_is_true_or_false():
    with pytest.raises(ValueError, match=r"^patch: fuse_rotation must be one of False, True, got 'layer'$"):
        patch(Attention(), fuse_rotation="layer")
