#!/usr/bin/env python3
"""Whose kernels serve the norms of the SGLang or vLLM that is installed here: before, while and after gemma_norm is in.

    python examples/serving.py sglang | vllm

It needs no model. To serve one, see serve_sglang.sh and serve_vllm.sh beside it. Exit status 1 if some norm is not ours
while gemma_norm is installed, or still is afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 128


def sglang_norms() -> tuple[AbstractContextManager[Any], list[Callable[[], nn.Module]]]:
    from sglang.srt.layers import layernorm

    kinds = (layernorm.RMSNorm, layernorm.GemmaRMSNorm, layernorm.Gemma3RMSNorm)
    return contextlib.nullcontext(), [lambda kind=kind: kind(SIZE) for kind in kinds]


def vllm_norms() -> tuple[AbstractContextManager[Any], list[Callable[[], nn.Module]]]:
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import layernorm

    # As with --enforce-eager: 0 is CompilationMode.NONE.
    config = set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0)))
    kinds = (layernorm.RMSNorm, layernorm.GemmaRMSNorm, layernorm.RMSNormGated)
    return config, [lambda kind=kind: kind(SIZE) for kind in kinds]


class Operators(TorchDispatchMode):
    """Notes whether an operator of gemma_norm ran."""

    ours = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ours = self.ours or function.namespace == "gemma_norm"
        return function(*args, **(kwargs or {}))


def served_by_us(norms: list[Callable[[], nn.Module]], device: str) -> Iterator[tuple[str, bool]]:
    """Engines decide when a norm is made, or when it first runs: each is made anew."""
    x = torch.randn(4, SIZE, device=device).bfloat16()
    for make in norms:
        norm = make().to(device, torch.bfloat16)
        with Operators() as operators:
            norm(x)
        yield type(norm).__name__, operators.ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=("sglang", "vllm"))
    engine = parser.parse_args().engine
    device = "cuda" if torch.cuda.is_available() else "cpu"
    integration = importlib.import_module(f"gemma_norm.integrations.{engine}")
    integration.uninstall()  # which GEMMA_NORM_SGLANG=1 or GEMMA_NORM_VLLM=1 may have installed
    context, norms = sglang_norms() if engine == "sglang" else vllm_norms()
    with context, torch.no_grad():
        before = dict(served_by_us(norms, device))
        integration.install()
        installed = dict(served_by_us(norms, device))
        integration.uninstall()
        after = dict(served_by_us(norms, device))
    print(f"{engine} on {device}{'before':>20}{'installed':>14}{'uninstalled':>14}")
    for name in installed:
        columns = ("gemma_norm" if served[name] else engine for served in (before, installed, after))
        print(f"{name:14}" + "".join(f"{column:>14}" for column in columns))
    return 0 if all(installed.values()) and not any((*before.values(), *after.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
