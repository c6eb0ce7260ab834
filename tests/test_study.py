"""The scripts of study/, where they do more than train: faults in files, ties of layers, noise in labels."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """As when a script is run: its folder is searched first."""
    sys.path.insert(0, str(ROOT / "study"))
    yield
    sys.path.remove(str(ROOT / "study"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, scripts: None) -> dict[tuple[str, float], dict[str, str]]:
    """The rows of the example run, by fault and strength."""
    from faults import plant_one

    folder = tmp_path_factory.mktemp("planted")
    run = folder / "minilm" / "acceptability" / "lora-8" / "seed-0"
    shutil.copytree(ROOT / "examples" / "runs" / "lora-8", run)
    plant_one(run, folder)
    (file,) = (folder / "planted").iterdir()
    return {(row["fault"], float(row["strength"])): row for row in csv.DictReader(file.read_text().splitlines())}


def test_each_fault_is_found_by_the_finding_for_it_and_a_healthy_run_has_none(planted: Any) -> None:
    from fault_tables import EXPECTED, GRAVE

    assert all(planted["healthy", 1][kind] in ("0", "") for kind in GRAVE)
    for fault, strength in (("a layer", 30), ("all layers", 30), ("frozen layer", 1), ("copied layer", 1)):
        for kind in EXPECTED[fault]:
            assert int(planted[fault, strength][kind]) > 0, (fault, kind)
    assert planted["not finite", 1]["non-finite"] == "1"


def test_the_number_behind_a_finding_is_that_of_the_update_whatever_the_threshold(planted: Any) -> None:
    healthy = float(planted["healthy", 1]["large-update value"])
    for strength in (10, 30):
        assert float(planted["all layers", strength]["large-update value"]) == pytest.approx(strength * healthy, 1e-3)
    outlier = {x: float(planted["a layer", x]["norm-outlier value"]) for x in (10, 30)}
    assert outlier[30] == pytest.approx(3 * outlier[10], 1e-3)
    assert float(planted["copied layer", 1]["identical-update value"]) == pytest.approx(1)
    assert float(planted["frozen layer", 1]["large-update value"]) == 0  # in that layer


@pytest.mark.parametrize("shared", ["inputs", "outputs", "updates", ""])
def test_tied_layers_start_as_near_to_the_updates_as_any_can(shared: str) -> None:
    """Eckart and Young: what is left is the sum of squares of the singular values that are cut."""
    import torch
    from ties import together

    torch.manual_seed(0)
    updates = [torch.randn(9, 4).double() @ torch.randn(4, 7).double() for _ in range(2 if shared else 1)]
    found = together(updates, shared, 3)
    left = sum(float(((b @ a - update) ** 2).sum()) for (a, b), update in zip(found, updates, strict=True))
    stacked = {"inputs": torch.vstack, "outputs": torch.hstack}.get(shared, lambda parts: sum(parts) / len(parts))(
        updates
    )
    least = float((torch.linalg.svdvals(stacked)[3:] ** 2).sum())
    if shared == "updates":  # both have the mean, and are as far from it
        least = 2 * least + float(((updates[0] - updates[1]) ** 2).sum()) / 2
    assert left == pytest.approx(least)
    same = {"inputs": (0,), "outputs": (1,), "updates": (0, 1)}.get(shared, ())
    assert all(torch.equal(found[0][i], found[1][i]) for i in same)


def test_noise_shuffles_labels_of_as_many_rows_as_it_says(scripts: None) -> None:
    from faults import with_noise

    rows = [json.dumps({"sentence": f"{i}", "label": i}).encode() for i in range(100)]
    noisy = [json.loads(line) for line in with_noise(rows, 0.3)]
    assert Counter(row["label"] for row in noisy) == Counter(range(100))
    assert [row["sentence"] for row in noisy] == [str(i) for i in range(100)]
    assert 20 < sum(row["label"] != i for i, row in enumerate(noisy)) <= 30


def test_each_layer_is_tied_to_one_that_is_no_neighbour(scripts: None) -> None:
    from ties import LAYERS, others

    for seed in range(20):
        pairs = others(str(seed))
        assert sorted(layer for pair in pairs for layer in pair) == list(range(LAYERS))
        assert all(high - low > 1 for low, high in pairs)
