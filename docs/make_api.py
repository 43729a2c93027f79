"""Writes docs/api.md from the docstrings of the public names: python docs/make_api.py, or make docs.

tests/python/test_docs.py fails where the file is not what this writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import gemma_norm
from gemma_norm import reference
from gemma_norm.parallel import NormSequenceParallel

PAGE = Path(__file__).with_name("api.md")
WIDTH = 116
HEAD = """# API

Made from the docstrings by `make docs`; change those. [usage.md](usage.md) introduces, [contract.md](contract.md) says
what is computed. `gemma_norm.__version__` is the version.
"""
FUNCTIONS = (
    "rms_norm",
    "add_rms_norm",
    "fused_add_rms_norm",
    "gated_rms_norm",
    "rms_norm_add_rms_norm",
    "fused_rms_norm_add_rms_norm",
    "qk_norm_rope",
    "fused_qk_norm_rope",
    "rms_norm_quant",
    "add_rms_norm_quant",
    "fused_add_rms_norm_quant",
    "gated_rms_norm_quant",
)
CLASSES = ("RMSNorm", "GemmaRMSNorm", "GatedRMSNorm")
DEFINITIONS = (
    "rms_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "rms_norm_add_rms_norm",
    "qk_norm_rope",
    "rms_norm_quant",
    "add_rms_norm_quant",
    "gated_rms_norm_quant",
    "quantize",
    "oracle",
    "ulp_error",
    "max_ulp_error",
)


def page() -> str:
    parts = [HEAD, "## Functions"]
    parts += [entry(f"gemma_norm.{name}", getattr(gemma_norm, name)) for name in FUNCTIONS]
    parts.append("## Modules")
    for name in CLASSES:
        cls = getattr(gemma_norm, name)
        parts.append(entry(f"gemma_norm.{name}", cls))
        own = [n for n, member in vars(cls).items() if n[0] != "_" and inspect.isfunction(member) and member.__doc__]
        parts += [entry(f"{name}.{n}", getattr(cls, n), "####") for n in own]
    parts += ["## Distributed", entry("gemma_norm.parallel.NormSequenceParallel", NormSequenceParallel)]
    parts.append("## The installation")
    parts += [entry("gemma_norm.libraries", gemma_norm.libraries), library()]
    parts += ["## The contract in plain PyTorch", markdown(reference.__doc__)]
    parts += [entry(f"gemma_norm.reference.{name}", getattr(reference, name)) for name in DEFINITIONS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def entry(name: str, thing: Any, heading: str = "###") -> str:
    return (
        f"{heading} {name}\n\n```python\n{signature(name.rpartition('.')[2], thing)}\n```\n\n{markdown(thing.__doc__)}"
    )


def signature(name: str, thing: Any) -> str:
    """On one line where it fits, else a line a parameter."""
    found = inspect.signature(thing)
    parameters, keywords_follow = [], True
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and keywords_follow:
            parameters.append("*")
            keywords_follow = False
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        parameters.append(f"{parameter.name}: {parameter.annotation}{default}")
    returned = "" if inspect.isclass(thing) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parameters)}){returned}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {p}," for p in parameters), f"){returned}"])


def library() -> str:
    """The fields of what libraries() returns, with the text that follows a field in its class."""
    cls = gemma_norm.Library
    source = inspect.getsource(cls)
    lines = []
    for field in dataclasses.fields(cls):
        said = re.search(rf'^    {field.name}: .*\n    """((?:.|\n)*?)"""', source, re.M)
        text = f"`{field.name}: {field.type}`" + (f": {markdown(said[1])}" if said else "")
        lines += textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="- ", subsequent_indent="  ")
    return f"### gemma_norm.Library\n\n{markdown(cls.__doc__)}\n\n" + "\n".join(lines)


def markdown(docstring: str | None) -> str:
    """Our docstrings are reStructuredText of a few forms: roles, double backticks, a colon before a block, sections."""
    text = inspect.cleandoc(docstring or "")
    text = re.sub(r":(?:func|meth|class|mod):`([^`]*)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"::$", ":", text, flags=re.M)
    out, section = [], ""
    for line in text.split("\n"):
        if match := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = match[1]
            out += [f"**{section}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            argument = re.match(r"    ([\w., ]+): ", line) if section != "Returns" else None
            out.append(f"- `{argument[1]}`: {line[argument.end() :]}" if argument else line.strip())
        elif section and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            section = section if not line else ""
            out.append(line)
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
