"""A callback for Hugging Face Trainer that logs spectra of the adapter beside the loss.

    SpectraCallback().add_to(trainer)

The values (``measures`` names them) are added to what Trainer logs, so that TensorBoard, W&B, trackio, MLflow, the
printed lines and trainer_state.json have them. Works with every PEFT method that ``docs/formats.md`` lists, in Trainer
and what builds on it, such as TRL.

Trainer calls callbacks in the order in which they were added, its trackers (``report_to``) first, and hands the same
dictionary to all. It tells a callback neither of itself nor of the others (transformers 5.17 to 5.23), so a callback
cannot come first by itself: ``add_to`` is given the trainer.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.formats.helpers.base import NO_BASE
from msplora_analysis.live.measures import adapter_values
from msplora_analysis.live.model import active_adapters

try:
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_callback import TrainerControl, TrainerState
except ImportError:
    raise AnalysisError(
        "SpectraCallback needs transformers, which is not installed; run `pip install 'msplora[train]'`"
    ) from None


if TYPE_CHECKING:
    from transformers import Trainer


class SpectraCallback(TrainerCallback):
    """Adds effective rank, M_eff-k, norms and the overlap of scales to every log of the training loss.

    Give it to a trainer by ``SpectraCallback().add_to(trainer)``. In ``Trainer(callbacks=[...])`` it works too, but is
    called after the trackers of ``report_to``: these get no spectra, later callbacks and trainer_state.json do.

    Args:
        every: Log (loss and all) and compute every so many steps too, whatever logging_steps says; then at these
            steps alone. Default: whenever Trainer logs the loss.
        ks: The k of M_eff-k.
        by_module: Values of every module type too (query, value), not only of every scale.
        budget: The largest part of the training time that may go into this: where logs come faster, some go without
            spectra. None: no limit.

    Only the main process computes. A value that does not exist (a ratio of an update that is still zero) is left
    out. Whatever goes wrong is told once, as a warning, and training goes on.

    Example:
        >>> callback = ma.SpectraCallback(every=50)  # then callback.add_to(trainer)
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        ks: Sequence[int] = (1, 4),
        by_module: bool = False,
        budget: float | None = 0.02,
    ) -> None:
        if every is not None and every < 1:
            raise AnalysisError(f"SpectraCallback: every must be at least 1 step, got {every}")
        if any(k < 1 for k in ks):
            raise AnalysisError(f"SpectraCallback: every k must be at least 1, got {list(ks)}")
        if budget is not None and not 0 < budget <= 1:
            raise AnalysisError(f"SpectraCallback: budget must be a part of the training time, 0 to 1, got {budget}")
        self.every, self.ks, self.by_module, self.budget = every, tuple(ks), by_module, budget
        self.seconds = 0.0
        """Seconds that all computations took together."""
        self._not_before = 0.0
        self._is_first = False
        self._said: set[str] = set()

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer before all others, so that all get its values.

        Args:
            trainer: A Trainer of transformers, or what builds on it. It may have this callback already.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._is_first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.report_to and not self._is_first:
            self._say(
                "order",
                f"{', '.join(args.report_to)} is called before it and gets no spectra, trainer_state.json does; "
                "for both use SpectraCallback().add_to(trainer)",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        # Logs of an evaluation are what evaluate() returns, and not to be changed.
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        if self.every is not None and state.global_step % self.every:
            return
        started = time.perf_counter()
        if started < self._not_before:
            self._say(
                "budget",
                f"computing spectra takes {self.seconds:.2g} s, so not every log has them: they may take "
                f"{self.budget:.2g} of the training time (SpectraCallback(budget=...); None: no limit)",
            )
            return
        values = self._values(model)
        took = time.perf_counter() - started
        self.seconds += took
        if self.budget is not None:
            self._not_before = started + took / self.budget
        # Trainer has put a copy of the logs into its history already.
        entry = state.log_history[-1] if state.log_history else {}
        if entry.get("step") == state.global_step and entry.keys() >= logs.keys():
            entry.update(values)
        logs.update(values)

    def _values(self, model: Any) -> dict[str, float]:
        """Of all active adapters; their names are in those of the values where there are several."""
        found: dict[str, float] = {}
        try:
            adapters = active_adapters(model)
            for adapter in adapters:
                with adapter.tensors as tensors:
                    values, unknown = adapter_values(tensors, adapter.config, ks=self.ks, by_module=self.by_module)
                if unknown:
                    self._say("unknown", f"tensors that no format explains are left out: {', '.join(unknown[:3])}")
                if len(adapters) > 1:
                    values = {name.replace("/", f"/{adapter.name}/", 1): value for name, value in values.items()}
                found.update(values)
        except Exception as error:  # whatever it is, hours of training are worth more
            reason = str(error) if isinstance(error, AnalysisError) else f"{type(error).__name__}: {error}"
            # The weights of the base are the model's own, and may be quantised or spread over processes.
            reason = reason.replace(NO_BASE, "its checkpoints can be read with msplora-analyze spectra --base MODEL")
            self._say(reason, f"no spectra are logged: {printable(reason)}")
        return found

    def _say(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"SpectraCallback: {message}", stacklevel=3)
