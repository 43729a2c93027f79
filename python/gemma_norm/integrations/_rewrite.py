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
what the methods do for tensors that do not suit is what was there. Everything else stays as it was compiled. The source
must compile to the very code that the class runs, else nothing is rewritten: a file may have been edited since it was
imported, and a decorator may have replaced the function.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_FUTURE = __future__.annotations.compiler_flag  # changes what is compiled


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
    tree: ast.Module | None = None
    function: types.FunctionType | None = None


_forms: dict[tuple[type, Any], Form] = {}


def form(base: type) -> Form:
    key = (base, base.forward)  # type: ignore[attr-defined]  # a class may be given another forward
    if key not in _forms:
        _forms[key] = _form(base)
    return _forms[key]


def _form(base: type) -> Form:
    owner = next(c for c in base.__mro__ if "forward" in c.__dict__)
    outer = owner.__dict__["forward"]
    function = inspect.unwrap(outer)
    if not isinstance(function, types.FunctionType):
        return Form(reason="its forward is not a Python function")
    if _rewrap(outer, function, function) is None:
        return Form(reason="its forward is wrapped by a decorator of a form that is not known")
    if function.__code__.co_freevars:
        return Form(reason="its forward refers to variables of a scope around it")
    try:
        # The class around it has the names that begin with two underscores mean what they mean in the file.
        tree = ast.parse(f"class {owner.__name__}:\n{inspect.getsource(function)}")
        imports = _imports(function.__code__.co_filename)
    except (OSError, TypeError, SyntaxError):
        return Form(reason="its forward's source is not available")
    if not isinstance(tree.body[0].body[0], ast.FunctionDef):  # type: ignore[attr-defined]
        return Form(reason="its forward is a lambda")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 2)
    tree.body = [*imports, *tree.body]
    compiled = _compile(tree, function)
    if compiled is None or not _same(compiled, function.__code__):
        return Form(reason="its forward's source is not what the class runs")
    found = Form(tree=tree, function=function)
    body = _definition(tree)
    for statements in _blocks(body):
        for i in range(len(statements)):
            if norm := _triple(statements[i : i + 3], _self(body)):
                found.norms.append(norm)
            elif _ends(statements[i : i + 2]):
                found.ends_with_sum, norm = True, ""
            post = None if norm is None else _post(statements[max(i - 1, 0) : i + 1], _self(body))
            if norm is not None and post is not None:
                found.posts[norm] = post
    found.first = _first(body)
    return found


def rewritten(base: type, norms: frozenset[str], across: bool, posts: frozenset[str]) -> Callable[..., Any]:
    """The forward with the additions before these norms joined to them, and with ``across`` the last one as well.

    ``posts``: the norms before an addition that go with it.
    """
    known = form(base)
    old: Any = known.function
    assert known.tree is not None
    tree = copy.deepcopy(known.tree)
    body = _definition(tree)
    own = _self(body)
    for statements in _blocks(body):
        i = 0
        while i < len(statements):
            first = statements[i]
            post = _post(statements[i : i + 2], own)
            if post in posts and (norm := _triple(statements[i + 1 : i + 4], own)) in norms:
                assert isinstance(statements[i + 2], ast.Assign)
                h, r = _target(first), _target(statements[i + 2])
                arguments = f"{_other(statements[i + 1])}, {own}.{post}, {own}.{norm}, {_is_first(statements[i + 1])}"
                statements[i : i + 4] = [_placed(f"{h}, {r} = {own}._gemma_norm_add_normed({h}, {arguments})", first)]
            elif post in posts and across and _ends(statements[i + 1 : i + 3]):
                h = _target(first)
                arguments = f"{_other(statements[i + 1])}, {own}.{post}, {_is_first(statements[i + 1])}"
                statements[i : i + 2] = [_placed(f"{h} = {own}._gemma_norm_add_normed_last({h}, {arguments})", first)]
            elif (norm := _triple(statements[i : i + 3], own)) in norms:
                assert isinstance(statements[i + 1], ast.Assign)
                h, r = _target(first), _target(statements[i + 1])
                call = f"{h}, {r} = {own}._gemma_norm_add({_operands(first)}, {own}.{norm})"
                statements[i : i + 3] = [_placed(call, first)]
            elif across and _ends(statements[i : i + 2]):
                call = f"{_target(first)} = {own}._gemma_norm_add_last({_operands(first)})"
                statements[i] = _placed(call, first)
            i += 1
    code = _compile(tree, old)
    assert code is not None
    new = types.FunctionType(code, old.__globals__, old.__name__, old.__defaults__)
    new.__kwdefaults__, new.__annotations__, new.__doc__ = old.__kwdefaults__, old.__annotations__, old.__doc__
    new.__module__, new.__qualname__ = old.__module__, old.__qualname__
    new.__dict__.update(old.__dict__)
    result = _rewrap(base.forward, old, new)  # type: ignore[attr-defined]
    assert result is not None
    return result


@functools.cache
def _imports(path: str) -> list[ast.stmt]:
    """What a file imports. Python compiles a call of an imported module's function otherwise than that of a method."""
    nodes = _blocks(ast.parse("".join(linecache.getlines(path))))
    found = [s for block in nodes for s in block if isinstance(s, ast.Import | ast.ImportFrom)]
    return [s for s in found if getattr(s, "module", "") != "__future__"]


def _rewrap(outer: Any, old: types.FunctionType, new: types.FunctionType) -> Callable[..., Any] | None:
    """``outer``, a decorator's wrapper around ``old``, around ``new``. None where it does not hold it in a closure."""
    if outer is old:
        return new
    inner = getattr(outer, "__wrapped__", None)
    if not isinstance(outer, types.FunctionType) or inner is None:
        return None
    within = _rewrap(inner, old, new)
    cells = [cell.cell_contents is inner for cell in outer.__closure__ or ()]
    if within is None or sum(cells) != 1:
        return None
    closure = tuple(
        types.CellType(within) if is_it else cell for is_it, cell in zip(cells, outer.__closure__ or (), strict=True)
    )
    made = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, closure)
    made.__kwdefaults__ = outer.__kwdefaults__
    return functools.update_wrapper(made, within)


def _compile(tree: ast.Module, function: types.FunctionType) -> types.CodeType | None:
    code = function.__code__
    module = compile(tree, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    owner = next(const for const in module.co_consts if isinstance(const, types.CodeType))
    found = [const for const in owner.co_consts if isinstance(const, types.CodeType) and const.co_name == code.co_name]
    return found[0] if len(found) == 1 else None


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    names = ("co_code", "co_names", "co_varnames", "co_consts", "co_freevars", "co_argcount", "co_kwonlyargcount")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _definition(tree: ast.Module) -> ast.FunctionDef:
    owner = tree.body[-1]
    assert isinstance(owner, ast.ClassDef) and isinstance(owner.body[0], ast.FunctionDef)
    return owner.body[0]


def _self(function: ast.FunctionDef) -> str:
    return (function.args.posonlyargs + function.args.args)[0].arg


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements of a function, but not of functions inside it."""
    found = []
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            found.append(value)
            inner = (statement for statement in value if not isinstance(statement, ast.FunctionDef | ast.ClassDef))
            found += [block for statement in inner for block in _blocks(statement)]
    return found


def _name(node: ast.AST | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _target(statement: ast.stmt) -> str | None:
    return _name(statement.targets[0]) if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None


def _is_sum(statement: ast.stmt) -> bool:
    """``h = a + b``."""
    value = getattr(statement, "value", None)
    return _target(statement) is not None and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)


def _operands(statement: ast.stmt) -> str:
    """Those of the sum, as they are written."""
    assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp)
    return f"({ast.unparse(statement.value.left)}), ({ast.unparse(statement.value.right)})"


def _norm_call(statement: ast.stmt, h: str | None, self_name: str) -> str | None:
    """The attribute in ``h = self.attribute(h)``."""
    call = getattr(statement, "value", None)
    if not h or _target(statement) != h or not isinstance(call, ast.Call) or call.keywords:
        return None
    is_method = isinstance(call.func, ast.Attribute) and _name(call.func.value) == self_name
    takes_h = is_method and [_name(arg) for arg in call.args] == [h]
    return call.func.attr if takes_h else None  # type: ignore[attr-defined]


def _triple(statements: list[ast.stmt], own: str) -> str | None:
    """The norm's attribute, where these are the three statements."""
    if len(statements) < 3 or not _is_sum(statements[0]):
        return None
    h, r = _target(statements[0]), _target(statements[1])
    if r in (None, h, own) or _name(getattr(statements[1], "value", None)) != h:
        return None
    return _norm_call(statements[2], h, own)


def _post(statements: list[ast.stmt], own: str) -> str | None:
    """The attribute in ``h = self.attribute(h)``, where the next statement is ``h = x + h`` or ``h = h + x``."""
    if len(statements) < 2 or not _is_sum(statements[1]) or _other(statements[1]) in (None, own):
        return None
    return _norm_call(statements[0], _target(statements[1]), own)


def _other(statement: ast.stmt) -> str | None:
    """x in ``h = x + h`` or ``h = h + x``, if it is another name."""
    value = getattr(statement, "value", None)
    assert isinstance(value, ast.BinOp)
    names, h = [_name(value.left), _name(value.right)], _target(statement)
    others = [name for name in names if name != h]
    return others[0] if h in names and len(others) == 1 else None


def _is_first(statement: ast.stmt) -> bool:
    """Whether h is the first term of the sum."""
    value = getattr(statement, "value", None)
    assert isinstance(value, ast.BinOp)
    return _name(value.left) == _target(statement)


def _ends(statements: list[ast.stmt]) -> bool:
    if len(statements) < 2 or not _is_sum(statements[0]) or not isinstance(statements[1], ast.Return):
        return False
    value = statements[1].value
    first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
    return _name(first) == _target(statements[0])


def _first(function: ast.FunctionDef) -> list[str]:
    """The attributes called with the first argument alone, up to the statement that gives it another value."""
    arguments = function.args.posonlyargs + function.args.args
    own, h, found = _self(function), arguments[1].arg if len(arguments) > 1 else None, []
    for statement in function.body:
        nodes = list(ast.walk(statement))
        calls = [n for n in nodes if isinstance(n, ast.Call) and [_name(a) for a in n.args] == [h] and not n.keywords]
        methods = (call.func for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)))
        found += [m.attr for m in methods if isinstance(m, ast.Attribute) and _name(m.value) == own]
        if any(_name(node) == h and isinstance(getattr(node, "ctx", None), ast.Store) for node in nodes):
            break
    return found


def _placed(source: str, like: ast.stmt) -> ast.stmt:
    statement = ast.parse(source).body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, like)
    return statement
