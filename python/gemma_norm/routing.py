"""Whose kernels serve ``forward_hip``: the native HIP library's, else aiter's, else vLLM's, else plain PyTorch.

Each GPU has its own choice, because the native library may have code for one GPU and not for another.

A module's ``provider`` can force "native", "aiter", "vllm" or "torch". If it is "auto", the environment variable
GEMMA_NORM_PROVIDER can. If the forced provider cannot be used, RuntimeError says why. The variable is read the first
time that a kind of call occurs, and not again once the native library serves the module.

"auto" takes the first provider that can be used without rounding the weight. A peer takes the weight in x's dtype, so
none is used for a float32 weight with 16-bit x, nor for a ``1 + weight`` that would have to be rounded to 16 bits.
aiter has a ``gemma_norm`` flag since its #3872, and for any hidden size since its #4059. vLLM has none, so it serves
``gemma=True`` only in float32. A forced peer is given the rounded weight, with a warning; ``1 + weight`` is computed in
every call, because a stored one would be wrong once the weight changes. How a peer rounds inside its kernels cannot be
controlled from here. Peers record no gradient, so the native operators are used while grad mode is on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _library, reference
from ._checks import DTYPES, check_arguments, check_memory
from ._checks_shared import dtype_name
from ._module_checks import check_choice
from ._overlap import overlap
from ._registry import OPERATORS

PROVIDERS = ("auto", "native", "aiter", "vllm", "torch")
_torch: Any = torch  # not all of it is typed

Output = Tensor | tuple[Tensor, Tensor]


class Norm(Protocol):
    """What routing needs of a :class:`gemma_norm.RMSNorm`."""

    provider: str
    hidden_size: int
    variance_epsilon: float
    round_each_step: bool

    @property
    def gemma(self) -> bool: ...
    @property
    def weight(self) -> Tensor | None: ...
    def forward_native(self, x: Tensor, residual: Tensor | None = None, post: Tensor | None = None, /) -> Output: ...
    def _forward_op(self, x: Tensor, residual: Tensor | None = None, post: Tensor | None = None, /) -> Output: ...
    def may_overwrite(self, x: Tensor, residual: Tensor, post: Tensor | None, /) -> bool: ...


@dataclass(frozen=True)
class Peer:
    """Another package's kernels. They take contiguous [rows, hidden] tensors and a weight of the same dtype."""

    rms_norm: Callable[[Tensor, Tensor, float, bool], Tensor]  # (x, weight, eps, gemma) -> y
    # (x, residual, weight, eps, gemma) -> (y, s), which are new tensors, or x and residual overwritten
    add: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    multiple: int = 1  # hidden must be a multiple of this
    gemma_up_to: int = 0  # the largest hidden for which it can add 1 to the weight; 0: never

    def objection(self, x: torch.dtype, weight: torch.dtype, hidden: int, gemma: bool, huge: bool) -> tuple[bool, str]:
        """Whether the peer cannot be used at all for such a call, and why.

        If it can be used, the text says why "auto" should not use it; it is empty if nothing speaks against it.
        """
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


PLAIN_PYTORCH = Peer(reference.rms_norm, reference.add_rms_norm, gemma_up_to=2**63)  # takes weights of any dtype
_found = {"torch": PLAIN_PYTORCH}
# The values of a module's ``provider`` for which every call is known to go to the native HIP library: on all GPUs of
# this machine, or on the GPU of an index. If the library has code for all GPUs, RMSNorm.forward_hip needs only the
# first, which is quicker to look at.
native_on_all_gpus: set[str] = set()
native_on_gpu: set[tuple[str, int]] = set()


def forward_hip(module: Norm, x: Tensor, residual: Tensor | None, post: Tensor | None) -> Output:
    """:meth:`RMSNorm.forward_hip`, by the provider that serves such a call."""
    gpu = x.get_device()
    if not torch.compiler.is_compiling() and (module.provider, gpu) in native_on_gpu:
        return module._forward_op(x, residual, post)
    weight, eps, gemma, recording = module.weight, module.variance_epsilon, module.gemma, torch.is_grad_enabled()
    hidden = module.hidden_size
    # No peer computes these as the native kernels do.
    native_only = (
        weight is None
        or module.round_each_step
        or (x.dtype == torch.float32 and weight.dtype != x.dtype)
        or (residual is not None and residual.dtype != x.dtype)
    )
    weight_dtype = x.dtype if weight is None else weight.dtype
    huge = False
    if x.numel() >= 2**31:  # a branch: while compiling the size may be symbolic, and `huge` must be a constant
        huge = True
    # Such a call is served like one whose gradient is recorded: by the native operators or, on a GPU that they have no
    # code for, by plain PyTorch.
    name = choose(module.provider, recording or native_only, x.dtype, weight_dtype, hidden, gemma, huge, gpu)
    if not name or x.numel() == 0 or (residual is None and post is not None):
        return module._forward_op(x, residual, post)
    if recording or native_only or weight is None:
        return module.forward_native(x, residual, post)
    peer = _found[name]
    arguments = {"x": x, "residual": residual, "weight": weight, "eps": eps, "post_residual_addition": post}
    arguments |= {"gemma": gemma, "round_each_step": False}
    check_arguments(OPERATORS["rms_norm" if residual is None else "fused_add_rms_norm"], arguments)
    flag = gemma and hidden <= peer.gemma_up_to
    w = weight if peer is PLAIN_PYTORCH else (1 + weight if gemma and not flag else weight).to(x.dtype)
    x_rows = x.reshape(-1, hidden).contiguous()
    if residual is None:
        return peer.rms_norm(x_rows, w, eps, flag).view(x.shape)
    total = residual if post is None else residual + post
    r_rows = total.reshape(-1, hidden).contiguous()
    if not (module.may_overwrite(x, residual, post) and _can_be_overwritten(x, residual, weight)):
        # Copies, because a peer may overwrite the rows that it is given.
        y, s = peer.add(x_rows.clone(), r_rows.clone() if post is None else r_rows, w, eps, flag)
        return y.view(x.shape), s.view(x.shape)
    y, s = peer.add(x_rows, r_rows, w, eps, flag)
    if y is not x_rows or not x.is_contiguous():
        x.copy_(y.view(x.shape))
    if s is not r_rows or total is not residual or not residual.is_contiguous():
        residual.copy_(s.view(x.shape))
    return x, residual


def _can_be_overwritten(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether x and residual overlap neither each other nor the weight, and no two elements of either share memory."""
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
    gpu: int = 0,  # the index of x's GPU
) -> str:
    """The name of the provider that serves such a call; "" for torch.ops.gemma_norm.

    The choice and its reasons are logged once.
    """
    wanted = os.environ.get("GEMMA_NORM_PROVIDER") or "auto" if provider == "auto" else provider
    check_choice("gemma_norm", "provider", wanted, PROVIDERS)
    auto, hip, unserved = wanted == "auto", _library.libraries()["hip"], _library.unserved_gpus()
    missing = hip.reason or unserved.get(gpu, "")
    if wanted == "torch":
        _log_once(logging.INFO, "plain PyTorch: asked for")
        return "torch"
    if not missing and wanted in ("auto", "native"):
        _log_once(logging.INFO, "our HIP library: it is loaded")
        native_on_gpu.add((provider, gpu))
        if not unserved:
            native_on_all_gpus.add(provider)
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
            _log_once(logging.WARNING if why else logging.INFO, f"{name}: {because}")
            _found[name] = peer
            return name
        reasons.append(f"{name}: {why}")
    text = "ours, for peers record no gradient" if recording else f"plain PyTorch, which is slow: {'; '.join(reasons)}"
    _log_once(logging.INFO if recording else logging.WARNING, text)
    # If no HIP library is loaded, the operators run in plain PyTorch. One without code for this GPU would fail.
    return "torch" if missing and hip.loaded else ""


def choose(*call: Any) -> str:
    """:func:`_choose`. torch.compile calls it once, while compiling, and takes the answer for a constant."""
    return _choose(*call)


# This is all that torch.compiler.assume_constant_result(choose) does. Calling it would import the compiler into every
# program, even one that compiles nothing: torch._dynamo and sympy are 800 modules, and take as long as torch itself.
setattr(choose, "_dynamo_marked_constant", True)  # noqa: B010


@functools.cache
def _log_once(level: int, message: str) -> None:
    logging.getLogger("gemma_norm").log(level, "gemma_norm: forward_hip uses %s", message)


def _parameters(package: Any, name: str) -> set[str]:
    """The names of a function's parameters.

    aiter's torch_compile_guard hides a function's signature, but registers an operator with its name and parameters.
    """
    parameters = inspect.signature(getattr(package, name, lambda: None)).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) and hasattr(_torch.ops.aiter, name):
        return {argument.name for argument in getattr(_torch.ops.aiter, name).default._schema.arguments}
    return set(parameters)


@functools.cache
def _aiter() -> Peer | str:
    try:
        aiter: Any = importlib.import_module("aiter")
    except Exception as error:  # the caller logs the text
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
        """Whether aiter's fastest kernel serves x.

        It needs rows whose length is a multiple of 8, and writes beyond the end of others (its #5044, #5290).
        """
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
        # aiter versions with the flag also have a kernel whose outputs may be its inputs, add_rmsnorm_quant_kernel: a
        # thread reads its elements of x and residual before it writes them, no other thread reads them, and no pointer
        # is __restrict__. Older kernels, and those for longer rows, read some rows twice.
        in_place = flag and fast(x)
        y, s = (x, residual) if in_place else (torch.empty_like(x), torch.empty_like(x))
        aiter.rmsnorm2d_fwd_with_add(y, x, residual, s, weight, eps, **({"gemma_norm": True} if gemma else {}))
        return y, s

    if not opus:
        # For hidden sizes above 8192, the version of #3872 calls kernels without the flag, and ignores it.
        return Peer(rms_norm, add, (torch.float16, torch.bfloat16), multiple=8, gemma_up_to=8192 if flag else 0)

    # Since #4059 aiter has a second set of kernels, "opus", for what the first does not serve. Its functions take the
    # tensors' addresses, which do not exist while compiling, and they are no operators. Two operators made here wrap
    # them, so that compiled code can call them.
    def rms_norm_opus(out: Tensor, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> None:
        aiter.rms_norm_opus(out, x, weight, eps, gemma_norm=gemma)

    def fused_add_rms_norm_opus(x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool) -> None:
        aiter.fused_add_rms_norm_opus(x, residual, weight, eps, gemma_norm=gemma)

    opus_rms_norm = _or_operator(rms_norm_opus, "out")
    opus_add_rms_norm = _or_operator(fused_add_rms_norm_opus, "x", "residual")
    return Peer(rms_norm, add, gemma_up_to=2**63)


def _or_operator(function: Callable[..., None], *written: str) -> Callable[..., None]:
    """``function``, which writes the arguments ``written``. While compiling, it is called through an operator."""
    op = _torch.library.custom_op(f"gemma_norm_aiter::{function.__name__}", function, mutates_args=written)
    return lambda *args: (op if torch.compiler.is_compiling() else function)(*args)


@functools.cache
def _vllm() -> Peer | str:
    try:
        importlib.import_module("vllm._custom_ops")
        plain, fused = _torch.ops._C.rms_norm.default, _torch.ops._C.fused_add_rms_norm.default
    except Exception as error:  # the caller logs the text
        return f"{type(error).__name__}: {error}"
    schemas = [[a.name for a in op._schema.arguments if not a.has_default_value()] for op in (plain, fused)]
    (_, *plain_names), (out, *names) = schemas
    in_place = [out, *names] == ["input", "residual", "weight", "epsilon"]
    # The schema of AMD's fork of vLLM.
    into_outputs = sorted(names) == ["epsilon", "input", "residual", "residual_out", "weight"]
    if plain_names != ["input", "weight", "epsilon"] or not (in_place or into_outputs):
        return f"unknown schemas: {plain._schema}, {fused._schema}"

    def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        y = torch.empty_like(x)
        plain(y, x, weight, eps)
        return y

    def add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
        if in_place:
            fused(x, residual, weight, eps)
            return x, residual
        y, s = torch.empty_like(x), torch.empty_like(x)
        fused(**{out: y}, input=x, residual_out=s, residual=residual, weight=weight, epsilon=eps)
        return y, s

    return Peer(rms_norm, add)


PEERS = {"aiter": _aiter, "vllm": _vllm}
