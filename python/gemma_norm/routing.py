"""Which kernels serve ``forward_hip``: our HIP library, else aiter's, else vLLM's, else plain PyTorch.

The choice is made for each GPU by itself, since our library may have code for one and not for another.

A module's ``provider``, or else the environment variable GEMMA_NORM_PROVIDER, forces "native", "aiter", "vllm" or
"torch"; RuntimeError says why it cannot be had. The variable is read when a kind of call first occurs, and no more once
ours serves. "auto" takes the first that need not round the weight: no peer for a float32 weight with 16-bit x, nor one
that would have to be given ``1 + weight`` in 16 bits. aiter has a ``gemma_norm`` flag since its #3872, for any hidden
size since its #4059; vLLM has none, hence serves ``gemma=True`` only in float32. Forced, that is done, with a warning,
and anew in every call, for a kept ``1 + weight`` goes stale. How peers round inside their kernels is beyond us. They
record no gradient: ours run while grad mode is on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _library, reference
from ._checks import DTYPES, check_arguments, check_memory, dtype_name, overlap
from ._registry import OPERATORS

if TYPE_CHECKING:
    from .module import Output, RMSNorm

PROVIDERS = ("auto", "native", "aiter", "vllm", "torch")
_torch: Any = torch  # not all of it is typed


@dataclass(frozen=True)
class Peer:
    """Another package's kernels, for contiguous [rows, hidden] and a weight of the same dtype."""

    rms_norm: Callable[[Tensor, Tensor, float, bool], Tensor]  # (x, weight, eps, gemma) -> y
    add: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]  # -> (y, s): new, or x and residual
    dtypes: tuple[torch.dtype, ...] = DTYPES
    multiple: int = 1  # of which hidden must be one
    gemma_up_to: int = 0  # the largest hidden for which it heeds gemma, 0 for none

    def objection(self, x: torch.dtype, weight: torch.dtype, hidden: int, gemma: bool, huge: bool) -> tuple[bool, str]:
        """Whether it cannot be used even if forced, and why, or why it should not; "" for neither."""
        if x not in self.dtypes:
            return True, f"no kernel for {dtype_name(x)}"
        if hidden % self.multiple:
            return True, f"writes beyond rows that are no multiple of {self.multiple} long"
        if huge:
            return True, "32-bit offsets, and x has 2^31 elements or more"
        if gemma and hidden > self.gemma_up_to:
            flag = "no gemma_norm flag" + (f" beyond hidden {self.gemma_up_to}" if self.gemma_up_to else "")
            return False, "" if x == torch.float32 else f"{flag}: 1 + weight would be rounded to {dtype_name(x)}"
        return False, "" if weight == x else f"the float32 weight would be rounded to {dtype_name(x)}"


PLAIN = Peer(reference.rms_norm, reference.add_rms_norm, gemma_up_to=2**63)  # takes weights of any dtype
_found = {"torch": PLAIN}
# The providers, as modules name them, for which our HIP library was chosen, whatever the call: on every GPU of this
# machine, and on the GPU of that index. The first is all that forward_hip looks at where no GPU is without code.
served_by_ours: set[str] = set()
served_on_gpu: set[tuple[str, int]] = set()


def forward(module: RMSNorm, x: Tensor, residual: Tensor | None, post: Tensor | None) -> Output:
    gpu = x.get_device()
    if not torch.compiler.is_compiling() and (module.provider, gpu) in served_on_gpu:
        return module._forward_op(x, residual, post)
    weight, eps, gemma, recording = module.weight, module.variance_epsilon, module.gemma, torch.is_grad_enabled()
    hidden = module.hidden_size
    # What no peer computes as we do.
    ours_alone = (
        weight is None
        or module.round_each_step
        or (x.dtype == torch.float32 and weight.dtype != x.dtype)
        or (residual is not None and residual.dtype != x.dtype)
    )
    weight_dtype = x.dtype if weight is None else weight.dtype
    huge = False
    if x.numel() >= 2**31:  # a branch, and no bool(): while compiling, a symbolic size must give a constant
        huge = True
    # As while gradients are recorded: by our operators or, on a GPU that they have no code for, by plain PyTorch.
    name = choose(module.provider, recording or ours_alone, x.dtype, weight_dtype, hidden, gemma, huge, gpu)
    if not name or x.numel() == 0 or (residual is None and post is not None):
        return module._forward_op(x, residual, post)
    if recording or ours_alone or weight is None:
        return module.forward_native(x, residual, post)
    peer = _found[name]
    arguments = {"x": x, "residual": residual, "weight": weight, "eps": eps, "post_residual_addition": post}
    arguments |= {"gemma": gemma, "round_each_step": False}
    check_arguments(OPERATORS["rms_norm" if residual is None else "fused_add_rms_norm"], arguments)
    flag = gemma and hidden <= peer.gemma_up_to
    w = weight if peer is PLAIN else (1 + weight if gemma and not flag else weight).to(x.dtype)
    x_rows = x.reshape(-1, hidden).contiguous()
    if residual is None:
        return peer.rms_norm(x_rows, w, eps, flag).view(x.shape)
    total = residual if post is None else residual + post
    r_rows = total.reshape(-1, hidden).contiguous()
    if not (module.may_overwrite(x, residual, post) and _can_be_overwritten(x, residual, weight)):
        # Peers may write into the rows that they are given.
        y, s = peer.add(x_rows.clone(), r_rows.clone() if post is None else r_rows, w, eps, flag)
        return y.view(x.shape), s.view(x.shape)
    y, s = peer.add(x_rows, r_rows, w, eps, flag)
    if y is not x_rows or not x.is_contiguous():
        x.copy_(y.view(x.shape))
    if s is not r_rows or total is not residual or not residual.is_contiguous():
        residual.copy_(s.view(x.shape))
    return x, residual


def _can_be_overwritten(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether x and residual lie in memory of their own."""
    if x.is_contiguous() and residual.is_contiguous() and not overlap(x, residual):
        return True
    try:
        arguments = {"x": x, "residual": residual, "weight": weight, "post_residual_addition": None}
        check_memory(OPERATORS["fused_add_rms_norm"], arguments)
    except RuntimeError:
        return False
    return True


@functools.cache
def _choose(
    provider: str,
    recording: bool,
    x: torch.dtype,
    weight: torch.dtype,
    hidden: int,
    gemma: bool,
    huge: bool,
    gpu: int = 0,  # the index of x's
) -> str:
    """Who serves such a call, "" being torch.ops.gemma_norm. Logged once, with the reasons."""
    wanted = checked(os.environ.get("GEMMA_NORM_PROVIDER") or "auto") if provider == "auto" else provider
    auto, hip, unserved = wanted == "auto", _library.libraries()["hip"], _library.unserved_gpus()
    missing = hip.reason or unserved.get(gpu, "")
    if wanted == "torch":
        _say(logging.INFO, "plain PyTorch: asked for")
        return "torch"
    if not missing and wanted in ("auto", "native"):
        _say(logging.INFO, "our HIP library: it is loaded")
        served_on_gpu.add((provider, gpu))
        if not unserved:
            served_by_ours.add(provider)
        return ""
    if wanted == "native":
        raise RuntimeError(f"gemma_norm: provider 'native' was asked for and cannot be had: {missing}")
    reasons = [f"native: {missing}"]
    for name in (wanted,) if not auto else () if recording else PEERS:
        peer = PEERS[name]()
        fatal, why = (True, peer) if isinstance(peer, str) else peer.objection(x, weight, hidden, gemma, huge)
        if fatal and not auto:
            raise RuntimeError(f"gemma_norm: provider '{name}' was asked for and cannot be had: {why}")
        if not (isinstance(peer, str) or recording or (auto and why)):
            because = "; ".join(reasons) if auto else "asked for" + (why and f", and breaks the contract: {why}")
            _say(logging.WARNING if why else logging.INFO, f"{name}: {because}")
            _found[name] = peer
            return name
        reasons.append(f"{name}: {why}")
    text = "ours, for peers record no gradient" if recording else f"plain PyTorch, which is slow: {'; '.join(reasons)}"
    _say(logging.INFO if recording else logging.WARNING, text)
    # Without a HIP library the operators are plain PyTorch themselves, but one without code for this GPU would fail.
    return "torch" if missing and hip.loaded else ""


def choose(*call: Any) -> str:
    """:func:`_choose`, which torch.compile calls once and whose answer it takes for a constant."""
    return _choose(*call)


# What torch.compiler.assume_constant_result(choose) does. To call that would import the compiler (torch._dynamo and
# sympy, 800 modules, as long as torch itself) into every program, also those that compile nothing.
setattr(choose, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _say(level: int, message: str) -> None:
    logging.getLogger("gemma_norm").log(level, "gemma_norm: forward_hip uses %s", message)


def checked(name: str) -> str:
    if name not in PROVIDERS:
        raise ValueError(f"gemma_norm: provider must be one of {', '.join(PROVIDERS)}, got {name!r}")
    return name


def _parameters(package: Any, name: str) -> set[str]:
    """aiter's torch_compile_guard hides a signature, and registers an operator of that name and those parameters."""
    parameters = inspect.signature(getattr(package, name, lambda: None)).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) and hasattr(_torch.ops.aiter, name):
        return {argument.name for argument in getattr(_torch.ops.aiter, name).default._schema.arguments}
    return set(parameters)


@functools.cache
def _aiter() -> Peer | str:
    try:
        aiter: Any = importlib.import_module("aiter")
    except Exception as error:  # logged
        return f"{type(error).__name__}: {error}"
    names = ("rmsnorm2d_fwd", "rmsnorm2d_fwd_with_add", "rmsnorm", "rms_norm_opus", "fused_add_rms_norm_opus")
    have = {name: _parameters(aiter, name) for name in names}
    need = {"input", "weight", "epsilon"}
    if not (need <= have["rmsnorm2d_fwd"] and need | {"residual_out"} <= have["rmsnorm2d_fwd_with_add"]):
        return f"unknown parameters: {have}"
    flag = "gemma_norm" in have["rmsnorm"] & have["rmsnorm2d_fwd_with_add"]
    need.add("gemma_norm")
    opus = flag and need | {"out"} <= have["rms_norm_opus"] and need | {"residual"} <= have["fused_add_rms_norm_opus"]

    def fast(x: Tensor) -> bool:
        """Is it for aiter's first kernel? It writes beyond rows that are no multiple of 8 long (its #5044, #5290)."""
        hidden = x.shape[-1]
        return x.dtype != torch.float32 and hidden <= 8192 and hidden % 8 == 0

    def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        if opus and not fast(x):
            y = torch.empty_like(x)
            opus_rms_norm(y, x, weight, eps, gemma)
        elif gemma:
            y = torch.empty_like(x)
            aiter.rmsnorm(y, x, weight, eps, gemma_norm=True)
        else:
            y = aiter.rmsnorm2d_fwd(x, weight, eps)
        return y

    def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
        if opus and not fast(x):
            opus_add_rms_norm(x, residual, weight, eps, gemma)
            return x, residual
        # With the flag came a kernel that may be given its inputs as outputs: a thread reads its elements of x and
        # residual before it writes them, no other thread reads those, and no pointer is __restrict__
        # (add_rmsnorm_quant_kernel). Other kernels, older or for longer rows, read some rows twice.
        in_place = flag and fast(x)
        y, s = (x, residual) if in_place else (torch.empty_like(x), torch.empty_like(x))
        aiter.rmsnorm2d_fwd_with_add(y, x, residual, s, weight, eps, **({"gemma_norm": True} if gemma else {}))
        return y, s

    if not opus:
        # Beyond 8192, #3872's version passes on to kernels without the flag, and drops it.
        return Peer(rms_norm, add, (torch.float16, torch.bfloat16), multiple=8, gemma_up_to=8192 if flag else 0)

    # Since #4059 a second set of kernels serves what the first does not. Its functions take addresses, which tensors
    # have none of while compiling, and are no operators: compiled code calls them through two of our own.
    def rms_norm_opus(out: Tensor, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> None:
        aiter.rms_norm_opus(out, x, weight, eps, gemma_norm=gemma)

    def fused_add_rms_norm_opus(x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool) -> None:
        aiter.fused_add_rms_norm_opus(x, residual, weight, eps, gemma_norm=gemma)

    opus_rms_norm = _or_operator(rms_norm_opus, "out")
    opus_add_rms_norm = _or_operator(fused_add_rms_norm_opus, "x", "residual")
    return Peer(rms_norm, add, gemma_up_to=2**63)


def _or_operator(function: Callable[..., None], *written: str) -> Callable[..., None]:
    """``function``, which writes those arguments; while compiling, an operator made of it."""
    op = _torch.library.custom_op(f"gemma_norm_aiter::{function.__name__}", function, mutates_args=written)
    return lambda *args: (op if torch.compiler.is_compiling() else function)(*args)


@functools.cache
def _vllm() -> Peer | str:
    try:
        importlib.import_module("vllm._custom_ops")
        plain, fused = _torch.ops._C.rms_norm.default, _torch.ops._C.fused_add_rms_norm.default
    except Exception as error:  # logged
        return f"{type(error).__name__}: {error}"
    schemas = [[a.name for a in op._schema.arguments if not a.has_default_value()] for op in (plain, fused)]
    (_, *plain_names), (out, *names) = schemas
    four = [out, *names] == ["input", "residual", "weight", "epsilon"]
    six = sorted(names) == ["epsilon", "input", "residual", "residual_out", "weight"]  # the AMD fork's
    if plain_names != ["input", "weight", "epsilon"] or not (four or six):
        return f"unknown schemas: {plain._schema}, {fused._schema}"

    def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        y = torch.empty_like(x)
        plain(y, x, weight, eps)
        return y

    def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
        if four:
            fused(x, residual, weight, eps)
            return x, residual
        y, s = torch.empty_like(x), torch.empty_like(x)
        fused(**{out: y}, input=x, residual_out=s, residual=residual, weight=weight, epsilon=eps)
        return y, s

    return Peer(rms_norm, add)


PEERS = {"aiter": _aiter, "vllm": _vllm}
