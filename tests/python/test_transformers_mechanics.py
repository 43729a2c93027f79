"""A patched module is still the module that it was, to everything that PyTorch and its neighbours do with modules."""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn

from gemma_norm.integrations.transformers import patch, unpatch
from tiny_models import TOKENS, is_ours, logits, model

FUSE = pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """float32 logits or gradients that differ in the last places alone."""
    return float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@FUSE
def test_copies_and_pickles(fuse):
    ours = model()
    report = patch(ours, fuse_residual=fuse)
    want = logits(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert (
            torch.equal(logits(other), want) and is_ours(other.model.norm) and other.model.norm is not ours.model.norm
        )
        unpatch(other)
        assert type(other.model.norm) is type(model().model.norm) and type(other.model.layers[0]) is type(
            model().model.layers[0]
        )
        assert torch.equal(logits(other), logits(model()))
    assert is_ours(ours.model.norm) and not report.fallbacks


def test_a_copy_counts_in_the_report_that_there_is():
    ours = model()
    report = patch(ours)
    copy.deepcopy(ours).model.norm(torch.randn(2, 64).bfloat16())
    assert report.fallbacks.total() == 1


def test_a_copy_of_a_fused_model_refers_to_its_own_norms():
    ours = model()
    patch(ours, fuse_residual=True)
    other = copy.deepcopy(ours)
    following = other.model.layers[0].__dict__["_gemma_norm"].next
    assert following is other.model.layers[1].input_layernorm


def test_state_dicts_load_and_tied_weights_stay_tied():
    ours, other = model(tie_word_embeddings=True), model(tie_word_embeddings=True)
    nn.init.normal_(other.model.norm.weight)
    patch(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.load_state_dict(other.state_dict())
    assert close(logits(ours), logits(other))


@FUSE
def test_hooks(fuse):
    ours, other = model(), model()
    norm = ours.model.layers[1].post_attention_layernorm
    seen = []
    norm.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    other.model.layers[1].post_attention_layernorm.register_forward_hook(lambda m, args, y: y * 2)
    patch(ours, fuse_residual=fuse)
    logits(ours)
    assert seen == [torch.Size([2, 9, 64])] * 2
    norm.register_forward_hook(lambda m, args, y: y * 2)  # after patch too
    assert close(logits(ours), logits(other))


@FUSE
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Qwen3_5Text"])
def test_gradients(family, fuse):
    ours, other = model(family), model(family)
    report = patch(ours, fuse_residual=fuse)
    for m in (ours, other):
        m(TOKENS, labels=TOKENS).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert float((a.grad - b.grad).abs().max()) <= 1e-5 * max(float(b.grad.abs().max()), 1e-2), name
    assert not report.fallbacks


@FUSE
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(fuse, reentrant):
    gradients = []
    for change in (lambda m: None, lambda m: patch(m, fuse_residual=fuse)):
        m = model().train()
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        change(m)
        m(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    for want, got in zip(*gradients, strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * max(float(want.abs().max()), 1e-2)


def test_meta_weights():
    import transformers as tf

    source = model()
    with torch.device("meta"):
        empty = tf.LlamaForCausalLM(source.config).eval()
    report = patch(empty, fuse_residual=True)
    assert len(report.replaced) == 7 and all(p.device.type == "meta" for p in empty.parameters())
    empty.load_state_dict(source.state_dict(), assign=True)
    empty.model.rotary_emb = source.model.rotary_emb
    assert close(logits(empty), logits(source)) and not report.fallbacks


def test_an_adapter_that_wraps_the_norm():
    """As PEFT's modules_to_save: the norm and a trained copy of it inside of another module."""

    class Wrapper(nn.Module):
        def __init__(self, original: nn.Module) -> None:
            super().__init__()
            self.original, self.trained = original, copy.deepcopy(original)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.trained(x)

    ours, want = model(), logits(model())
    report = patch(ours, fuse_residual=True)
    for layer in ours.model.layers:
        layer.post_attention_layernorm = Wrapper(layer.post_attention_layernorm)
        layer.input_layernorm = Wrapper(layer.input_layernorm)
    for _ in range(5):
        assert close(logits(ours), want)
    ours(TOKENS, labels=TOKENS).loss.backward()
    assert ours.model.layers[0].post_attention_layernorm.trained.weight.grad is not None
    reasons = {reason for _, reason in report.additions}
    assert "the norm after the layer is not given its sum" in reasons  # no more work is done in vain


@pytest.mark.parametrize("when", ["before", "after"])
@FUSE
def test_accelerates_hooks(fuse, when):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'gemma-norm[example]'")
    from accelerate.hooks import remove_hook_from_submodules

    ours, want = model(), logits(model())
    if when == "after":
        patch(ours, fuse_residual=fuse)
    ours = accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    if when == "before":
        assert len(patch(ours, fuse_residual=fuse).replaced) == 7
    calls = []
    base = type(ours.model.norm).__mro__[1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(base, "forward", lambda *_: calls.append(1))
        got = logits(ours)
    assert close(got, want) and not calls
    remove_hook_from_submodules(ours)
    assert torch.equal(logits(ours), got)
    unpatch(ours)
    assert torch.equal(logits(ours), want)


def test_a_forward_of_the_instance_is_left():
    """As kernelize and Liger set it. accelerate's, after its hooks are gone, is the class's own and is exchanged."""
    ours = model()
    ours.model.norm.forward = types.MethodType(lambda self, x: x, ours.model.norm)
    own = ours.model.layers[0].input_layernorm
    own.forward = own.forward
    report = patch(ours)
    assert [(row.name, row.reason) for row in report.left] == [
        ("model.norm", "has a forward of its own, set by kernelize, Liger or the like")
    ]
    assert own.forward.__func__ is type(own).forward and len(report.replaced) == 6


def test_parametrized_norms():
    from torch.nn.utils import parametrize

    class Same(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 1

    ours = model()
    parametrize.register_parametrization(ours.model.norm, "weight", Same())
    report = patch(ours)
    assert [row.reason for row in report.left] == ["its weight is parametrized"]
    first = ours.model.layers[0].input_layernorm
    parametrize.register_parametrization(first, "weight", Same())
    assert close(logits(ours), logits(model())) and not report.fallbacks
    with pytest.raises(RuntimeError, match="of a class derived from a patched one"):
        unpatch(ours)
    assert is_ours(ours.model.layers[1].input_layernorm)
    parametrize.remove_parametrizations(first, "weight")
    unpatch(ours)
    assert not any(is_ours(m) for m in ours.modules())


@FUSE
def test_fully_shard(fuse, tmp_path):
    """FSDP2 has sharded weights outside of a module's own call: an addition across layers stays apart then."""
    from torch import distributed as dist

    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed, with no process group yet")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))  # by default a GPU's, where there is one

        def shard(m: nn.Module) -> None:
            for part in (*m.model.layers, m):
                fully_shard(part, mesh=mesh)

        for patch_first in (True, False):
            ours = model()
            steps = [lambda m: patch(m, fuse_residual=fuse), shard]
            for step in steps if patch_first else reversed(steps):
                step(ours)
            assert close(logits(ours), logits(model())) and is_ours(ours.model.norm)
            ours(TOKENS, labels=TOKENS).loss.backward()
            assert ours.model.norm.weight.grad is not None
    finally:
        dist.destroy_process_group()


def test_keyword_arguments_have_the_originals_names():
    ours = model()
    x = torch.randn(2, 64)
    want = ours.model.norm(hidden_states=x)
    patch(ours)
    assert close(ours.model.norm(hidden_states=x), want)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        ours.model.norm(x=x)


def test_nested_tensors_run_the_original():
    norm = model().model.norm
    x = torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(3, 64)], layout=torch.jagged)
    with torch.no_grad():
        want, report = norm(x), patch(norm)
        assert torch.equal(norm(x).values(), want.values()) and report.fallbacks.total() == 1
