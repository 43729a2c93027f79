"""What replaced norms run: the operator, or the original forward where the operator would not do the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from .._ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm
from .._ops.rms_norm import ADD_RMS_NORM, RMS_NORM, RMS_NORM_OUT, rms_norm
from .._registry import bare
from ._swap import STATE, SWAP, Swap, derive, named_like, state

is_compiling = torch.compiler.is_compiling
is_tracing = torch._C._is_tracing
in_functorch = torch._C._are_functorch_transforms_active


def subclass(swap: Swap) -> type[nn.Module]:
    return _subclass(swap, swap.base.forward)


@functools.cache
def _subclass(swap: Swap, original: Any) -> type[nn.Module]:
    """One for each forward that the base has had: a class may be given another one."""
    base = swap.base
    forward = _gated_forward(swap) if swap.semantics.gated else _plain_forward(swap)
    forward = named_like(_taking(forward, swap.eps_name) if swap.takes else forward, base.forward)
    members = {SWAP: swap, "extra_repr": _extra_repr(base)}
    if not swap.semantics.gated:
        members["_gemma_norm_join"] = staticmethod(_join(swap))
    return derive(base, "norm", swap, forward, **members)


def _plain_forward(swap: Swap) -> Callable[..., Any]:
    """In a decoding step this costs as much as the kernel, so what is called here is bound to names of its own, and a
    call without derivatives goes to the operator, past :func:`gemma_norm.rms_norm`, which sees to all others.
    """
    base, eps, gemma, each_step = swap.base, swap.eps_name, swap.semantics.gemma, swap.each_step
    in_compiled_code = _compiled_plain(swap)
    original = base.forward
    is_grad_enabled, plain = torch.is_grad_enabled, Tensor
    operator = bare(RMS_NORM.twin)
    # The original's result has x's order of strides, which decides what the model does next, such as which kernel its
    # attention takes. The operator's own results are row-major. So where x is not and no gradient is recorded, it
    # writes into a tensor like x.
    write = bare(RMS_NORM_OUT.overload)
    empty_like = torch.empty_like

    def forward(self: Any, x: Tensor) -> Any:
        if is_compiling():
            return in_compiled_code(self, x)
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight
            if weight is None:  # taken away after patch
                return original(self, x)
        if x.dtype is weight.dtype and not in_functorch() and not is_tracing():
            reason, rounds = None, each_step
        else:
            reason, rounds = unusual(swap, x, weight), False
        if reason is None:
            try:
                if is_grad_enabled() or type(x) is not plain or forward_ad._current_level >= 0:
                    return rms_norm(x, weight, getattr(self, eps), gemma, rounds)
                if not x.is_contiguous():
                    return write(x, weight, getattr(self, eps), gemma, rounds, out=empty_like(x))
                return operator(x, weight, getattr(self, eps), gemma, rounds)
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x)

    def weightless(self: Any, x: Tensor) -> Any:
        if is_compiling():
            return in_compiled_code(self, x)
        size = self.__dict__.get("normalized_shape")  # of torch.nn.RMSNorm, which then takes no other
        if in_functorch() or is_tracing():
            reason = _TRANSFORMED
        elif size is not None and x.shape[-1:] != size:
            reason = f"x has a last dimension other than {size}"
        else:
            try:
                if is_grad_enabled() or type(x) is not plain or forward_ad._current_level >= 0:
                    return rms_norm(x, None, getattr(self, eps))
                if not x.is_contiguous():
                    return write(x, None, getattr(self, eps), False, False, out=empty_like(x))
                return operator(x, None, getattr(self, eps), False, False)
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x)

    return forward if swap.semantics.weighted else weightless


def _gated_forward(swap: Swap) -> Callable[..., Any]:
    semantics, eps, original = swap.semantics, swap.eps_name, swap.base.forward
    sigmoid, before, size = semantics.sigmoid, semantics.norm_before_gate, semantics.group_size
    is_grad_enabled, plain, each = torch.is_grad_enabled, Tensor, swap.each_step
    operator = bare(GATED_RMS_NORM.twin)

    def norm(self: Any, x: Tensor, gate: Tensor | None, weight: Tensor, each_step: bool) -> Tensor:
        if gate is not None and x.dtype is torch.float32 and semantics.wide_gate:
            gate = gate.float()  # exact, and what the original does; no copy where it is float32 already
        return gated_rms_norm(
            x,
            gate,
            weight,
            getattr(self, eps),
            sigmoid=sigmoid,
            norm_before_gate=before,
            group_size=size,
            round_each_step=each_step,
        )

    def suits(x: Tensor, gate: Tensor | None) -> bool:
        if gate is None:
            return semantics.without_gate
        widened = semantics.wide_gate and x.dtype == torch.float32
        return x.shape == gate.shape and (x.dtype == gate.dtype or widened)

    def in_compiled_code(self: Any, x: Tensor, gate: Tensor | None) -> Any:
        weight = self.weight
        if not swap.native or not usable_in_compiled_code(swap, x, weight, gate) or not suits(x, gate):
            return original(self, x, gate)
        return norm(self, x, gate, weight, swap.each_step and x.dtype == weight.dtype)

    def forward(self: Any, x: Tensor, gate: Tensor | None = None) -> Any:
        if is_compiling():
            return in_compiled_code(self, x, gate)
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight
        each_step = each
        reason = None if gate is not None or semantics.without_gate else "no gate"
        if gate is not None and x.shape != gate.shape:
            reason = "the gate has another shape than x"
        if reason is None and (x.dtype is not weight.dtype or in_functorch() or is_tracing()):
            reason, each_step = unusual(swap, x, weight), False
        if reason is None:
            try:
                if is_grad_enabled() or type(x) is not plain or type(gate) is not plain:
                    return norm(self, x, gate, weight, each_step)
                if gate.dtype is not x.dtype or forward_ad._current_level >= 0:
                    return norm(self, x, gate, weight, each_step)
                return operator(x, gate, weight, getattr(self, eps), sigmoid, before, size, each_step)
            except RuntimeError as error:
                reason = refusal(error)
        state(self).count(reason)
        return original(self, x, gate)

    return forward


def _join(swap: Swap) -> Callable[..., Any]:
    """A residual addition and this norm in one operator, for an ordinary call without derivatives; else None."""
    eps, gemma, each_step, weighted = swap.eps_name, swap.semantics.gemma, swap.each_step, swap.semantics.weighted
    is_grad_enabled, plain = torch.is_grad_enabled, Tensor
    operator = bare(ADD_RMS_NORM.twin)

    def join(self: Any, a: Any, b: Any) -> Any:
        if is_compiling() or is_grad_enabled() or type(a) is not plain or type(b) is not plain:
            return None
        weight = self._parameters.get("weight")
        if weight is None or not weighted or not a.dtype is b.dtype is weight.dtype or not a.is_contiguous():
            return None
        if in_functorch() or is_tracing() or forward_ad._current_level >= 0:
            return None
        try:
            return operator(a, b, weight, getattr(self, eps), gemma, None, each_step)
        except RuntimeError as error:
            refusal(error)  # it is made again with all checks, which gives the reason
            return None

    return join


_TRANSFORMED = "inside a torch.func transform or a trace"


def unusual(swap: Swap, x: Tensor, weight: Tensor) -> str | None:
    """Why a call whose dtypes differ, or which is transformed or traced, runs the original; None where it does not."""
    if in_functorch() or is_tracing():
        return _TRANSFORMED
    if (x.dtype, weight.dtype) in swap.semantics.mixed:
        return None
    dtypes = [str(t.dtype).removeprefix("torch.") for t in (x, weight)]
    return f"x is {dtypes[0]} and the weight {dtypes[1]}, for which the original computes what no operator here does"


def refusal(error: RuntimeError) -> str:
    """The reason for the report, without numbers that differ from call to call. Out of memory is no refusal."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if " out of memory" in str(error):  # of the operator, which can only raise a RuntimeError
        raise torch.OutOfMemoryError(str(error)) from None
    return str(error).partition("\n")[0][:160]


def usable_in_compiled_code(swap: Swap, *tensors: Tensor | None) -> bool:
    """What the operator would refuse, asked before: there is no way back from inside a graph."""
    x, weight = tensors[0], tensors[1]
    assert x is not None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or _in_onnx_export():
        return False
    if weight is not None and x.dtype != weight.dtype and (x.dtype, weight.dtype) not in swap.semantics.mixed:
        return False
    if weight is not None and x.shape[-1:] != weight.shape:
        return False
    return x.dim() > 0 and all(t is None or t.stride(-1) == 1 for t in tensors)


def _compiled_plain(swap: Swap) -> Callable[..., Any]:
    gemma, weighted, eps, original = swap.semantics.gemma, swap.semantics.weighted, swap.eps_name, swap.base.forward

    def native(self: Any, x: Tensor) -> Any:
        weight = self.weight if weighted else None
        if not usable_in_compiled_code(swap, x, weight):
            return original(self, x)
        each_step = swap.each_step and weight is not None and x.dtype == weight.dtype
        return rms_norm(x, weight, getattr(self, eps), gemma, each_step)

    return native if swap.native else original


def _in_onnx_export() -> bool:
    from torch.onnx import is_in_onnx_export

    return is_in_onnx_export()


def _taking(forward: Callable[..., Any], eps: str) -> Callable[..., Any]:
    """The forward of a norm that may have been offered its result."""

    def take(self: Any, x: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            own = self.__dict__.get(STATE)
            offer = None if own is None else own.offer
            if offer is not None:
                own.offer = None
                s, version, seen, y = offer
                same = s is x and s._version == version and not torch.is_grad_enabled()
                if same and seen == seen_of(self, eps):
                    own.wasted = 0
                    return y
                own.wasted += 1
        return forward(self, x)

    return take


def seen_of(norm: nn.Module, eps: str) -> tuple[Any, ...] | None:
    """What a norm's result depends on beside its input, as far as PyTorch tells of changes; None where it does not.

    An inference tensor does not count the writes to it. A tensor that stands for others, as inside a transform of
    torch.func, and a fake one, which warns when it is asked, have no address.
    """
    weight, own = weight_of(norm), getattr(norm, eps)
    if weight is None:
        return (own,)
    if isinstance(weight, FakeTensor):
        return None
    try:
        return own, id(weight), weight._version, weight.data_ptr(), weight.dtype
    except RuntimeError:
        return None


def weight_of(norm: nn.Module) -> Tensor | None:
    weight = norm._parameters.get("weight")
    return weight if weight is not None else getattr(norm, "weight", None)


def _extra_repr(base: type[nn.Module]) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        text = base.extra_repr(self)
        return f"{text}, gemma_norm" if text else "gemma_norm"

    return extra_repr
