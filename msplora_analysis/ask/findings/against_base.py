"""An update much larger than the weight it changes, or one that adds directions to its spectrum."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings.base import Finding, Kind
from msplora_analysis.tables.columns import KEYS
from msplora_analysis.tables.rows import rows_of

LARGE = Kind(
    "large-relative-update",
    "warning",
    "the update is much larger than the weight it changes",
    "our choice: ‖ΔW‖₂ / ‖W‖₂ of 5; 2.1 is the most in 15 healthy LoRA runs of MiniLM",
    "the training has probably diverged, or lora_alpha is too large: look at the loss, lower the learning rate",
)
INTRUDERS = Kind(
    "intruder-dimensions",
    "info",
    "W + ΔW has leading directions that W did not have",
    "arXiv 2410.21228, algorithm 1; k = 10 and epsilon = 0.5 are our choice; LoRA commonly has some",
    "the paper links them to forgetting: measure what must be kept from pre-training; rank-stabilised LoRA of a higher "
    "rank is reported to leave fewer",
)

RATIO = 5.0


def relative(evidence: Evidence) -> Iterator[Finding]:
    for row in rows_of(evidence.relative):
        place = {name: row[name] for name in KEYS}
        if row["ratio"] >= RATIO:
            yield Finding(LARGE, place, row["ratio"], RATIO, f"‖ΔW‖₂ / ‖W‖₂ = {row['ratio']:.3g}")
        if row["intruders"]:
            text = (
                f"{row['intruders']} of the {row['examined']} leading left singular vectors of W + ΔW; "
                f"the lowest has a cosine of {row['cosine']:.2g} with the nearest of W"
            )
            yield Finding(INTRUDERS, place, row["intruders"], 1.0, text, details={"cosine": row["cosine"]})


CHECKS = (relative,)
KINDS = (LARGE, INTRUDERS)
