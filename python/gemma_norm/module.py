"""The modules RMSNorm and GemmaRMSNorm, which are called like the layers of SGLang and vLLM."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import reference, routing
from ._calls import functorch_is_active
from ._checks import UNWRITABLE
from ._module_checks import check_choice, check_device_and_dtype, check_flags, check_size_and_eps
from ._ops import rms_norm as ops
from ._registry import bare
from .routing import Output

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_fused_add_rms_norm = bare(torch.ops.gemma_norm.fused_add_rms_norm.default)
_is_grad_enabled = torch.is_grad_enabled
_is_tracing = torch._C._is_tracing
_is_inference_mode_enabled = torch.is_inference_mode_enabled
_on_rocm = torch.version.hip is not None


class RMSNorm(nn.Module):
    """``y = round(s * rstd * weight)`` over the last dimension.

    :func:`gemma_norm.rms_norm` states formula, dtypes and strides. :meth:`forward` states when x and residual are
    overwritten.

    Args:
        hidden_size: size of the last dimension of the inputs.
        eps: a number that is added to the mean of squares, finite in float32 and not negative. None is refused;
            ``torch.nn.RMSNorm`` takes the dtype's epsilon for it.
        device, dtype: of the weight. The dtype is float32, which serves 16-bit inputs too, float16 or bfloat16; None
            stands for PyTorch's default. Each call reads the weight anew.
        provider: whose kernels :meth:`forward_hip` uses on AMD GPUs, see :mod:`gemma_norm.routing`. "auto" chooses;
            "native", "aiter", "vllm" and "torch" force one. On other devices, all calls use the native kernels.
        inplace: whether :meth:`forward` may overwrite x and residual, under the conditions stated there.
        elementwise_affine, has_weight: two names for the same, from ``torch.nn.RMSNorm`` and from vLLM. If either is
            False, ``weight`` is None, and the norm is not multiplied by anything.
        round_each_step: ``y = round(round(s * rstd) * weight)``, see :func:`gemma_norm.rms_norm`.

    Raises:
        ValueError: for an argument that breaks a rule above.
    """

    gemma: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        provider: str = "auto",
        inplace: bool = True,
        elementwise_affine: bool = True,
        has_weight: bool = True,
        round_each_step: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_size_and_eps(name, hidden_size, eps)
        check_choice(name, "provider", provider, routing.PROVIDERS)
        check_flags(name, inplace=inplace, round_each_step=round_each_step)
        check_flags(name, elementwise_affine=elementwise_affine, has_weight=has_weight)
        if self.gemma:
            self._check_gemma(name, round_each_step, elementwise_affine=elementwise_affine, has_weight=has_weight)
        self.provider = provider
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        self.inplace = inplace
        self.round_each_step = round_each_step
        has_weight = has_weight and elementwise_affine
        # Not declared in the class, where TorchScript would read it and not understand it.
        self.weight: nn.Parameter | None = None
        if has_weight:
            check_device_and_dtype(name, device, dtype)
            self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    @staticmethod
    def _check_gemma(name: str, round_each_step: bool, **weight: bool) -> None:
        if round_each_step:
            raise ValueError(f"{name}: round_each_step must be False with a zero-centred weight, got True")
        for argument, value in weight.items():
            if not value:
                raise ValueError(f"{name}: {argument} must be True, got {value!r}; RMSNorm is the norm without scale")

    def reset_parameters(self) -> None:
        """Set the weight so that it changes nothing: to ones, or to zeros if it is zero-centred."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.gemma else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """Return ``y``, or with a residual ``(y, s)``, where ``s = round(x + residual)`` is the next residual.

        In inference, a call with a residual works in place, as in SGLang and vLLM: **the results are x and residual
        themselves, overwritten**. Whatever shares their memory is overwritten too, such as a hidden state that was
        kept. This happens if all of the following holds, so that no gradient that PyTorch knows of needs the old
        values:

        - the module's ``inplace`` is True, the default;
        - grad mode is off, and the module is in eval mode or the call in ``torch.inference_mode()``;
        - x, residual and post_residual_addition require no gradient, and the call is inside neither forward-mode
          differentiation nor a ``torch.func`` transform;
        - x and residual are of class ``Tensor`` itself, so they are no parameters, and they are not views of a
          parameter or of another subclass;
        - x and residual do not overlap, no two elements of either share memory, and neither is an inference tensor
          outside of inference mode;
        - nothing traces the call: under ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` the results are
          new tensors.

        Otherwise the results are new tensors, and x and residual are not changed.

        These conditions cannot recognise every tensor that is still needed. A buffer, a tensor from ``detach()`` or
        ``.data`` (often a parameter given to ``torch.func.functional_call``), the output of frozen layers, or an input
        of a reentrant checkpoint that requires no gradient looks like any other tensor. If such a tensor is used again,
        pass a clone of it, or make the module with ``inplace=False``.

        ``post_residual_addition`` is added to the residual before x is, and so needs a residual.
        """
        # torch.fx traces with proxies, which have neither a device nor a truth value; forward_cpu serves those too.
        if getattr(x, "is_cuda", False) is True:
            if _on_rocm:
                return self.forward_hip(x, residual, post_residual_addition)
            return self.forward_cuda(x, residual, post_residual_addition)
        return self.forward_cpu(x, residual, post_residual_addition)

    def forward_native(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """The same in plain PyTorch, on any device, never in place, and differentiable any number of times."""
        if residual is None:
            self._refuse_post_alone(post_residual_addition)
            return reference.rms_norm(x, self.weight, self.variance_epsilon, self.gemma, self.round_each_step)
        eps, gemma, each_step = self.variance_epsilon, self.gemma, self.round_each_step
        return reference.add_rms_norm(x, residual, self.weight, eps, gemma, post_residual_addition, each_step)

    def _forward_op(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        weight = self.weight
        if residual is None:
            self._refuse_post_alone(post_residual_addition)
            return ops.rms_norm(x, weight, self.variance_epsilon, self.gemma, self.round_each_step)
        eps, gemma, each_step = self.variance_epsilon, self.gemma, self.round_each_step
        if self.may_overwrite(x, residual, post_residual_addition):
            try:
                _fused_add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition, each_step)
                return x, residual
            except RuntimeError as error:  # nothing has been written
                if not any(reason in str(error) for reason in UNWRITABLE):
                    raise
        return ops.add_rms_norm(x, residual, weight, eps, gemma, post_residual_addition, each_step)

    def may_overwrite(self, x: Tensor, residual: Tensor, post_residual_addition: Tensor | None) -> bool:
        """Whether the conditions in :meth:`forward` hold, except those of memory, which the operator checks."""
        return (
            not _is_grad_enabled()
            and self.inplace
            and not _is_dynamo_compiling()
            and not _is_tracing()
            and (not self.training or _is_inference_mode_enabled())
            and type(x) is type(residual) is Tensor
            and not (x.requires_grad or residual.requires_grad)
            and (x._base is None or type(x._base) is Tensor)
            and (residual._base is None or type(residual._base) is Tensor)
            and (post_residual_addition is None or not post_residual_addition.requires_grad)
            and forward_ad._current_level < 0
            and not functorch_is_active()
        )

    # A method for each kind of device, as in SGLang and vLLM, so that subclasses can replace one. The operators
    # dispatch on the device themselves, so one method serves both. forward_cpu also serves all other devices.
    forward_cuda = forward_cpu = _forward_op

    def forward_hip(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Output:
        """The native HIP kernels, or another package's if there are none, see :mod:`gemma_norm.routing`."""
        # Not while compiling: torch.compile would take the set's present contents for a constant.
        if self.provider in routing.native_on_all_gpus and not _is_compiling():
            return self._forward_op(x, residual, post_residual_addition)
        return routing.forward_hip(self, x, residual, post_residual_addition)

    def _refuse_post_alone(self, post_residual_addition: Tensor | None) -> None:
        if post_residual_addition is not None:
            raise RuntimeError(f"{type(self).__name__}: post_residual_addition needs a residual, got residual=None")

    def extra_repr(self) -> str:
        modes = ", weight=None" if self.weight is None else ""
        modes += ", round_each_step=True" if self.round_each_step else ""
        return f"{self.hidden_size}, eps={self.variance_epsilon}, gemma={self.gemma}{modes}"

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles instead of this module: ``y = norm(x)``, since it takes one signature only.

        A subclass with a forward of its own is compiled as it is.
        """
        return _Scriptable(self) if type(self).forward is RMSNorm.forward else self


class _Scriptable(nn.Module):
    """``y = norm(x)`` for TorchScript. The operator records the derivative if one is wanted."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, float(norm.variance_epsilon)
        self.gemma, self.round_each_step = norm.gemma, bool(norm.round_each_step)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.gemma_norm.rms_norm(
            x, self.weight, self.variance_epsilon, self.gemma, self.round_each_step
        )
        return y


class GemmaRMSNorm(RMSNorm):
    """RMSNorm with a zero-centred weight, ``y = round(s * rstd * (1 + weight))``: Gemma, Qwen3-Next, Qwen3.5.

    The kernel computes ``1 + weight`` in float32, and nothing stores it. A weight that is loaded or synchronised later
    therefore takes effect at once, even in a CUDA graph that was captured before.
    """

    gemma = True
