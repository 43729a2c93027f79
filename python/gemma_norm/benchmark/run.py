"""The run. At each point, every provider is made, checked and timed. If one fails, its result has a note of why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from . import results
from .cases import GATED_RMS_NORM, Inputs, Point
from .check import check
from .providers import Provider
from .results import Result
from .timing import Effort, GraphTimed, Timed, Timing, WallTimed, interleave, sets_for


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
            fit = [p for p in providers if not p.suites or point.suite in p.suites]
            with torch.no_grad():
                outcomes = _measure(point, fit, effort, zero_centred)
            copy = next((outcomes[p.name] for p in fit if p.copies), None)
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
        inputs = Inputs(point, sets_for(point))
    except Exception as error:
        return {p.name: error.with_traceback(None) for p in providers}
    timed: dict[str, Timed] = {}
    failed: dict[str, Timing | Exception] = {}
    for provider in providers:
        try:
            timed[provider.name] = _prepare(provider, inputs, effort, gemma and provider.gemma)
        except Exception as error:
            failed[provider.name] = error.with_traceback(None)  # a traceback would keep tensors alive
    return failed | interleave(timed)


def _prepare(provider: Provider, inputs: Inputs, effort: Effort, gemma: bool) -> Timed:
    point = inputs.point
    if point.op not in provider.ops:
        raise Unsupported(f"{provider.name} has no {point.op}")
    call = provider.make(point.op, inputs.weight, gemma)
    check(provider, call, inputs, gemma)
    graphs = point.device == "cuda" and point.suite != "host"
    return GraphTimed(call, inputs, effort) if graphs else WallTimed(call, inputs, effort)


def _release(point: Point) -> None:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(f"after {point}: {results.describe(error)}") from error
