"""fuse_residual: additions that join the norm after them have the unfused model's bits, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gemma_norm.integrations.transformers import patch, unpatch
from tiny_models import FAMILIES, TOKENS, Additions, logits, model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# (inside of layers, across layers) of the tiny models: Olmo 2 has its norms after the mixers, so only the last is left.
JOINED = {
    "Llama": (3, 3), "Qwen3": (3, 3), "Gemma3Text": (3, 3), "Olmo2": (0, 1), "Granite": (3, 3), "Qwen3_5Text": (4, 4),
    "Qwen3Next": (4, 4), "Mamba2": (0, 1),
}  # fmt: skip


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """One element for each addition that ran in one operator with a norm."""
    with Additions() as additions:
        yield additions.calls


def states(module: nn.Module, **options: object) -> list[torch.Tensor]:
    with torch.no_grad():
        output = module(TOKENS, use_cache=False, output_hidden_states=True, **options)
    return [output.logits, *output.hidden_states]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@DTYPES
@pytest.mark.parametrize("fuse", ["layer", True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family(family, fuse, dtype, calls):
    plain, fused = model(family, dtype), model(family, dtype)
    patch(plain)
    report = patch(fused, fuse_residual=fuse)
    inside, across = JOINED[family]
    across = across if fuse is True else 0
    assert [row.across for row in report.fused].count(False) == inside and len(report.fused) == inside + across
    want = states(plain)
    assert not calls and same(states(fused), want)
    in_float32 = family == "Mamba2" and dtype != torch.float32  # its residual is, so the addition stays apart
    assert len(calls) == (0 if in_float32 else inside + across)
    assert sum("rms_norm_add_rms_norm" in call for call in calls) == sum(row.before != "" for row in report.fused)
    unpatch(fused)
    assert not any("_gemma_norm" in m.__dict__ for m in fused.modules()) and same(
        states(fused), states(model(family, dtype))
    )


def test_decoding_with_a_cache(calls):
    plain, fused = model("Qwen3_5Text", torch.bfloat16), model("Qwen3_5Text", torch.bfloat16)
    patch(plain)
    patch(fused, fuse_residual=True)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    a, b = plain.generate(TOKENS, **options), fused.generate(TOKENS, **options)
    assert same(list(a.logits), list(b.logits)) and len(calls) == 5 * 8


def test_gradients_are_recorded_inside_of_layers_alone(calls):
    fused, plain = model(), model()
    patch(plain)
    patch(fused, fuse_residual=True)
    for m in (plain, fused):
        m(TOKENS, labels=TOKENS).loss.backward()
    assert len(calls) == 3
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * max(float(b.grad.abs().max()), 1e-2)


def test_inference_mode_joins_inside_of_layers_alone(calls):
    """Its tensors have no version counter, which would tell of writes between two layers."""
    fused = model()
    patch(fused, fuse_residual=True)
    want = logits(fused)
    del calls[:]
    with torch.inference_mode():
        got = fused(TOKENS, use_cache=False).logits
    assert torch.equal(got, want) and len(calls) == 3


def write_in_place(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    output.add_(0.5)


def return_another(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + 0.5


def return_an_equal_one(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.clone()


def change_the_weight(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    norm = module.__dict__.get("following")
    with torch.no_grad():
        norm.weight.mul_(1.5)


@pytest.mark.parametrize("hook", [write_in_place, return_another, return_an_equal_one, change_the_weight])
def test_what_hooks_do_between_layers_counts(hook):
    results = []
    for fuse in (False, True):
        m = model()
        m.model.layers[0].__dict__["following"] = m.model.layers[1].input_layernorm
        m.model.layers[0].register_forward_hook(hook)
        patch(m, fuse_residual=fuse)
        results.append([*states(m), *states(m)])
    assert same(*results)
    assert not same(results[0][:5], states(patch_plain(model()))) or hook is return_an_equal_one


def patch_plain(module: nn.Module) -> nn.Module:
    patch(module)
    return module


def test_hooks_of_the_norms_fire_and_their_results_count(calls):
    results = []
    for fuse in (False, True):
        m, seen = model(), []
        for norm in (m.model.layers[1].post_attention_layernorm, m.model.layers[2].input_layernorm, m.model.norm):
            norm.register_forward_hook(lambda n, args, y, seen=seen: seen.append(args[0].clone()) or y * 2)
        report = patch(m, fuse_residual=fuse)
        results.append([*states(m), *seen])
        assert len(seen) == 3
    assert same(*results)
    assert len(calls) == 5  # all but the norm inside of a layer that has the hook
    assert report.additions == {("model.layers.1.post_attention_layernorm", "the norm has hooks"): 1}


def test_global_hooks_fire(calls):
    m, seen = model(), []
    patch(m, fuse_residual="layer")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        logits(m)
    finally:
        handle.remove()
    assert seen.count("LlamaRMSNorm") == 7 and not calls


def test_another_path_through_the_layers(calls):
    """Layers that are skipped, repeated or run alone take no offer that was not for them, and keep none."""
    results = []
    for fuse in (False, True):
        m = model()
        layers = list(m.model.layers)
        m.model.layers = nn.ModuleList([layers[0], layers[2], layers[1], layers[0]])
        m.config.num_hidden_layers = 4
        patch(m, fuse_residual=fuse)
        results.append([*states(m), *states(m)])
    assert same(*results) and calls


def test_an_offer_is_not_kept_by_copies_nor_by_pickles():
    m = model()
    patch(m, fuse_residual=True)
    logits(m)
    assert all(state.offer is None for x in m.modules() if (state := x.__dict__.get("_gemma_norm")))


NORMED = "gemma_norm.rms_norm_add_rms_norm.default"


def test_the_norm_before_an_addition_joins_it(calls):
    m = model("Gemma3Text")
    report = patch(m, fuse_residual=True)
    layer = "model.layers.0."
    assert [(row.before, row.norm) for row in report.fused[:2]] == [
        (f"{layer}post_attention_layernorm", f"{layer}pre_feedforward_layernorm"),
        (f"{layer}post_feedforward_layernorm", "model.layers.1.input_layernorm"),
    ]
    assert "post_attention_layernorm + pre_feedforward_layernorm" in str(report)
    logits(m)
    assert calls == [NORMED] * 6


def test_the_norm_before_an_addition_joins_it_where_gradients_are_recorded(calls):
    fused, plain = model("Gemma3Text"), model("Gemma3Text")
    patch(plain)
    patch(fused, fuse_residual=True)
    losses = [m(TOKENS, labels=TOKENS).loss for m in (plain, fused)]
    assert torch.equal(*losses) and calls == [NORMED] * 3
    for loss in losses:
        loss.backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * max(float(b.grad.abs().max()), 1e-2)


def other_eps(layer: nn.Module) -> None:
    layer.post_attention_layernorm.eps *= 2


def other_dtype(layer: nn.Module) -> None:
    layer.post_attention_layernorm.float()


def a_hook_after_the_norm_before(layer: nn.Module) -> None:
    layer.post_attention_layernorm.register_forward_hook(lambda norm, args, y: y * 2)


def a_hook_before_the_norm_before(layer: nn.Module) -> None:
    layer.post_attention_layernorm.register_forward_pre_hook(lambda norm, args: (args[0] * 2,))


def a_hook_after_the_norm_after(layer: nn.Module) -> None:
    layer.pre_feedforward_layernorm.register_forward_hook(lambda norm, args, y: y * 2)


def another_norm_before(layer: nn.Module) -> None:
    layer.post_attention_layernorm = nn.Identity()


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        (other_eps, 1),
        (other_dtype, 1),
        (a_hook_after_the_norm_before, 1),
        (a_hook_before_the_norm_before, 1),
        (a_hook_after_the_norm_after, 0),
        (another_norm_before, 1),
    ],
)
def test_a_norm_before_an_addition_that_is_not_like_the_other_stays_apart(change, alone, calls):
    """The addition still joins the norm after it, unless that one has the hook."""
    results = []
    for fuse in (False, "layer"):
        m = model("Gemma3Text", torch.bfloat16)
        change(m.model.layers[1])
        report = patch(m, fuse_residual=fuse)
        results.append(states(m))
    assert same(*results)
    assert calls.count(NORMED) == 2 and len(calls) == 2 + alone
    before = [row.before for row in report.fused if row.norm == "model.layers.1.pre_feedforward_layernorm"]
    assert before == (
        [""] if change is not a_hook_after_the_norm_after else ["model.layers.1.post_attention_layernorm"]
    )


def test_a_change_after_the_patch_that_keeps_a_norm_before_an_addition_apart_is_reported():
    m = model("Gemma3Text", torch.bfloat16)
    report = patch(m, fuse_residual="layer")
    m.model.layers[1].post_attention_layernorm.eps *= 2
    states(m)
    reason = "the norms before and after the addition have two eps"
    assert report.additions == {("model.layers.1.post_attention_layernorm", reason): 1}


@pytest.mark.parametrize("hook", [write_in_place, return_another, return_an_equal_one, change_the_weight])
def test_what_hooks_do_between_layers_with_norms_at_their_ends_counts(hook):
    results = []
    for fuse in (False, True):
        m = model("Gemma3Text")
        m.model.layers[0].__dict__["following"] = m.model.layers[1].input_layernorm
        m.model.layers[0].register_forward_hook(hook)
        patch(m, fuse_residual=fuse)
        results.append([*states(m), *states(m)])
    assert same(*results)
