"""patch, unpatch, patched and the report on tiny models: what is replaced, with which bits, and what is counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import gemma_norm
from gemma_norm.integrations._forwards import refusal
from gemma_norm.integrations.transformers import patch, patched, unpatch
from tiny_models import FAMILIES, MAMBA2_GROUPS, is_ours, logits, model, norms, randomise

KINDS = {
    "Llama": {"rounds twice": 7},
    "Qwen3": {"rounds twice": 13},
    "Gemma3Text": {"1 + weight": 19},
    "Olmo2": {"rounds once": 13},
    "Granite": {"rounds twice": 7},
    "Qwen3_5Text": {"1 + weight": 11, "gated, silu, rounds each step": 3},
    "Mamba2": {"rounds twice": 4, f"silu gate first, rounds each step{MAMBA2_GROUPS}": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in KINDS])
def test_a_family(family, dtype):
    """float32 within 1e-5 of the largest logit. bfloat16: the original's bits, but for roundings tipped by another last
    place of float32, about one of a million norm elements; so no farther from float32 than 1.1 times the original.
    """
    original, ours = model(family, dtype), model(family, dtype)
    want = logits(original)
    report = patch(ours)
    kinds = {str(row.semantics): 0 for row in report.replaced}
    for row in report.replaced:
        kinds[str(row.semantics)] += 1
    assert kinds == KINDS[family] and not report.left
    assert all(is_ours(m) for name, m in norms(ours).items())
    got = logits(ours)
    if dtype == torch.float32:
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    else:
        exact = logits(model(family))
        assert float((got - exact).abs().mean()) <= 1.1 * float((want - exact).abs().mean())
        assert float((got == want).float().mean()) > 0.99
    unpatch(ours)
    assert not any(is_ours(m) for m in ours.modules()) and torch.equal(logits(ours), want)


def test_an_encoder_decoder():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    t5 = tf.T5ForConditionalGeneration(config).eval()
    randomise(t5)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        want = t5(input_ids=ids, labels=ids).logits
        with patched(t5) as report:
            got = t5(input_ids=ids, labels=ids).logits
        assert len(report.replaced) == 12 and not report.fallbacks
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
        assert torch.equal(t5(input_ids=ids, labels=ids).logits, want)


def test_the_operator_runs(monkeypatch):
    """Each replaced norm is called, and none computes as it did."""
    ours = model()
    patch(ours)
    base = type(ours.model.norm).__mro__[1]
    monkeypatch.setattr(base, "forward", lambda *_: pytest.fail("the original forward must not run"))
    logits(ours)


def test_parameters_and_names_stay():
    ours = model("Gemma3Text")
    before = {name: (p.data_ptr(), p._version, id(p)) for name, p in ours.named_parameters()}
    keys, classes = list(ours.state_dict()), {name: type(m) for name, m in norms(ours).items()}
    patch(ours, fuse_residual=True)
    assert {name: (p.data_ptr(), p._version, id(p)) for name, p in ours.named_parameters()} == before
    assert list(ours.state_dict()) == keys
    for name, module in norms(ours).items():
        assert isinstance(module, classes[name]) and type(module) is not classes[name]
        assert type(module).__name__ == classes[name].__name__ and type(module).__module__ == classes[name].__module__
        assert repr(module).endswith(", gemma_norm)")


def test_calls_that_the_operator_would_not_answer_alike_run_the_original():
    """A float32 weight makes float32 of bfloat16 x in Llama's norm; the operator would keep bfloat16."""
    ours = model()
    norm, before = ours.model.norm, model().model.norm
    report = patch(ours)
    x = torch.randn(3, 64)
    for given in (x.bfloat16(), x.double(), torch.randn(64, 5).t(), x.half()):
        got, want = norm(given), before(given)
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert sorted((name, count) for (name, _), count in report.fallbacks.items()) == [("model.norm", 1)] * 4
    text = str(report)
    assert "4 calls ran the original forward" in text and "1 x  x is bfloat16 and the weight float32" in text
    assert "x must have a contiguous last dimension (stride 1), got stride 5" in text
    with pytest.raises(RuntimeError, match="must match the size"):
        norm(torch.randn(3, 65))  # what the original does not take either


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_in_inference_a_result_has_the_strides_that_the_original_gives_it(family):
    """They decide which kernels the model takes next. Heads before tokens, as attention has them, and a slice."""
    norm = next(iter(norms(model(family)).values()))
    hidden = norm.weight.shape[0]
    inputs = [torch.randn(2, 5, 3, hidden).transpose(1, 2), torch.randn(2, 5, 3, 2 * hidden)[..., :hidden]]
    with torch.no_grad():
        want = [norm(x) for x in inputs]
        patch(norm)
        got = [norm(x) for x in inputs]
    assert is_ours(norm) and [t.stride() for t in got] == [t.stride() for t in want]
    assert not want[0].is_contiguous()
    for ours, original in zip(got, want, strict=True):
        torch.testing.assert_close(ours, original)


def test_out_of_memory_is_no_refusal():
    """There is no memory for the original either, and those who wait for this error must see it."""
    for error in (RuntimeError("rms_norm: CUDA out of memory"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(torch.OutOfMemoryError):
            refusal(error)
    assert refusal(RuntimeError("rms_norm: x must\nnot")) == "rms_norm: x must"


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_with_float32_x(weight):
    """residual_in_fp32 of Mamba: the result is float32. The operator serves Llama's norm, the original T5's."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x = torch.randn(4, 64)
    for kind, counted, dtype in ((LlamaRMSNorm, 0, torch.float32), (T5LayerNorm, 1, weight)):
        norm = kind(64).to(weight)
        randomise(norm)
        want, report = norm(x), patch(norm)
        got = norm(x)
        assert got.dtype == want.dtype == dtype and report.fallbacks.total() == counted
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rounding_once():
    x = torch.randn(64, 64).bfloat16()
    norm = model("Llama", torch.bfloat16).model.norm
    original = norm(x)
    with patched(norm) as report:
        assert torch.equal(norm(x), original) and str(report.replaced[0].semantics) == "rounds twice"
    with patched(norm, rounding="once") as report:
        once = norm(x)
        assert torch.equal(once, gemma_norm.rms_norm(x, norm.weight, 1e-6))
        assert str(report.replaced[0].semantics) == "rounds once"
        assert norm.to(torch.float32)(x).dtype == torch.float32 and report.fallbacks.total() == 1
    assert not torch.equal(once, original)


def test_gated_norms_are_optional_and_their_gate_too():
    qwen = model("Qwen3_5Text", torch.bfloat16)
    report = patch(qwen, gated=False)
    assert len(report.replaced) == 11
    assert {(row.cls, row.reason) for row in report.left} == {("Qwen3_5RMSNormGated", "has a gate, and gated=False")}
    mamba = model("Mamba2", torch.bfloat16)
    norm = mamba.backbone.layers[0].mixer.norm
    x, gate = torch.randn(2, 3, 128).bfloat16(), torch.randn(2, 3, 128).bfloat16()
    want, alone = norm(x, gate), norm(x)
    report = patch(mamba)
    assert torch.equal(norm(x, gate), want) and torch.equal(norm(x, gate=gate), want) and torch.equal(norm(x), alone)
    assert not report.fallbacks
    before = model("Mamba2", torch.bfloat16).backbone.layers[0].mixer.norm
    got, want = norm(x.float(), gate), before(x.float(), gate)  # as when the scan is float32 and the rest is not
    assert got.dtype == want.dtype == torch.float32 and not report.fallbacks
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(norm(x, gate.float()), before(x, gate.float()))
    assert "gate must have x's dtype" in next(iter(report.fallbacks))[1]


def test_a_second_patch_reports_and_changes_nothing():
    ours = model()
    first = patch(ours)
    classes = [type(m) for m in ours.modules()]
    second = patch(ours, rounding="once")
    assert not second.replaced and [type(m) for m in ours.modules()] == classes
    assert [row.name for row in second.already] == [row.name for row in first.replaced]
    assert "7 norms were replaced already" in str(second)


def test_patched_restores_what_it_changed_alone():
    ours = model()
    patch(ours.model.norm)
    with pytest.raises(ZeroDivisionError), patched(ours) as report:
        assert len(report.replaced) == 6 and len(report.already) == 1
        _ = 1 / 0
    assert is_ours(ours.model.norm) and sum(is_ours(m) for m in ours.modules()) == 1


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_strict_and_dry_run():
    mixed = nn.Sequential(model(), Halving())
    report = patch(mixed, fuse_residual=True, dry_run=True)
    assert not any(is_ours(m) for m in mixed.modules()) and report.dry_run and len(report.fused) == 6
    assert "7 norms would be replaced" in str(report) and "6 residual additions would join a norm" in str(report)
    with pytest.raises(RuntimeError, match=r"(?s)left as they are:.*Halving  computes something else  1"):
        patch(mixed, strict=True)
    assert not any(is_ours(m) for m in mixed.modules())
    with pytest.raises(RuntimeError, match="Halving"):
        report.raise_if_left()
    patch(mixed[0], strict=True).raise_if_left()


def test_the_report_is_a_table():
    text = str(patch(model("Qwen3"), fuse_residual=True))
    assert text.splitlines() == [
        "13 norms replaced",
        "  6 x  Qwen3RMSNorm(16)  rounds twice  eps 1e-06  float32  model.layers.*.self_attn.q_norm,"
        " model.layers.*.self_attn.k_norm",
        "  7 x  Qwen3RMSNorm(64)  rounds twice  eps 1e-06  float32  model.layers.*.input_layernorm and 2 more",
        "6 residual additions joined a norm",
        "  3 x  Qwen3DecoderLayer  + post_attention_layernorm  in the layer                     model.layers.*",
        "  2 x  Qwen3DecoderLayer  + input_layernorm           of the next layer, in inference  model.layers.*",
        "  1 x  Qwen3DecoderLayer  + norm                      of the next layer, in inference  model.layers.2",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fuse_residual": "layers"}, "fuse_residual must be one of False, 'layer', True, got 'layers'"),
        ({"fuse_residual": 1}, "fuse_residual must be one of"),
        ({"rounding": "twice"}, "rounding must be one of 'original', 'once', got 'twice'"),
        ({"compiled": True}, "compiled must be one of 'formula', 'native', got True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        patch(nn.Linear(2, 2), **options)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch("model")


def test_importing_gemma_norm_imports_no_integration():
    code = "import sys, gemma_norm; print(*(m for m in sys.modules if 'integrations' in m or m == 'transformers'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemma_norm.integrations" not in done.stdout and "transformers" not in done.stdout.split()
