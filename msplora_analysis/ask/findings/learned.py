"""Runs that learned nothing, or barely: by the rule of ``advise``."""

from __future__ import annotations

from collections.abc import Iterator

from msplora_analysis.ask.advice.gather import moments_of, of_adapter, readable
from msplora_analysis.ask.advice.learned import CORRELATION, FALL, NOTHING, learned
from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings.base import Finding, Kind

BARELY = Kind(
    "barely-learned",
    "warning",
    "the training changed the weights, and next to nothing else",
    f"our choice: without the adapter the outputs move by {NOTHING:g} nats an example at most (moments), or the metric "
    f"is a correlation below {CORRELATION:g}, or the training loss of a classifier fell by less than {FALL:.0%} from "
    "its first epoch to its last",
    "compare the metric with that of the majority class; raise the learning rate, train longer, or try another seed",
)


def barely(evidence: Evidence) -> Iterator[Finding]:
    """At the last checkpoint of each run; an update of zero has a finding of its own."""
    for adapter in readable(evidence):
        sigma = evidence.spectra.loc[of_adapter(evidence.spectra, adapter), "sigma"]
        if not sigma.any():
            continue
        found = learned(adapter, moments_of(adapter, evidence.options), is_zero=False)
        if found.value is False:
            place = {"run": adapter.run, "step": adapter.step, "epoch": adapter.epoch}
            yield Finding(BARELY, place, found.number, found.threshold, found.evidence)


CHECKS = (barely,)
KINDS = (BARELY,)
