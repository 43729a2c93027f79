"""Calls of any operator as plain data, which hypothesis draws, fuzz_check.py makes, and fuzz_found.jsonl keeps.

The tensors, their shapes and their dtypes follow from the operator's rules (gemma_norm._registry), so a new operator is
drawn as soon as it is registered. Most calls are right. The others have one flaw, or memory that overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from gemma_norm import _registry, reference
from gemma_norm._checks import WITH_ROWS, DTypes, Extent

FOUND = Path(__file__).with_name("fuzz_found.jsonl")  # a line for each call that has failed once
OPERATORS = _registry.OPERATORS
FLOATS = ("float32", "float16", "bfloat16")
FLAGS = {"sigmoid", "norm_before_gate", "interleaved", "round_first", "scale_ue8m0", "column_major_scale"}
QUANTIZED = tuple(str(dtype).removeprefix("torch.") for dtype in reference.QUANTIZED_LARGEST)
SCALES = ("float32", "float8_e8m0fnu", "float8_e4m3fn", "int32")
MODES = ("grad mode", "no_grad", "inference_mode", "autograd", "vmap", "vjp")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    op: str
    shape: tuple[int, ...]  # of x; of q, for an operator with heads
    dtypes: dict[str, str]  # of the tensors that are passed, in the order of the rules
    layouts: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)  # strides and offset; else row-major
    device: str = "cpu"
    k_heads: int = 1
    rotary: int = 2
    same_memory: tuple[str, str, int] | None = None  # the second begins so many elements after the first
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = "no_grad"
    public: bool = True  # call the function of the package, if there is one, not the operator
    flaw: tuple[str, str, Any] | None = None  # its kind, the argument, and what is wrong with it
    scale: float = 1.0
    special: tuple[str, float] | None = None  # one element of this tensor is NaN or infinite
    frozen: tuple[str, ...] = ()  # in the mode "autograd": require no gradient
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if k not in _DEFAULTS or v != _DEFAULTS[k]})

    @staticmethod
    def from_json(line: str) -> Call:
        made = Call(**json.loads(line))
        layouts = {name: (tuple(strides), offset) for name, (strides, offset) in made.layouts.items()}
        lists = {k: tuple(v) for k in ("shape", "frozen", "flaw", "same_memory", "special") if (v := getattr(made, k))}
        return Call(**{**vars(made), **lists, "layouts": layouts})

    @property
    def operator(self) -> _registry.Operator:
        return OPERATORS[self.op]

    def shape_of(self, name: str) -> tuple[int, ...]:
        leading, axes = self.shape[:-2], (3,) if self.options.get("mrope_section") else ()
        match self.operator.rules[name].extent:
            case Extent.HIDDEN:
                return self.shape[-1:]
            case Extent.HEADS:
                return (*leading, self.shape[-2] if name == "gate" else self.k_heads, self.shape[-1])
            case Extent.ANGLES:
                return (*leading, self.rotary)
            case Extent.TABLE:
                return (7, self.rotary)
            case Extent.POSITIONS:
                return (*axes, *leading)
            case Extent.ONE:
                return (1,) * len(self.layouts.get(name, ((), 0))[0])
        return self.shape


_DEFAULTS = {k: v for k, v in asdict(Call("", (), {})).items() if k not in ("op", "shape", "dtypes")}

HIDDEN = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 255, 256, 1000, 1024, 2048, 4095, 4096, 4097, 5120]),
    st.integers(1, 3000),
)
LEADING = st.lists(st.one_of(st.integers(1, 4), st.integers(0, 2)), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The leading dimensions in any order in memory, with gaps now and then or one dimension expanded; an offset."""
    strides, extent = [1] * len(shape), shape[-1] if shape else 1
    for d in draw(st.permutations(range(len(shape) - 1))):
        strides[d] = extent + draw(st.one_of(st.just(0), st.integers(0, 9)))
        extent += strides[d] * max(shape[d] - 1, 0)
    if len(shape) > 1 and draw(st.integers(0, 19)) == 0:
        strides[draw(st.integers(0, len(shape) - 2))] = 0
    return tuple(strides), draw(st.integers(0, 9))


def dtype_for(draw: st.DrawFn, rule: DTypes, dtypes: dict[str, str]) -> str:
    first, second = [*dtypes.values(), "float32", "float32"][:2]
    other = {DTypes.LIKE_RESIDUAL: "residual", DTypes.LIKE_COS: "cos"}
    if rule is DTypes.INTEGER:
        return draw(st.sampled_from(["int32", "int64"]))
    if rule is DTypes.FLOAT32:
        return "float32"
    if rule is DTypes.FLOAT or (rule in (DTypes.WEIGHT, DTypes.X_OR_NARROWER) and first == "float32"):
        return draw(st.sampled_from(FLOATS))
    if rule in (DTypes.WEIGHT, DTypes.X_OR_FLOAT32):
        return draw(st.sampled_from([first, "float32"]))
    if rule is DTypes.LIKE_WEIGHT:
        return second
    return dtypes.get(other[rule], first) if rule in other else first


def options_for(draw: st.DrawFn, op: _registry.Operator, call: Arguments) -> dict[str, Any]:
    """Every option by its name. What an operator has follows from its schema."""
    names = {a.name for a in op.overload._schema.arguments} - set(op.rules)
    dtypes, size, pairs = call["dtypes"], call["shape"][-1], call["rotary"] // 2
    first, *_ = dtypes.values()
    options: dict[str, Any] = {"eps": draw(st.sampled_from([1e-6, 1e-5, 1e-12, 1.0]))}
    for name in FLAGS & names:
        options[name] = draw(st.booleans())
    weights = [n for n in ("weight", "q_weight") if n in dtypes]
    if "gemma" in names:
        options["gemma"] = bool(weights) and draw(st.booleans())
    alike = all(dtypes[n] == first for n in weights) and not options.get("gemma")
    if "round_each_step" in names:
        options["round_each_step"] = alike and draw(st.booleans())
    if "round_rotation" in names:
        angles_alike = dtypes.get("cos", dtypes.get("cos_sin_cache")) == first
        options["round_each_step"] &= angles_alike
        options["round_rotation"] = angles_alike and (options["round_each_step"] or draw(st.booleans()))
    for name in {"group_size", "scale_group_size"} & names:
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    if "dtype" in names:
        options |= quantisation(draw, names, size, options)
    if "mrope_section" in names and "positions" in dtypes and draw(st.booleans()):
        t, h = sorted((draw(st.integers(0, pairs)), draw(st.integers(0, pairs))))
        options |= {"mrope_section": [t, h - t, pairs - h], "mrope_interleaved": draw(st.booleans())}
    return options


def quantisation(draw: st.DrawFn, names: set[str], size: int, given: dict[str, Any]) -> dict[str, Any]:
    """To what, and how the scales are stored. What does not go together is left to flaw_for."""
    norm, group = given.get("group_size") or size, given.get("scale_group_size")
    computed, options = "scale_group_size" in names, {}
    if computed and norm < size:
        group = options["scale_group_size"] = draw(st.sampled_from([n for n in range(1, norm + 1) if norm % n == 0]))
    is_packed = computed and group and group % 16 == 0
    options["dtype"] = draw(st.sampled_from([None, *(n for n in QUANTIZED if "x2" not in n or is_packed)]))
    if computed:
        fours = norm == size or norm // group % 4 == 0
        options["scale_dtype"] = draw(st.sampled_from([None, *SCALES[: len(SCALES) if fours else -1]]))
        options["scale_ue8m0"] = options["scale_dtype"] != "float8_e4m3fn" and draw(st.booleans())
    return options


def flaw_for(draw: st.DrawFn, op: _registry.Operator, call: Arguments) -> tuple[str, str, Any]:
    name = draw(st.sampled_from(sorted(call["dtypes"])))
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "dtype": st.sampled_from([*FLOATS, "float64", "int32", "int64", "bool", "complex64"]),
        "shape": st.sampled_from(["longer", "shorter", "more rows", "another dimension", "a dimension less", "empty"]),
        "stride": st.sampled_from([0, 2]),
        "none": st.none(),
        "meta": st.none(),
        "sparse": st.none(),
        "requires_grad": st.none(),
        "option": st.none(),
    }
    if "positions" in call["dtypes"] and 0 not in (call["options"].get("mrope_section") or ()):  # each is read
        kinds["position"] = st.sampled_from([-1, 7, 2**31 - 1])
    kind = draw(st.sampled_from(sorted(kinds)))
    if kind == "option":
        bad: dict[str, list[Any]] = {
            "eps": [-1e-6, math.nan, math.inf, 1e300],
            "group_size": [0, -1, call["shape"][-1] + 1, 2],
            "scale_group_size": [0, -1, call["shape"][-1] + 1, 2],
            "dtype": ["float16", "uint8", "float64", "float4_e2m1fn_x2"],
            "scale_dtype": ["float16", "int8", "int32", "float8_e4m3fn"],
            "scale_ue8m0": [True],
            "gemma": [True],
            "round_each_step": [True],
            "mrope_section": [[1], [-1, 1, 0], [0, 0, 99]],
            "mrope_interleaved": [True],
        }
        name = draw(st.sampled_from([n for n in bad if n in {a.name for a in op.overload._schema.arguments}]))
        return kind, name, draw(st.sampled_from(bad[name]))
    return kind, "positions" if kind == "position" else name, draw(kinds[kind])


@st.composite
def calls(draw: st.DrawFn, name: str | None = None, modes: Sequence[str] = MODES) -> Call:
    """Of one operator, or of any."""
    op = OPERATORS[name or draw(st.sampled_from(sorted(OPERATORS)))]
    heads = any(rule.extent is Extent.ROWS_OF_HEADS for rule in op.rules.values())
    hidden, leading = draw(HIDDEN), draw(LEADING)
    if heads:
        hidden, leading = max(2, min(hidden, 512)), (*leading[:3], draw(st.integers(1, 4)))
    made: Arguments = {"op": op.name, "shape": (*leading, hidden), "k_heads": draw(st.integers(1, 3)), "dtypes": {}}
    most = hidden // 2 * 2
    made["rotary"] = draw(st.sampled_from(sorted({most, 2 * draw(st.integers(0, most // 2))}))) if heads else 2
    cached = draw(st.booleans())
    absent = {"cos", "sin"} if cached else {"cos_sin_cache", "positions"}
    weights = draw(st.integers(0, 3)) > 0  # q's and k's both or none
    for name, rule in op.rules.items():
        angle = name in ("cos", "sin", "cos_sin_cache", "positions")
        passed = name not in absent if angle else weights if rule.extent is Extent.HIDDEN else draw(st.integers(0, 3))
        if not rule.optional or passed:
            made["dtypes"][name] = dtype_for(draw, rule.dtypes, made["dtypes"])
    made["options"] = options_for(draw, op, made)
    if made["options"].get("scale_dtype") != "float8_e4m3fn" and draw(st.integers(0, 9)):
        made["dtypes"].pop("global_scale", None)
    made["layouts"] = {}
    for name in made["dtypes"]:
        shape = Call(**made).shape_of(name)
        match op.rules[name].extent:
            case Extent.HIDDEN:
                made["layouts"][name] = (1,), draw(st.integers(0, 5))
            case Extent.ONE:
                made["layouts"][name] = draw(st.sampled_from([(), (1,), (3, 2)])), draw(st.integers(0, 5))
            case _:
                made["layouts"][name] = draw(layouts(shape))
    alike = [n for n in made["dtypes"] if op.rules[n].extent in WITH_ROWS]
    if len(alike) > 1 and draw(st.integers(0, 5)) == 0:
        first, second = draw(st.permutations(alike))[:2]
        shift = draw(st.sampled_from([0, 0, 0, 1, hidden, -hidden, 3 * hidden]))
        made["same_memory"] = (first, second, shift)
        if shift == 0 and draw(st.booleans()) and made["dtypes"][first] == made["dtypes"][second]:
            made["layouts"][second] = made["layouts"][first]
    made["mode"] = draw(st.sampled_from(modes))
    made["device"] = draw(st.sampled_from(DEVICES))
    made["public"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        made["flaw"] = flaw_for(draw, op, made)
    elif draw(st.integers(0, 9)) == 0:
        floats = [n for n, dtype in made["dtypes"].items() if dtype in FLOATS]
        name = draw(st.sampled_from(floats))
        ends = [0.0, -0.0, -1.0, 1e-45, 1e-38, 3e38] if name in ("scale", "scale_ub") else []
        made["special"] = name, draw(st.sampled_from([math.nan, math.inf, -math.inf, *ends]))
    made["scale"] = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    made["frozen"] = tuple(n for n in made["dtypes"] if draw(st.integers(0, 3)) == 0)
    made["seed"] = draw(st.integers(0, 2**31))
    return Call(**made)
