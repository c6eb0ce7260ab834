"""MLX-LM: its own folder."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.readers.base import Fault, Reader
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
            f"msplora-analyze export {facts.place} --out DIR --to mlx",
        )


READER = Reader(
    name="mlx",
    title="MLX-LM",
    layouts=("mlx",),
    to="mlx",
    source="MLX-LM, mlx_lm/tuner/utils.py, load_adapters",
    rules=(one_rank,),
)
