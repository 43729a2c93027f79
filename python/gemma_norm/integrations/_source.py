"""The source of a class's ``forward``, from which a changed one is compiled.

The source must compile to the very code that the class runs, else there is none: a file may have been edited since it
was imported, and a decorator may have replaced the function.
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
from dataclasses import dataclass
from typing import Any

_FUTURE = __future__.annotations.compiler_flag  # changes what is compiled


@dataclass(frozen=True)
class Source:
    tree: ast.Module
    function: types.FunctionType
    """What a decorator may have wrapped."""

    @property
    def body(self) -> ast.FunctionDef:
        return _definition(self.tree)


_sources: dict[tuple[type, Any], Source | str] = {}


def source(base: type) -> Source | str:
    """That of a class's forward, or why there is none."""
    key = (base, base.forward)  # type: ignore[attr-defined]  # a class may be given another forward
    if key not in _sources:
        _sources[key] = _source(base)
    return _sources[key]


def _source(base: type) -> Source | str:
    owner = next(c for c in base.__mro__ if "forward" in c.__dict__)
    outer = owner.__dict__["forward"]
    function = inspect.unwrap(outer)
    if not isinstance(function, types.FunctionType):
        return "its forward is not a Python function"
    if _rewrap(outer, function, function) is None:
        return "its forward is wrapped by a decorator of a form that is not known"
    if function.__code__.co_freevars:
        return "its forward refers to variables of a scope around it"
    try:
        # The class around it has the names that begin with two underscores mean what they mean in the file.
        tree = ast.parse(f"class {owner.__name__}:\n{inspect.getsource(function)}")
        imports = _imports(function.__code__.co_filename)
    except (OSError, TypeError, SyntaxError):
        return "its forward's source is not available"
    if not isinstance(tree.body[0].body[0], ast.FunctionDef):  # type: ignore[attr-defined]
        return "its forward is a lambda"
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 2)
    tree.body = [*imports, *tree.body]
    compiled = _compile(tree, function)
    if compiled is None or not _same(compiled, function.__code__):
        return "its forward's source is not what the class runs"
    return Source(tree, function)


def changed(base: type, change: Callable[[ast.FunctionDef], None]) -> Callable[..., Any]:
    """The forward after ``change`` has edited a copy of its syntax tree."""
    known = source(base)
    assert isinstance(known, Source)
    old, tree = known.function, copy.deepcopy(known.tree)
    change(_definition(tree))
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
    nodes = blocks(ast.parse("".join(linecache.getlines(path))))
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


def own_name(function: ast.FunctionDef) -> str:
    return (function.args.posonlyargs + function.args.args)[0].arg


def blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Every list of statements of a function, but not of functions inside it."""
    found = []
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            found.append(value)
            inner = (statement for statement in value if not isinstance(statement, ast.FunctionDef | ast.ClassDef))
            found += [block for statement in inner for block in blocks(statement)]
    return found


def name_of(node: ast.AST | None) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def target(statement: ast.stmt) -> str | None:
    return name_of(statement.targets[0]) if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None


def placed(source: str, like: ast.stmt) -> ast.stmt:
    statement = ast.parse(source).body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, like)
    return statement
