"""The real SGLang and vLLM, of their wheels' Python files alone: tests/engines/README.md says how to get them.

Neither is installed: both pin a CUDA build of PyTorch. Some packages that they import, and that no norm calls, are
empty stand-ins here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = os.environ.get("GEMMA_NORM_ENGINES")
STAND_INS = {"sglang": ("torchvision", "sentencepiece", "tvm_ffi"), "vllm": ("openai_harmony",)}


class _Empty(types.ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last: a package that is installed is the real one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def use(engine: str) -> None:
    """Make ``import sglang`` or ``import vllm`` import the unpacked wheel."""
    if not FOLDER or not (Path(FOLDER) / engine).is_dir():
        pytest.skip(
            f"needs {engine}'s unpacked wheel in the folder that GEMMA_NORM_ENGINES names: tests/engines/README.md",
            allow_module_level=True,
        )
    # Before there is an empty torchvision, for transformers uses one that it finds.
    import transformers.models.llama.modeling_llama  # noqa: F401

    sys.path.insert(0, FOLDER)
    sys.meta_path.append(_StandIns(STAND_INS[engine]))


def declare_plugin(folder: Path, group: str, target: str) -> None:
    """What installing the wheel does: importlib.metadata finds the entry point in ``folder``."""
    info = folder / "gemma_norm_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma_norm_plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\ngemma_norm = {target}\n")
