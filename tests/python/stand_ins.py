"""Stand-ins for packages that are not installed: modules with what a test puts into them."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest

THEIRS = "theirs"  # what a stand-in's own forward returns


def add_modules(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, object]) -> None:
    """``a__b={...}`` is the module a.b. The packages that modules lie in are made too."""
    contents: dict[str, dict[str, object]] = {}
    for path, content in ((name.replace("__", "."), content) for name, content in modules.items()):
        for end in (i for i, c in enumerate(path) if c == "."):
            contents.setdefault(path[:end], {})
        contents[path] = content
    for path, content in contents.items():
        module = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None)  # for importlib.util.find_spec
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)
