"""How a step of a model is run and measured: prefill or decode; eager, in a CUDA graph, or compiled."""

from __future__ import annotations

import copy
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .model_shapes import norms_of_others

PROMPT = 64
"""Tokens of a sequence before the first decoding step, and of a prefill."""
VOCABULARY_USED = 1000
NORM = "gemma_norm.benchmark: a norm"
OURS = "gemma_norm"
"""Part of the name of each of this package's kernels."""
cuda: Any = torch.cuda  # partly without types
DeviceType: Any = torch.autograd.DeviceType  # type: ignore[attr-defined]  # not exported, as mypy sees it


@dataclass(frozen=True)
class Setting:
    shape: str
    layers: int
    phase: str
    mode: str
    batch: int
    device: str

    @property
    def tokens(self) -> int:
        """What a step takes in."""
        return self.batch * (PROMPT if self.phase == "prefill" else 1)


@dataclass
class Measured:
    milliseconds: float
    """The median of the samples, a step."""
    kernels: float = 0
    """GPU kernels a step, copies and fills among them."""
    gpu_milliseconds: float = 0.0
    """The sum of their times."""
    norm_share: float = 0.0
    """The norms' part of it. The addition of a residual counts where a norm's kernel does it."""
    logits: Tensor | None = None
    """Of the first step."""


class Step:
    """One variant of a model at one setting. Calling it runs a step and returns the logits of the last token."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model, self.setting = model, setting
        generator = torch.Generator().manual_seed(1)
        size = (setting.batch, PROMPT)
        self.prompt = torch.randint(VOCABULARY_USED, size, generator=generator).to(setting.device)
        self.cache: Any = None
        self.read: list[Tensor] = []
        if setting.phase == "decode":
            if setting.mode == "compile":
                length = 2 * PROMPT
                self.cache = importlib.import_module("transformers").StaticCache(model.config, max_cache_len=length)
            with torch.no_grad():
                self.cache = model(self.prompt, past_key_values=self.cache, use_cache=True).past_key_values
        self.token = self.prompt[:, -1:].clone()
        self.run: Callable[[], Tensor] = self._eager
        if setting.mode == "compile":
            # Variants share the code of their forwards, for which Dynamo keeps eight graphs, and then runs what is left
            # without a compiler.
            importlib.import_module("torch._dynamo").config.recompile_limit = 256
            compiled = torch.compile(model, dynamic=False)
            self.run = lambda: self._logits(compiled)
        if setting.mode == "graph":
            self.run = self._captured()

    def __call__(self) -> Tensor:
        if self.setting.phase == "decode" and self.setting.mode == "compile":
            for layer in self.cache.layers:
                if hasattr(layer, "cumulative_length_int"):
                    # A sliding window's count on the host is a constant to the compiler: another value, another graph.
                    layer.cumulative_length_int = PROMPT
        return self.run()

    def _eager(self) -> Tensor:
        return self._logits(self.model)

    def _logits(self, model: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            if self.setting.phase == "prefill":
                logits: Tensor = model(self.prompt, use_cache=False).logits
            else:
                logits = model(self.token, past_key_values=self.cache, use_cache=True).logits
            return logits[:, -1]

    def rewind(self) -> None:
        """Makes a static cache forget what was decoded since the last call: it has room for a sample, not for all."""
        if self.setting.phase == "decode" and self.setting.mode == "compile":
            for layer in self.cache.layers:
                if isinstance(length := getattr(layer, "cumulative_length", None), Tensor):
                    length.fill_(PROMPT)

    def _captured(self) -> Callable[[], Tensor]:
        """A replay is the same step of the same cache each time."""
        start = copy.deepcopy(self.cache)
        stream = cuda.Stream()
        # A large prompt is still being computed. Without the wait, steps would read a cache and a token that are not
        # there yet: a token that is no token fails in the embedding, on the device.
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(2):
                self._eager()
        cuda.synchronize()
        self.cache, self.read = start, list(_tensors(start))  # a graph does not own what it reads
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            logits = self._eager()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def measure(
    models: Mapping[str, nn.Module], setting: Setting, rounds: int, steps: int, seconds: float
) -> dict[str, Measured | Exception]:
    """Samples of all variants in turn. A variant that fails has its exception in place of figures."""
    ready: dict[str, Step] = {}
    results: dict[str, Measured | Exception] = {}
    for name, model in models.items():
        try:
            step = Step(model, setting)
            logits = step().float().clone()
            for _ in range(4 if setting.mode == "compile" else 2):  # a later call may compile anew
                step()
            ready[name], results[name] = step, Measured(0.0, logits=logits)
        except Exception as error:
            results[name] = error
    samples: dict[str, list[float]] = {name: [] for name in ready}
    until = time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= 5 and time.monotonic() > until:
                break
            for name, step in ready.items():
                samples[name].append(_sample(step, steps))
    finally:
        gc.enable()
    for name, step in ready.items():
        measured = results[name]
        assert isinstance(measured, Measured)
        measured.milliseconds = statistics.median(samples[name])
        if setting.device == "cuda":
            measured.kernels, measured.gpu_milliseconds, measured.norm_share = _profile(step)
    return results


def _sample(step: Step, steps: int) -> float:
    step.rewind()
    _synchronize(step.setting.device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(step.setting.device)
    return (time.perf_counter() - start) * 1e3 / steps


def _synchronize(device: str) -> None:
    if device == "cuda":
        cuda.synchronize()


def _profile(step: Step) -> tuple[float, float, float]:
    """Kernels, GPU milliseconds and the norms' share of these, a step."""
    steps = 3
    step.rewind()
    with _annotated(step.model), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        cuda.synchronize()
    events = profiler.events() or []
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    total = sum(e.device_time_total for e in kernels)
    ours = sum(e.device_time_total for e in kernels if OURS in e.name)
    annotated = sum(e.device_time_total for e in events if e.name == NORM and e.device_type == DeviceType.CPU)
    # No kernel is counted twice: hooks are on norms that are not ours alone.
    share = (ours + annotated) / total if total else 0.0
    return len(kernels) / steps, total * 1e-3 / steps, share


class _annotated:
    """Marks what the norms do in a profile. Only norms that are not ours: hooks would keep those from being fused."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [model.get_submodule(name) for name in norms_of_others(model)]
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        open_ranges: list[Any] = []

        def before(*_: object) -> None:
            open_ranges.append(record_function(NORM))
            open_ranges[-1].__enter__()

        def after(*_: object) -> None:
            open_ranges.pop().__exit__(None, None, None)

        for module in self.modules:
            self.hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def settings(
    shapes: list[str], layers: int, phases: list[str], modes: list[str], batches: list[int], device: str
) -> Iterator[Setting]:
    for shape in shapes:
        for mode in modes:
            for phase in phases:
                for batch in batches:
                    yield Setting(shape, layers, phase, mode, batch, device)
