"""From a model to the answers of the analysis: weighted spectra and cuts, against dense G and C of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import msplora_analysis as ma
from msplora_core import record_moments
from msplora_core.measure.updates import updates_of

from .test_recording import CASES, Case, adapted, delta, densely, examples_of, lora, msplora, padded, root

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of heads that are not saved


def best_of_rank(update: torch.Tensor, c: torch.Tensor, g: torch.Tensor, rank: int) -> torch.Tensor:
    """What is nearest to an update in ‖G^½ · C^½‖ and inside its own spaces, by dense decompositions."""
    outer, inner = root(g), root(c)
    u, sigma, vt = torch.linalg.svd(outer @ update @ inner)
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    # update · inner · vtᵀ and uᵀ · outer · update are the terms in the update's own column and row space
    return update @ inner @ vt.T @ torch.diag(1 / sigma) @ u.T @ outer @ update


@pytest.mark.parametrize("configure", [lora, msplora])
@pytest.mark.parametrize("name", CASES)
def test_spectra_and_cuts_are_those_of_the_models_own_dense_matrices(
    name: str, configure: Callable[[Case], Any], tmp_path: Path
) -> None:
    case = CASES[name]
    base = case.make(layers=3).double()
    model = adapted(copy.deepcopy(base), configure(case))
    # as many as G needs to be of full rank where the loss feels one token an example: else the best cut is not unique
    examples = [one | {"input_ids": (one["input_ids"] + n) % 57 + 3} for n in range(3) for one in examples_of(case)]
    model.save_pretrained(str(tmp_path / "adapter"))
    record_moments(model, padded(examples, 3), labels="given").save(tmp_path / "adapter" / "moments.safetensors")

    dense = densely(model, examples, case.task_type)
    spectra = ma.load_spectra(tmp_path / "adapter", cache=False)
    whole = spectra[spectra["scale"] == ("layer" if configure is lora else "total")]
    expected = copy.deepcopy(base)  # with the cut added to its weights
    for path, update in updates_of(model).items():
        x, g = torch.cat(dense[path].x), torch.cat(dense[path].g)
        c, fisher = x.T @ x / len(x), g.T @ g / len(g)
        weighted = torch.linalg.svdvals(root(fisher) @ delta(update) @ root(c))[: update.rank]
        known = weighted > 1e-3 * weighted[0]
        found = whole.loc[whole["name"] == path, "task_sigma"].to_numpy()
        np.testing.assert_allclose(found[known], weighted[known], rtol=1e-4)
        change = best_of_rank(delta(update), c, fisher, 1)
        weight = expected.get_submodule(path).weight
        with torch.no_grad():
            weight += change.T if name == "gpt2" else change

    table = ma.compress(tmp_path / "adapter", tmp_path / "small", rank=1)
    assert table["rank"].tolist() == [1] * len(dense)
    small = peft.PeftModel.from_pretrained(base, str(tmp_path / "small")).eval()
    for batch in padded(examples, 5):
        if case.targets:
            batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        exact, logits = (of(**inputs).logits.detach() for of in (expected.eval(), small))
        np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
