"""Trainers of the methods whose adapter file is not what training continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msplora_core.errors import TrainingError
from msplora_core.methods.adalora import RankPruning
from msplora_core.methods.pissa import InitialFactors
from msplora_core.train.trainer import AdapterTrainer

STATE_NAME = "method_state.pt"


class StatefulTrainer(AdapterTrainer):
    """Trainer that keeps, beside the adapter, the trained parameters as they are and a state of the method's own."""

    model: Any  # a PeftModel

    def method_state(self) -> dict[str, Any]:
        """What the method needs to continue, besides its parameters."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Continue from ``method_state()``."""

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            trained = {name: p.detach() for name, p in self._trained().items()}
            torch.save({"trained": trained, "method": self.method_state()}, Path(output_dir) / STATE_NAME)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / STATE_NAME
        if not path.is_file():
            raise TrainingError(f"{path}: missing, and training continues from it; start anew with --overwrite")
        state = torch.load(path, map_location="cpu", weights_only=True)
        trained = self._trained()
        if unlike := sorted(trained.keys() ^ state["trained"].keys()):
            raise TrainingError(f"{path}: made for another model ({unlike[0]} is in one alone); give that --model")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["trained"][name])
        self.load_method_state(state["method"])


class AdaLoraTrainer(StatefulTrainer):
    """Trainer of AdaLoRA: its adapter files are pruned, and pruned components may come back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pruning = RankPruning(self.model)
        self.add_callback(self._pruning)

    def method_state(self) -> dict[str, Any]:
        return self._pruning.state_dict()

    def load_method_state(self, state: dict[str, Any]) -> None:
        self._pruning.load_state_dict(state)


class PissaTrainer(StatefulTrainer):
    """Trainer of PiSSA: its adapter files are the difference to the unchanged base model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._initial = InitialFactors(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._initial.saving_changes(self.model, state_dict) as changed:
            super()._save(output_dir, changed)
