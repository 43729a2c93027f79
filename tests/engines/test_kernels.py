"""register_kernels with the real kernels library and transformers, on the CPU.

pip install kernels==0.17.2 transformers==5.22.0 && python -m pytest tests/engines/test_kernels.py
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("kernels", reason="needs kernels and a transformers that works with it: tests/engines/README.md")
transformers = pytest.importorskip("transformers")

import kernels  # noqa: E402
from kernels import Mode  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

from gemma_norm.integrations import kernels as integration  # noqa: E402

WORKS = import_utils.is_kernels_available()
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
MODELS = {
    "Llama": ({}, {"LlamaRMSNorm": 5}),
    "Qwen3": ({}, {"Qwen3RMSNorm": 9}),
    "Olmo2": ({}, {"Olmo2RMSNorm": 9}),
    "Qwen3_5Text": (MIXED, {"Qwen3_5RMSNorm": 7, "Qwen3_5RMSNormGated": 1}),
    "Gemma3Text": ({}, {}),  # its norms have no layer name
}


def tiny(name: str, options: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) / 10)
    return model


@pytest.mark.skipif(not WORKS, reason="this transformers works with another kernels: tests/engines/README.md")
@pytest.mark.parametrize("name", MODELS)
def test_kernelize(name, monkeypatch):
    options, norms = MODELS[name]
    served: Counter[str] = Counter()
    for function in ("rms_norm", "gated_rms_norm"):
        ours = getattr(integration, function)

        def counted(*args: object, ours=ours, **kwargs: object) -> torch.Tensor:
            served[inspect.currentframe().f_back.f_locals["module"].__class__.__name__] += 1
            return ours(*args, **kwargs)

        monkeypatch.setattr(integration, function, counted)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        integration.register_kernels()
        for dtype, same in ((torch.float32, 0.0), (torch.bfloat16, 1.0)):
            model = tiny(name, options).to(dtype)
            tokens = torch.randint(3, 128, (2, 12))
            with torch.no_grad():
                want = model(tokens).logits
                served.clear()
                ours = kernels.kernelize(copy.deepcopy(model), mode=Mode.INFERENCE, device="cpu")
                got = ours(tokens).logits
                assert served == norms
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
                assert float((got == want).float().mean()) >= same
                with kernels.use_kernel_mapping({}, inherit_mapping=False):  # the classes' own forwards again
                    kernels.kernelize(ours, mode=Mode.INFERENCE, device="cpu")
                assert torch.equal(ours(tokens).logits, want)


@pytest.mark.skipif(not WORKS, reason="this transformers works with another kernels: tests/engines/README.md")
def test_every_class_with_one_of_our_layer_names_computes_one_of_our_formulas():
    found: Counter[str] = Counter()
    for source in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if 'use_kernel_forward_from_hub("RMSNorm' not in source.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{source.parent.name}.{source.stem}")
        for kind in vars(module).values():
            name = getattr(kind, "kernel_layer_name", "")
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and name in integration.kernel_mapping():
                assert integration._semantics(kind(64), gated=name == "RMSNormGated"), kind.__name__
                found[name] += 1
    assert found["RMSNorm"] > 100 and found["RMSNormGated"] > 5 and found["RMSNormZeroCentered"] > 1


@pytest.mark.skipif(not WORKS, reason="this transformers works with another kernels: tests/engines/README.md")
def test_training_and_compile():
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        integration.register_kernels()
        model = tiny("Llama", {})
        twin = kernels.kernelize(copy.deepcopy(model), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
    tokens = torch.randint(3, 128, (2, 12))
    for m in (model, twin):
        m(tokens).logits.square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))
    compiled = torch.compile(twin, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.skipif(WORKS, reason="this transformers works with this kernels")
def test_a_pair_that_does_not_work_is_an_error():
    with pytest.raises(RuntimeError, match=r"kernels must be of a version that transformers .* works with"):
        integration.register_kernels()
