"""The residual additions in a layer's own ``forward``, found in its source and rewritten there.

Only statements of exactly these forms are known, h and r being names, and a and b any expressions:

    h = a + b; r = h; h = self.norm(h)    becomes    h, r = self._gemma_norm_add(a, b, self.norm)
    h = a + b; return h                   becomes    h = self._gemma_norm_add_last(a, b); return h

What is returned may be a tuple that begins with h. Where h = self.post(h) comes right before, and the sum is that of h
and another name, x (or of x and h), that statement goes as well, if post is a norm of ours:

    h = self.post(h); h = x + h; r = h; h = self.norm(h)
        becomes    h, r = self._gemma_norm_add_normed(h, x, self.post, self.norm, False)
    h = self.post(h); h = x + h; return h
        becomes    h = self._gemma_norm_add_normed_last(h, x, self.post, False); return h

The last argument says whether h is the sum's first term. Everything is evaluated once and in the order that it was, and
what the methods do for tensors that do not suit is what was there. Everything else stays as it was compiled.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ._source import Source, blocks, changed, name_of, own_name, placed, source, target


@dataclass
class Form:
    """What is known of one layer class."""

    norms: list[str] = field(default_factory=list)
    """The attributes of the norms that an addition joins inside the layer."""
    ends_with_sum: bool = False
    """Whether the layer returns a sum, which may join the next layer's norm."""
    posts: dict[str, str] = field(default_factory=dict)
    """For some of these norms, and for "" where the layer ends with a sum: the attribute that is called right before
    the addition, and whose result is a term of it."""
    first: list[str] = field(default_factory=list)
    """The attributes that are called with the layer's input, one of which may be a norm."""
    reason: str = ""
    """Why nothing is known."""


def form(base: type) -> Form:
    known = source(base)
    if not isinstance(known, Source):
        return Form(reason=known)
    found, body = Form(), known.body
    for statements in blocks(body):
        for i in range(len(statements)):
            if norm := _triple(statements[i : i + 3], own_name(body)):
                found.norms.append(norm)
            elif _ends(statements[i : i + 2]):
                found.ends_with_sum, norm = True, ""
            post = None if norm is None else _post(statements[max(i - 1, 0) : i + 1], own_name(body))
            if norm is not None and post is not None:
                found.posts[norm] = post
    found.first = _first(body)
    return found


def rewritten(base: type, norms: frozenset[str], across: bool, posts: frozenset[str]) -> Callable[..., Any]:
    """The forward with the additions before these norms joined to them, and with ``across`` the last one as well.

    ``posts``: the norms before an addition that go with it.
    """
    return changed(base, lambda body: _join(body, norms, across, posts))


def _join(body: ast.FunctionDef, norms: frozenset[str], across: bool, posts: frozenset[str]) -> None:
    own = own_name(body)
    for statements in blocks(body):
        i = 0
        while i < len(statements):
            first = statements[i]
            post = _post(statements[i : i + 2], own)
            if post in posts and (norm := _triple(statements[i + 1 : i + 4], own)) in norms:
                assert isinstance(statements[i + 2], ast.Assign)
                h, r = target(first), target(statements[i + 2])
                arguments = f"{_other(statements[i + 1])}, {own}.{post}, {own}.{norm}, {_is_first(statements[i + 1])}"
                statements[i : i + 4] = [placed(f"{h}, {r} = {own}._gemma_norm_add_normed({h}, {arguments})", first)]
            elif post in posts and across and _ends(statements[i + 1 : i + 3]):
                h = target(first)
                arguments = f"{_other(statements[i + 1])}, {own}.{post}, {_is_first(statements[i + 1])}"
                statements[i : i + 2] = [placed(f"{h} = {own}._gemma_norm_add_normed_last({h}, {arguments})", first)]
            elif (norm := _triple(statements[i : i + 3], own)) in norms:
                assert isinstance(statements[i + 1], ast.Assign)
                h, r = target(first), target(statements[i + 1])
                call = f"{h}, {r} = {own}._gemma_norm_add({_operands(first)}, {own}.{norm})"
                statements[i : i + 3] = [placed(call, first)]
            elif across and _ends(statements[i : i + 2]):
                call = f"{target(first)} = {own}._gemma_norm_add_last({_operands(first)})"
                statements[i] = placed(call, first)
            i += 1


def _is_sum(statement: ast.stmt) -> bool:
    """``h = a + b``."""
    value = getattr(statement, "value", None)
    return target(statement) is not None and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _operands(statement: ast.stmt) -> str:
    """Those of the sum, as they are written."""
    assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp)
    return f"({ast.unparse(statement.value.left)}), ({ast.unparse(statement.value.right)})"


def _norm_call(statement: ast.stmt, h: str | None, self_name: str) -> str | None:
    """The attribute in ``h = self.attribute(h)``."""
    call = getattr(statement, "value", None)
    if not h or target(statement) != h or not isinstance(call, ast.Call) or call.keywords:
        return None
    is_method = isinstance(call.func, ast.Attribute) and name_of(call.func.value) == self_name
    takes_h = is_method and [name_of(arg) for arg in call.args] == [h]
    return call.func.attr if takes_h else None  # type: ignore[attr-defined]


def _triple(statements: list[ast.stmt], own: str) -> str | None:
    """The norm's attribute, where these are the three statements."""
    if len(statements) < 3 or not _is_sum(statements[0]):
        return None
    h, r = target(statements[0]), target(statements[1])
    if r in (None, h, own) or name_of(getattr(statements[1], "value", None)) != h:
        return None
    return _norm_call(statements[2], h, own)


def _post(statements: list[ast.stmt], own: str) -> str | None:
    """The attribute in ``h = self.attribute(h)``, where the next statement is ``h = x + h`` or ``h = h + x``."""
    if len(statements) < 2 or not _is_sum(statements[1]) or _other(statements[1]) in (None, own):
        return None
    return _norm_call(statements[0], target(statements[1]), own)


def _other(statement: ast.stmt) -> str | None:
    """x in ``h = x + h`` or ``h = h + x``, if it is another name."""
    value = getattr(statement, "value", None)
    assert isinstance(value, ast.BinOp)
    names, h = [name_of(value.left), name_of(value.right)], target(statement)
    others = [name for name in names if name != h]
    return others[0] if h in names and len(others) == 1 else None


def _is_first(statement: ast.stmt) -> bool:
    """Whether h is the first term of the sum."""
    value = getattr(statement, "value", None)
    assert isinstance(value, ast.BinOp)
    return name_of(value.left) == target(statement)


def _ends(statements: list[ast.stmt]) -> bool:
    if len(statements) < 2 or not _is_sum(statements[0]) or not isinstance(statements[1], ast.Return):
        return False
    value = statements[1].value
    first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
    return name_of(first) == target(statements[0])


def _first(function: ast.FunctionDef) -> list[str]:
    """The attributes called with the first argument alone, up to the statement that gives it another value."""
    arguments = function.args.posonlyargs + function.args.args
    own, h, found = own_name(function), arguments[1].arg if len(arguments) > 1 else None, []
    for statement in function.body:
        nodes = list(ast.walk(statement))
        calls = [n for n in nodes if isinstance(n, ast.Call) and [name_of(a) for a in n.args] == [h] and not n.keywords]
        methods = (call.func for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)))
        found += [m.attr for m in methods if isinstance(m, ast.Attribute) and name_of(m.value) == own]
        if any(name_of(node) == h and isinstance(getattr(node, "ctx", None), ast.Store) for node in nodes):
            break
    return found
