"""The run. At each point, every provider is made, checked and timed. If one fails, its result has a note of why."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import check_gradients, gradients, results
from .cases import FORWARD, GATED_RMS_NORM, Inputs, Point
from .check import check
from .gradients import GradientInputs
from .providers import Provider
from .results import Result
from .suites import SUITES
from .timing import Effort, GraphTimed, Timed, Timing, WallTimed, cuda, interleave, sets_for


class DeviceLost(Exception):
    """The device no longer works, for example after an illegal access by a kernel, so nothing more can be measured."""


class Unsupported(Exception):
    """The provider does not have the operator."""


def run(points: Sequence[Point], providers: Sequence[Provider], effort: Effort, gemma: bool) -> Iterator[list[Result]]:
    """Yield the results of one point after another."""
    threads = torch.get_num_threads()
    try:
        for point in points:
            torch.set_num_threads(point.threads or threads)
            zero_centred = gemma and point.op != GATED_RMS_NORM
            fit = [p for p in providers if p.fits(point)]
            with torch.set_grad_enabled(point.work != FORWARD):
                outcomes = _measure(point, fit, effort, zero_centred)
            copy = outcomes.get("copy_")
            yield [
                results.make(
                    point,
                    p.name,
                    _weight(p, zero_centred),
                    outcomes[p.name],
                    copy if isinstance(copy, Timing) else None,
                )
                for p in fit
            ]
            if point.device == "cuda":
                _release(point)
    finally:
        torch.set_num_threads(threads)


def _weight(provider: Provider, gemma: bool) -> str:
    return "none" if provider.copies else "gemma" if gemma and provider.gemma else "plain"


def _measure(point: Point, providers: Sequence[Provider], effort: Effort, gemma: bool) -> dict[str, Timing | Exception]:
    try:
        make = Inputs if point.work == FORWARD else GradientInputs
        inputs = make(point, sets_for(point))
        if point.device == "cuda":
            cuda.synchronize()  # derivatives run on a stream of their own
    except Exception as error:
        return {p.name: error.with_traceback(None) for p in providers}
    timed: dict[str, Timed] = {}
    failed: dict[str, Timing | Exception] = {}
    for provider in providers:
        try:
            zero_centred = gemma and provider.gemma
            if isinstance(inputs, GradientInputs):
                timed[provider.name] = _prepare_gradient(provider, inputs, effort, zero_centred)
            else:
                timed[provider.name] = _prepare(provider, inputs, effort, zero_centred)
        except Exception as error:
            failed[provider.name] = error.with_traceback(None)  # a traceback would keep tensors alive
    return failed | interleave(timed)


def _prepare(provider: Provider, inputs: Inputs, effort: Effort, gemma: bool) -> Timed:
    point = inputs.point
    if point.op not in provider.ops:
        raise Unsupported(f"{provider.name} has no {point.op}")
    call = provider.make(point.op, inputs.weight, gemma)
    check(provider, call, inputs, gemma)
    return GraphTimed(call, inputs, effort) if _in_graphs(point) else WallTimed(call, inputs, effort)


def _prepare_gradient(provider: Provider, inputs: GradientInputs, effort: Effort, gemma: bool) -> Timed:
    """Autograd runs a node of the backward pass on the stream of its forward pass. A CUDA graph captures one stream, so
    all of this is done on that one.
    """
    point = inputs.point
    if point.op not in provider.ops:
        raise Unsupported(f"{provider.name} has no {point.name}")
    stream = _stream() if point.device == "cuda" else None
    with cuda.stream(stream) if stream else contextlib.nullcontext():
        call: gradients.Call
        if provider.gradient:
            call = gradients.call_of(provider.gradient(point.op, inputs.weight, gemma), inputs)
            check_gradients.check(provider, call, inputs, gemma)
        else:
            assert provider.traffic
            call = provider.traffic(inputs)
        if stream:
            cuda.synchronize()
        return GraphTimed(call, inputs, effort, stream) if _in_graphs(point) else WallTimed(call, inputs, effort)


def _in_graphs(point: Point) -> bool:
    return point.device == "cuda" and not SUITES[point.suite].host


@functools.cache
def _stream() -> Any:
    return cuda.Stream()


def _release(point: Point) -> None:
    try:
        cuda.synchronize()
        cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(f"after {point}: {results.describe(error)}") from error
