"""Of every adapted module what passes through it: sums over tokens of A x and Bᵀ g, and each example's core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from msplora_core.errors import TrainingError
from msplora_core.measure.hooks import exact, hooked
from msplora_core.measure.logits import Drawing, Outputs
from msplora_core.measure.tokens import Tokens
from msplora_core.measure.updates import Update
from msplora_core.moments import Array

_HALF = 2.0**10
"""What losses are multiplied by in float16, whose smallest numbers are large for a gradient."""
_TOGETHER = 2**22
"""Numbers of A x of modules that are summed at once: one product of r × r would leave most of a GPU idle."""


class Sums:
    """Of one module so far.

    Args:
        device: Where the module computes.
        rows: How many rows there will be; memory is taken when they are written.
        rank: R.

    Attributes:
        s_a: (R, R) float64, sum over tokens of (A x)(A x)ᵀ.
        s_b: Likewise of Bᵀ g.
        tokens: How many.
        cores: (rows, R, R) float32 on the processor: each row's sum of (Bᵀ g)(A x)ᵀ.
        core: Those of the current batch, on the device; None: nothing of it passed through.
    """

    def __init__(self, device: torch.device, rows: int, rank: int) -> None:
        self.s_a = exact(torch.zeros(rank, rank, device=device))
        self.s_b = exact(torch.zeros(rank, rank, device=device))
        self.tokens = 0
        self.cores: Array = np.zeros((rows, rank, rank), np.float32)
        self.core: torch.Tensor | None = None
        self._staged: torch.Tensor | None = None

    def add(self, s_a: torch.Tensor, s_b: torch.Tensor, core: torch.Tensor, tokens: int) -> None:
        """Add a batch's sums, (R, R) each, and its examples' cores, (examples, R, R)."""
        self.s_a += s_a
        self.s_b += s_b
        self.tokens += tokens
        self.core = core if self.core is None else self.core + core

    def stage(self) -> Array | None:
        """The batch's cores on their way to the processor, there when the device has come so far."""
        if self.core is None:
            return None
        if self.core.device.type != "cuda":
            staged = self.core.cpu()
        else:
            if self._staged is None or len(self._staged) < len(self.core):
                self._staged = torch.empty(self.core.shape, pin_memory=True)
            staged = self._staged[: len(self.core)].copy_(self.core, non_blocking=True)
        self.core = None
        return staged.numpy()


class _Seen(NamedTuple):
    """What passed through a module in a batch: A x and Bᵀ g, (examples, length, R) each, and which rows are none."""

    sums: Sums
    ax: torch.Tensor
    bg: torch.Tensor
    padding: torch.Tensor | None
    tokens: int


class Recorder:
    """Takes A x and Bᵀ g of every module while a model runs forward and backward.

    Args:
        updates: The adapted modules.
        examples: How many examples this process will see.
    """

    def __init__(self, updates: Mapping[str, Update], examples: int) -> None:
        self.updates = updates
        self.examples = examples
        self.sums: dict[str, Sums] = {}
        self.rows: list[int] = []
        """Numbers, among those of all processes, of the rows recorded here: example × draws + draw."""
        self.tokens = 0
        bases = [update.layer.get_base_layer() for update in updates.values()]
        tensors = (tensor for base in bases for tensor in (*base.parameters(), *base.buffers()))
        self._factor = _HALF if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0
        self._batch: Tokens | None = None
        self._draws = 0
        self._seen: dict[tuple[Any, ...], list[_Seen]] = {}
        self._pool = ThreadPoolExecutor(1)
        self._copying: Future[None] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take what passes for the length of a ``with``."""
        hooks: list[Any] = []
        try:
            for name, update in self.updates.items():
                hooks.append(hooked(update, partial(self._take, name)))
            yield
            self._copied()
        finally:
            for hook in hooks:
                hook.remove()
            self._pool.shutdown()

    def record(self, outputs: Outputs, tokens: Tokens, drawing: Drawing, first: int) -> None:
        """Backward from a batch's outputs, once for each draw.

        Args:
            first: The number of the batch's first example among all.
        """
        if not outputs.values.requires_grad:
            raise TrainingError("no adapted module is on the way to the model's outputs; nothing can be measured")
        self._draws = draws = drawing.settled(outputs)
        self._batch, start = tokens, len(self.rows)
        self.tokens += tokens.count() or tokens.examples
        for draw in range(draws):
            gradient = drawing.gradient(outputs, first, draw).mul_(self._factor)
            with torch.autocast(gradient.device.type, enabled=False):  # as Trainer: backward is in what forward chose
                torch.autograd.backward(outputs.values, gradient, retain_graph=draw + 1 < draws)
            self._put_away(slice(start + draw, start + tokens.examples * draws, draws))
        self.rows += range(first * draws, (first + tokens.examples) * draws)

    def _take(self, name: str, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        assert self._batch is not None
        (ax, padding, tokens), (bg, _, _) = (self._batch.by_example(name, rows) for rows in (hidden, gradient))
        if name not in self.sums:
            self.sums[name] = Sums(ax.device, self.examples * self._draws, ax.shape[-1])
        alike = self._seen.setdefault((ax.device, ax.shape, ax.dtype, bg.dtype), [])
        alike.append(_Seen(self.sums[name], ax, bg, padding, tokens))
        if len(alike) * ax.numel() >= _TOGETHER:
            self._add_up(alike)

    def _add_up(self, alike: list[_Seen]) -> None:
        """Add what several modules saw in one batch, alike in shape, to their sums; the list is empty then."""
        ax, bg = exact(torch.stack([seen.ax for seen in alike])), exact(torch.stack([seen.bg for seen in alike]))
        bg /= self._factor
        if (padding := alike[0].padding) is not None:
            padding = padding.to(ax.device)
            ax.masked_fill_(padding, 0)
            bg.masked_fill_(padding, 0)
        cores = (bg.mT @ ax).float()
        flat_a, flat_b = ax.flatten(1, 2), bg.flatten(1, 2)
        for seen, s_a, s_b, core in zip(alike, flat_a.mT @ flat_a, flat_b.mT @ flat_b, cores, strict=True):
            seen.sums.add(s_a, s_b, core, seen.tokens)
        alike.clear()

    def _put_away(self, rows: slice) -> None:
        """The cores of a batch to their rows, while the device goes on with the next batch."""
        for alike in self._seen.values():
            if alike:
                self._add_up(alike)
        self._seen.clear()
        self._copied()
        staged = {name: sums.stage() for name, sums in self.sums.items()}
        devices = {sums.s_a.device for sums in self.sums.values() if sums.s_a.device.type == "cuda"}
        arrived = [torch.cuda.current_stream(device).record_event() for device in devices]

        def copy() -> None:
            for event in arrived:
                event.synchronize()
            for name, cores in staged.items():
                if cores is not None:
                    self.sums[name].cores[rows] = cores

        self._copying = self._pool.submit(copy)

    def _copied(self) -> None:
        if self._copying is not None:
            self._copying.result()
            self._copying = None
