"""What adding costs, predicted: against the KL of models to which a little of the other adapter is really added."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import log_softmax
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis.ask.relations import sentences
from msplora_core.added import read_added
from msplora_core.errors import TrainingError
from msplora_core.measure.adding import factors_of, record_added
from msplora_core.measure.cli import app
from msplora_core.measure.updates import updates_of
from msplora_core.train.training import train

from .conftest import make_bert
from .test_recording import CASES, adapted, examples_of, lora, msplora, padded
from .toys import toy_settings


@pytest.fixture
def two() -> tuple[Any, dict[str, Any]]:
    """BERT with LoRA on three kinds of modules, and MSPLoRA of the same base on some of them and more."""
    case = CASES["bert"]
    model = adapted(make_bert(layers=3), lora(case))
    other = adapted(make_bert(layers=3), msplora(case), seed=5)
    return model, {name: (of.a(), of.b()) for name, of in updates_of(other).items()}


def log_probabilities(model: Any, batches: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([log_softmax(model(b["input_ids"], b["attention_mask"]).logits, -1) for b in batches])


def measured_kl(model: Any, batches: Any, update: dict[str, Any]) -> float:
    """Mean over examples of KL(before || after), where weights have a gate of the update, per squared gate."""
    gate, found = 1e-4, []
    for sign in (1, -1):  # the mean has no term of third order
        changed = copy.deepcopy(model)
        for name, (a, b) in update.items():
            layer = changed.base_model.model.get_submodule(name)
            weight = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
            weight.data += sign * gate * b @ a
        before, after = log_probabilities(model, batches), log_probabilities(changed, batches)
        found.append(float((before.exp() * (before - after)).sum(1).mean()))
    return sum(found) / 2 / gate**2


def test_the_prediction_is_the_kl_of_adding_a_little(two: tuple[Any, dict[str, Any]]) -> None:
    model, update = two
    batches = padded(examples_of(CASES["bert"]), 2)
    before = copy.deepcopy(model.state_dict())
    one_module = {name: update[name] for name in list(update)[:1]}
    found = record_added(model, batches, {"whole": update, "one": one_module})
    for other, of in zip(found.others, (update, one_module), strict=True):
        assert other.predicted_kl == pytest.approx(measured_kl(model, batches, of), rel=5e-3)
    for name, predicted in found.others[0].modules.items():
        alone = measured_kl(model, batches, {name: update[name]})
        assert predicted == pytest.approx(alone, rel=5e-3, abs=1e-6), name
    a, b = update["bert.encoder.layer.0.attention.self.query"]
    norm = found.others[0].norms["bert.encoder.layer.0.attention.self.query"]
    assert norm == pytest.approx(float(torch.linalg.norm(b @ a)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_and_batches_change_nothing(two: tuple[Any, dict[str, Any]]) -> None:
    model, update = two
    examples = examples_of(CASES["bert"])
    by_one, by_many = (record_added(model, padded(examples, n), {"other": update}).others[0] for n in (1, 5))
    assert by_one.predicted_kl == pytest.approx(by_many.predicted_kl)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name, a, b: {"encoder.nowhere": (a, b)}, "encoder.nowhere"),
        (lambda name, a, b: {name: (a[:, :5], b)}, "layer.0.attention.self.query"),
        (lambda name, a, b: {}, "others"),
    ],
)
def test_what_does_not_fit_is_refused(two: tuple[Any, dict[str, Any]], change: Any, told: str) -> None:
    model, update = two
    name = "bert.encoder.layer.0.attention.self.query"
    changed = change(name, *update[name])
    with pytest.raises(TrainingError, match=told):
        record_added(model, padded(examples_of(CASES["bert"]), 5), {"other": changed} if changed else {})


def test_others_are_read_without_their_heads_and_the_base_is_as_before(tmp_path: Path) -> None:
    case = CASES["bert"]
    other = adapted(make_bert(layers=3), lora(case, modules_to_save=["classifier"]), seed=5)
    with torch.no_grad():
        other.base_model.model.classifier.modules_to_save["default"].weight.zero_()
    other.save_pretrained(tmp_path / "other")
    base = make_bert(layers=3)
    before = copy.deepcopy(base.state_dict())
    (found,) = factors_of(base, [tmp_path / "other"])
    for name, update in updates_of(other).items():
        assert torch.allclose(found[name][1] @ found[name][0], (update.b() @ update.a()).float(), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()
    peft.get_peft_model(make_bert(layers=2), lora(case)).save_pretrained(tmp_path / "smaller")
    with pytest.raises(TrainingError, match="smaller"):
        factors_of(make_bert(layers=3), [tmp_path / "smaller"])


def test_relate_finds_it_beside_the_adapter(tmp_path: Path) -> None:
    runs = [toy_settings(tmp_path, method=method, output_dir=tmp_path / method) for method in ("lora", "msplora")]
    for settings in runs:
        train(settings, report=lambda line: None)
    folder, two = tmp_path / "lora" / "checkpoint-9", tmp_path / "msplora" / "checkpoint-9"
    done = CliRunner().invoke(app, ["added", str(tmp_path / "lora"), str(two)])
    assert done.exit_code == 0, done.output
    (other,) = read_added(folder / "added.json").others
    assert (other.adapter, str(folder / "added.json") in done.output) == (str(two), True)
    table = ma.relate(folder, two).set_index("name")
    assert table.loc["", "predicted_kl_a"] == other.predicted_kl
    assert {name: table.loc[name, "predicted_kl_a"] for name in other.modules} == other.modules
    assert table["predicted_kl_b"].isna().all()
    assert (
        f"added to lora, msplora is predicted to change its outputs by {other.predicted_kl:.2g} nats"
        in (sentences(ma.relate(folder, two))[1])
    )
    mirrored = ma.relate(two, folder).set_index("name")
    assert mirrored.loc["", "predicted_kl_b"] == other.predicted_kl
    another = ma.relate(folder, tmp_path / "msplora" / "checkpoint-6")
    assert another["predicted_kl_a"].isna().all()

    for change, told in (({"norms": {"a": 1.0}}, "another checkpoint"), ({"others": 3}, "others")):
        written = json.loads((folder / "added.json").read_text())
        (folder / "added.json").write_text(json.dumps(written | change))
        with pytest.raises(ma.AnalysisError, match=told) as error:
            ma.relate(folder, two)
        assert str(folder) in str(error.value)
        (folder / "added.json").write_text(json.dumps(written))
