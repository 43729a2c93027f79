"""Modules are recognised by what they compute: transformers' classes of every kind, and those that look alike."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

import tiny_models  # noqa: F401  skips without transformers
from gemma_norm.integrations import _semantics
from gemma_norm.integrations._semantics import DTYPES, Found, Left, classify

HALF = [torch.bfloat16, torch.float16]
# Pairs of x's and the weight's dtype, beside equal ones, in which the class computes what an operator does.
WIDE_X = {(torch.float32, weight) for weight in HALF}
WIDE = WIDE_X | {(x, torch.float32) for x in HALF}


def instance(place: str, *arguments: object, **options: object) -> nn.Module:
    folder, name = place.split(".")
    try:
        cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {place}")
    if missing := options.keys() - inspect.signature(cls).parameters.keys():
        pytest.skip(f"{place} of this transformers takes no {', '.join(missing)}")
    return cls(*arguments, **options)


PLAIN = [
    ("llama.LlamaRMSNorm", "rounds twice", WIDE_X),
    ("qwen3.Qwen3RMSNorm", "rounds twice", WIDE_X),
    ("mamba2.Mamba2RMSNorm", "rounds twice", WIDE_X),
    ("t5.T5LayerNorm", "rounds twice", set()),
    ("idefics.IdeficsRMSNorm", "rounds twice", set()),
    ("gemma3.Gemma3RMSNorm", "1 + weight", WIDE),
    ("qwen3_5.Qwen3_5RMSNorm", "1 + weight", WIDE),
    ("olmo2.Olmo2RMSNorm", "rounds once", WIDE),
    ("gpt_oss.GptOssRMSNorm", "rounds once", WIDE),
    ("gemma3n.Gemma3nRMSNorm", "rounds once", WIDE),
    ("falcon_mamba.FalconMambaWeightlessRMSNorm", "no weight", set()),
]
GATED = [
    ("qwen3_5.Qwen3_5RMSNormGated", {}, "gated, silu, rounds each step", WIDE_X, False),
    ("qwen3_next.Qwen3NextRMSNormGated", {}, "gated, silu, rounds each step", WIDE_X, False),
    ("kimi_linear.KimiLinearRMSNormGated", {}, "gated, sigmoid, rounds once", WIDE, False),
    ("lara_mini.LaraMiniRMSNormGated", {}, "gated, silu, rounds once", WIDE, False),
    ("falcon_h1.FalconH1RMSNormGated", {}, "gated, silu, rounds once", WIDE, True),
    ("falcon_h1.FalconH1RMSNormGated", {"n_groups": 4, "norm_before_gate": False},
     "silu gate first, rounds once, groups of 16", WIDE, True),
    ("mamba2.MambaRMSNormGated", {"group_size": 64}, "silu gate first, rounds each step", WIDE_X, True),
    ("zamba2.Zamba2RMSNormGated", {"group_size": 16}, "silu gate first, rounds each step, groups of 16", WIDE_X, True),
]  # fmt: skip


@pytest.mark.parametrize(("place", "kind", "mixed"), PLAIN, ids=[row[0] for row in PLAIN])
def test_plain_norms(place, kind, mixed):
    found = classify(instance(place, 64))
    assert isinstance(found, Found), found
    assert str(found.semantics) == kind and found.semantics.mixed == mixed
    assert found.share <= 0.001


@pytest.mark.parametrize(("place", "options", "kind", "mixed", "alone"), GATED, ids=[f"{r[0]}-{r[2]}" for r in GATED])
def test_gated_norms(place, options, kind, mixed, alone):
    found = classify(instance(place, 64, **options))
    assert isinstance(found, Found), found
    assert str(found.semantics) == kind and found.semantics.mixed == mixed
    assert found.semantics.without_gate is alone


@pytest.mark.parametrize("scale", [True, False])
def test_a_class_whose_instances_differ(scale):
    found = classify(instance("gemma3n.Gemma3nRMSNorm", 64, with_scale=scale))
    assert isinstance(found, Found) and found.semantics.weighted is scale


@pytest.mark.parametrize("place", ["llama4.Llama4TextL2Norm", "nanochat.NanoChatRMSNorm", "hrm_text.HrmTextRMSNorm"])
def test_norms_that_do_not_know_their_size(place):
    found = classify(instance(place))
    assert isinstance(found, Found) and str(found.semantics) == "no weight"


TRAPS = [
    ("muse_spark.MuseSparkTextCenteredRMSNorm", (64,), "rounds in a way of its own"),
    ("deepseek_v4.DeepseekV4UnweightedRMSNorm", (), "rounds in a way of its own"),
    ("glm5_next.Glm5NextTextUnweightedRMSNorm", (), "rounds in a way of its own"),
    ("gradium_phonon_tts.GradiumPhononTTSTimestepNorm", (64,), "rounds in a way of its own"),
    ("hy_v4.HYV4UnweightedRMSNorm", (), "something else than one tensor"),
    ("dory.DoryL2Norm", (), "computes something else"),
    ("muse_spark.MuseSparkTextInputScaledRMSNorm", (64,), "computes something else"),
    ("pocket_tts.PocketTTSTimestepNorm", (64,), "computes something else"),
    ("cohere.CohereLayerNorm", (64,), "computes something else"),
    ("deberta.DebertaLayerNorm", (64,), "has bias beside a weight"),
]


@pytest.mark.parametrize(("place", "arguments", "reason"), TRAPS, ids=[row[0] for row in TRAPS])
def test_traps_are_left_with_a_reason(place, arguments, reason):
    left = classify(instance(place, *arguments))
    assert isinstance(left, Left) and reason in left.reason


@pytest.mark.parametrize("affine", [True, False])
def test_pytorchs_own(affine):
    found = classify(nn.RMSNorm(64, eps=1e-6, elementwise_affine=affine))
    assert isinstance(found, Found) and str(found.semantics) == ("rounds once" if affine else "no weight")
    left = classify(nn.RMSNorm(64, elementwise_affine=affine))
    assert isinstance(left, Left) and "eps is None" in left.reason
    assert classify(nn.LayerNorm(64)) is None and classify(nn.Linear(4, 4)) is None


class Counting(nn.Module):
    """A norm whose eps is added outside of the root, which shows where x is small alone."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__()
        self.weight, self.eps, self.inside = nn.Parameter(torch.ones(32)), 1e-6, inside
        self.register_forward_hook(lambda *_: pytest.fail("the probe must run no hooks"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.float().square().mean(-1, keepdim=True)
        root = (mean + self.eps).sqrt() if self.inside else mean.sqrt() + self.eps
        return (x.float() / root * self.weight.float()).to(x.dtype)


def test_eps_counts_and_hooks_do_not_run():
    assert isinstance(classify(Counting()), Found)
    assert classify(Counting(inside=False)) == Left("computes something else")


def test_the_module_is_not_touched():
    norm = Counting()
    version, mode = norm.weight._version, torch.random.get_rng_state()
    classify(norm)
    assert norm.weight._version == version and norm.weight.grad is None and bool((norm.weight == 1).all())
    assert torch.equal(torch.random.get_rng_state(), mode)


def test_a_class_is_probed_once(monkeypatch):
    _semantics._cache.clear()
    runs = []
    probe = _semantics._Probe.run
    monkeypatch.setattr(_semantics._Probe, "run", lambda self: runs.append(self.hidden) or probe(self))
    for size in (16, 16, 16, 32):
        classify(instance("llama.LlamaRMSNorm", size))
    assert runs == [16, 32]


class Odd(nn.Module):
    def __init__(self, **tensors: nn.Parameter) -> None:
        super().__init__()
        self.eps = 1e-6
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("cannot\nrun")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Odd(), "fails on bfloat16 [2, 128, 64]: RuntimeError: cannot"),
        (Odd(bias=nn.Parameter(torch.ones(4))), "has bias beside a weight"),
        (Odd(weight=nn.Parameter(torch.ones(4, 4))), "its weight has 2 dimensions"),
        (Odd(weight=nn.Parameter(torch.ones(4).int(), requires_grad=False)), "its weight has dtype int32"),
        (type("BareNorm", (nn.Module,), {})(), "has no variance_epsilon or eps"),
    ],
)
def test_reasons(module, reason):
    assert classify(module) == Left(reason)


def test_containers_of_norms_are_none_themselves():
    assert classify(Odd(inner=nn.Linear(2, 2))) is None


def test_dtypes_are_those_of_the_operators():
    from gemma_norm._checks import DTYPES as ours

    assert set(DTYPES) == set(ours)
