"""The norms of q and k and their rotation, found in the source of an attention's own ``forward`` and rewritten there.

Only statements of exactly these forms are known, q and k being names, a and b any expressions, f the name of a
function, and with assignments between them that mention neither q nor k:

    q = self.q_norm(a).transpose(1, 2)    becomes    q = (a).transpose(1, 2)
    k = self.k_norm(b).transpose(1, 2)    becomes    k = (b).transpose(1, 2)
    q, k = f(q, k, cos, sin)              becomes    q, k = self._gemma_norm_rotate(q, k, self.q_norm, self.k_norm, f,
                                                                                   cos, sin, True)

    q = self.q_norm(q)                    goes
    k = self.k_norm(k)                    goes
    q, k = f(q, k, cos, sin)              becomes    the same, with False

f is recognised by what it computes. Where the call does not suit, the method calls the norms and f.

Where each head's q is followed by a gate, as in Qwen3-Next and Qwen3.5, the same operator makes the gate contiguous.
The forms are these, c being names and numbers that keep their values, and g not mentioned in between:

    q, g = torch.chunk(a, 2, dim=-1)      stays
    g = g.reshape(c)                      goes
    q, k = f(q, k, cos, sin)              becomes    q, k, g = self._gemma_norm_rotate(..., g, (c,))
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from ._source import blocks, name_of, own_name, placed, target


@dataclass(frozen=True)
class Form:
    """Where the statements are among those of a block, and what they name."""

    places: tuple[int, int, int]
    """Of the two norms and of the rotation."""
    names: tuple[str, str]
    norms: tuple[str, str]
    function: str
    transposed: bool
    gate: tuple[int, str] | None = None
    """Where the gate is reshaped, and its name."""


def join(body: ast.FunctionDef) -> None:
    own = own_name(body)
    for statements, form in forms(body):
        results = arguments = ", ".join(form.names)
        norms, gone = [statements[place] for place in form.places[:2]], []
        cos, sin = (f"({ast.unparse(argument)})" for argument in _called(statements[form.places[2]]).args[2:])
        arguments += "".join(f", {own}.{norm}" for norm in form.norms)
        arguments += f", {form.function}, {cos}, {sin}, {form.transposed}"
        if form.gate is not None:
            at_gate, gate = form.gate
            gone.append(statements[at_gate])
            shape = "".join(f"{ast.unparse(size)}, " for size in _called(statements[at_gate]).args)
            results, arguments = f"{results}, {gate}", f"{arguments}, {gate}, ({shape})"
        joined = f"{results} = {own}._gemma_norm_rotate({arguments})"
        statements[form.places[2]] = placed(joined, statements[form.places[2]])
        if form.transposed:
            for norm in norms:
                transpose = _called(norm).func
                assert isinstance(transpose, ast.Attribute)
                assert isinstance(transpose.value, ast.Call)
                transpose.value = transpose.value.args[0]
        else:
            gone += norms
        statements[:] = [statement for statement in statements if statement not in gone]


def _called(statement: ast.stmt) -> ast.Call:
    """f(...) in ``q = f(...)``: each statement of a form is such an assignment."""
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    return statement.value


def forms(body: ast.FunctionDef) -> list[tuple[list[ast.stmt], Form]]:
    """The statements of a known form, with the block that they are in; at most one in a block."""
    found = [(statements, _form(statements, own_name(body))) for statements in blocks(body)]
    return [(statements, form) for statements, form in found if form is not None]


def _form(statements: list[ast.stmt], own: str) -> Form | None:
    for at_function, statement in enumerate(statements):
        rotated = _rotation_call(statement)
        if rotated is None:
            continue
        function, names = rotated
        norms: dict[str, tuple[int, str, bool]] = {}
        for place in range(at_function - 1, -1, -1):
            before = statements[place]
            name = target(before)
            if name in names and name not in norms:
                norm = _norm_of(before, own)
                if norm is None:
                    return None
                norms[name] = (place, *norm)
                if len(norms) == 2:
                    break
            elif not isinstance(before, ast.Assign) or any(name_of(node) in names for node in ast.walk(before)):
                return None
        if len(norms) < 2:
            return None
        (at_q, q_norm, transposed), (at_k, k_norm, other) = (norms[name] for name in names)
        between = statements[min(at_q, at_k) + 1 : max(at_q, at_k)]
        mixed = any(name_of(node) in names for s in between for node in ast.walk(s))
        if mixed or transposed != other or at_q > at_k:
            return None
        gate = _gate(statements[:at_function], names[0])
        return Form((at_q, at_k, at_function), names, (q_norm, k_norm), function, transposed, gate)
    return None


def _gate(statements: list[ast.stmt], q: str) -> tuple[int, str] | None:
    """Where g is reshaped, and its name, in the last ``q, g = torch.chunk(a, 2, dim=-1)`` and ``g = g.reshape(c)``."""
    for start in range(len(statements) - 1, -1, -1):
        gate = _beside(statements[start], q)
        if gate is not None:
            break
    else:
        return None
    after = list(enumerate(statements))[start + 1 :]
    of_gate = [(i, s) for i, s in after if any(name_of(node) == gate for node in ast.walk(s))]
    if len(of_gate) != 1 or not all(isinstance(s, ast.Assign) for _, s in after):
        return None
    place, reshaping = of_gate[0]
    call = getattr(reshaping, "value", None)
    if target(reshaping) != gate or not isinstance(call, ast.Call) or call.keywords or not call.args:
        return None
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "reshape" or name_of(call.func.value) != gate:
        return None
    used = {name_of(node) for argument in call.args for node in ast.walk(argument)}
    kinds = ast.Name | ast.Constant | ast.Starred | ast.UnaryOp | ast.unaryop | ast.expr_context
    given = {n.id for s in statements[place:] for n in ast.walk(s) if isinstance(n, ast.Name) and _is_stored(n)}
    if used & given or not all(isinstance(node, kinds) for argument in call.args for node in ast.walk(argument)):
        return None
    return place, gate


def _beside(statement: ast.stmt, q: str) -> str | None:
    """g in ``q, g = torch.chunk(a, 2, dim=-1)``."""
    pair = _pair_of(statement)
    if pair is None:
        return None
    (first, second), call = pair
    form = [ast.unparse(call.func), *map(ast.unparse, call.args[1:]), *map(ast.unparse, call.keywords)]
    return second if first == q and form == _CHUNK else None


_CHUNK = ["torch.chunk", "2", "dim=-1"]


def _is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _rotation_call(statement: ast.stmt) -> tuple[str, tuple[str, str]] | None:
    """f and the names q and k in ``q, k = f(q, k, cos, sin)``."""
    pair = _pair_of(statement)
    if pair is None:
        return None
    names, call = pair
    function = name_of(call.func)
    if function is None or call.keywords or len(call.args) != 4:
        return None
    if tuple(name_of(a) for a in call.args[:2]) != names:
        return None
    if any(isinstance(a, ast.Starred) or name_of(n) in names for a in call.args[2:] for n in ast.walk(a)):
        return None
    return function, names


def _pair_of(statement: ast.stmt) -> tuple[tuple[str, str], ast.Call] | None:
    """The two names a and b, and the call, in ``a, b = f(...)``."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    targets, call = statement.targets[0], statement.value
    if not isinstance(targets, ast.Tuple) or len(targets.elts) != 2 or not isinstance(call, ast.Call):
        return None
    first, second = (name_of(element) for element in targets.elts)
    if first is None or second is None or first == second:
        return None
    return (first, second), call


def _norm_of(statement: ast.stmt, own: str) -> tuple[str, bool] | None:
    """The attribute in ``q = self.attribute(q)``, or in ``q = self.attribute(a).transpose(1, 2)``, which is True."""
    value = getattr(statement, "value", None)
    transposed = False
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "transpose":
        if value.keywords or [getattr(a, "value", None) for a in value.args] != [1, 2]:
            return None
        value, transposed = value.func.value, True
    if not isinstance(value, ast.Call) or value.keywords or len(value.args) != 1:
        return None
    function = value.func
    if not isinstance(function, ast.Attribute) or name_of(function.value) != own:
        return None
    if isinstance(value.args[0], ast.Starred) or (not transposed and name_of(value.args[0]) != target(statement)):
        return None
    return function.attr, transposed
