#!/usr/bin/env python3
"""A transformers model with this library's norms by one line: what was replaced, and the tokens before and after.

    python examples/patch_transformers.py [--model PATH_OR_ID] [--device cpu|cuda] [--dtype float32|bfloat16]

Without --model it is a tiny model with the layers of Qwen3.5 and random weights, which takes seconds on a CPU. Exit
status 1 if a norm was left, a call fell back to the original, or a token differs in float32. (In bfloat16 the norms
have the original's bits but for a few elements, and one is enough to change a token.)

    pip install transformers
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from gemma_norm.integrations.transformers import patch, unpatch


def tiny() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def generate(model: nn.Module, tokens: torch.Tensor, count: int) -> list[int]:
    with torch.no_grad():
        output = model.generate(tokens, do_sample=False, min_new_tokens=count, max_new_tokens=count)
    return output[0, tokens.shape[1] :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder or a hub id of a causal language model; default: a tiny Qwen3.5")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()

    if options.model:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = tiny()
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    prompt = torch.arange(3, 19, device=options.device)[None]

    before = generate(model, prompt, options.tokens)
    report = patch(model, fuse_residual=True)
    after = generate(model, prompt, options.tokens)
    print(f"{report}\n\noriginal   {before}\npatched    {after}")
    unpatch(model)
    again = generate(model, prompt, options.tokens)
    print(f"unpatched  {again}")
    same = after == before or options.dtype != "float32"
    return 0 if same and again == before and report.replaced and not report.left and not report.fallbacks else 1


if __name__ == "__main__":
    sys.exit(main())
