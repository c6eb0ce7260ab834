"""MLX-LM: its own folder."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import Fault, Reader, exported
from msplora_analysis.ask.readers.facts import Facts


def one_rank(facts: Facts) -> Iterator[Fault]:
    declared = facts.config.get("lora_parameters", {}).get("rank")
    if other := next((module for module in facts.modules if module.rank != declared), None):
        yield Fault(
            "rank",
            "error",
            "refuses it",
            "ranks that are not that of lora_parameters",
            f"{other.name} has rank {other.rank}, lora_parameters says {declared}",
            "MLX-LM 0.32, mlx_lm/tuner/utils.py, load_adapters",
            exported(facts, "mlx"),
        )


def settings(facts: Facts) -> Iterator[Fault]:
    needed = {"num_layers": facts.config, "dropout": facts.config.get("lora_parameters", {})}
    if missing := [name for name, where in needed.items() if name not in where]:
        evidence = f"adapter_config.json has no {' and no '.join(missing)}"
        source = "MLX-LM 0.32, mlx_lm/tuner/utils.py, load_adapters and linear_to_lora_layers"
        yield Fault("settings", "error", "refuses it", "settings are missing", evidence, source, exported(facts, "mlx"))


READER = Reader(
    name="mlx",
    title="MLX-LM",
    layouts=("mlx",),
    to="mlx",
    source="MLX-LM, mlx_lm/tuner/utils.py, load_adapters",
    rules=(one_rank, settings),
)
