"""A rank that falls while it trains: the cuts against dense decompositions, runs that resume, and what reads them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import msplora_analysis as ma
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.ask.advice.training import course_of
from msplora_analysis.show.report import report as write_report
from msplora_analysis.show.watch.following import Run
from msplora_analysis.tables.checkpoints import newest
from msplora_core.cli import _print_results
from msplora_core.errors import TrainingError
from msplora_core.methods.lora import Lora
from msplora_core.methods.msplora import MSPLora
from msplora_core.run import record
from msplora_core.run.settings import Settings, make_settings
from msplora_core.train.annealing import Annealing, Pair, best_cut, carry, pairs_of
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.train.training import EpochResult, train

from .conftest import make_bert
from .kill_loop import differences
from .toys import toy_settings

QUERY = "base_model.model.bert.encoder.layer.{}.attention.self.query"


def adapted(method: Lora, seed: int = 0) -> Any:
    """A toy model whose factors are random, as after some training."""
    model = method.adapt(make_bert(layers=3), "SEQ_CLS")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in pairs_of(model):
            for factor in (pair.a, pair.b):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return model


def annealing(model: Any, method: Lora) -> Annealing:
    assert method.anneal is not None
    return Annealing(model, method, {5: method.anneal[1]})


def optimiser(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def best(update: torch.Tensor, rank: int) -> torch.Tensor:
    u, sigma, vt = torch.linalg.svd(update.double())
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


# --- A cut ---


def test_lora_becomes_its_best_update_of_the_lower_rank() -> None:
    method = Lora(rank=3, lora_alpha=16, lora_dropout=0.0, anneal=[8, 3])
    model = adapted(method)
    before = {i: model.get_submodule(QUERY.format(i)).get_delta_weight("default") for i in range(3)}
    values = annealing(model, method).after_step(5, optimiser(model))
    assert (values["anneal_from"], values["anneal_to"]) == (8, 3)
    for i, update in before.items():
        layer = model.get_submodule(QUERY.format(i))
        now = layer.get_delta_weight("default")
        np.testing.assert_allclose(now.detach(), best(update.detach(), 3), atol=5e-7)
        assert (layer.r["default"], layer.scaling["default"], len(layer.lora_A["default"].weight)) == (3, 16 / 3, 3)
    assert model.peft_config["default"].r == 3


def test_each_scale_of_msplora_is_cut_from_its_own_factors() -> None:
    method = MSPLora(rank=4, lora_alpha=8, lora_dropout=0.0, anneal=[16, 4])
    model = adapted(method)
    scales = {"global": 8 / 16, "mid": 8 / 8, "layer": 8 / 4}
    before = [(p.scale, scales[p.scale] * p.b.detach() @ p.a.detach()) for p in pairs_of(model)]
    assert len(before) == 2 * (1 + 3 + 3)  # query and value; every shared pair once
    annealing(model, method).after_step(5, optimiser(model))
    new = {"global": (4, 8 / 4), "mid": (2, 8 / 2), "layer": (1, 8 / 1)}
    for (scale, update), pair in zip(before, pairs_of(model), strict=True):
        rank, scaling = new[scale]
        assert len(pair.a) == rank
        np.testing.assert_allclose(scaling * (pair.b @ pair.a).detach(), best(update, rank), atol=5e-7)
    whole = model.get_submodule(QUERY.format(1)).get_delta_weight("default").detach()
    parts = [pair for pair in pairs_of(model) if any(u.name == QUERY.format(1)[17:] for u, _ in pair.places)]
    np.testing.assert_allclose(whole, sum(new[p.scale][1] * (p.b @ p.a).detach() for p in parts), atol=5e-7)
    assert model.peft_config["default"].scale_ranks() == {"global": 4, "mid": 2, "layer": 1}


def test_the_task_decides_what_stays() -> None:
    """The dense optimum of ‖G^½ (ΔW - X) C^½‖ is G^-½ (G^½ ΔW C^½ cut to the rank) C^-½."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(9, 5))
    roots = [np.linalg.cholesky(x @ x.T) for x in (rng.normal(size=(12, 30)), rng.normal(size=(9, 30)))]
    c, g = (root @ root.T for root in roots)
    cut = best_cut(a @ a.T, b.T @ b, 2, (a @ c @ a.T, b.T @ g @ b))
    u, sigma, vt = np.linalg.svd(roots[1].T @ b @ a @ roots[0])
    expected = np.linalg.inv(roots[1]).T @ (u[:, :2] * sigma[:2]) @ vt[:2] @ np.linalg.inv(roots[0])
    np.testing.assert_allclose(5 / 2 * b @ cut.up @ cut.down @ a, expected, atol=1e-9)  # alpha / r is 5/2 as large
    assert cut.kept / cut.whole == pytest.approx((sigma[:2] ** 2).sum() / (sigma**2).sum())


def test_an_update_of_zero_goes_on_learning() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 20))
    cut = best_cut(a @ a.T, np.zeros((6, 6)), 2)
    rows = np.linalg.norm(cut.down @ a, axis=1)
    np.testing.assert_allclose(rows, np.sqrt((a**2).sum() / 6))  # as large as the rows of A are
    assert not cut.up.any()


def test_the_optimiser_s_averages_take_the_new_coordinates() -> None:
    """Where a cut leaves the update as it is, the gradient at the new factors is the old one, carried."""
    rng = np.random.default_rng(0)
    low_a, low_b = rng.normal(size=(2, 7)), rng.normal(size=(5, 2))
    mix = rng.normal(size=(4, 2))
    a, b = mix @ low_a, low_b @ np.linalg.pinv(mix)  # rank 2 in factors of rank 4
    target = torch.from_numpy(rng.normal(size=(5, 7)))
    pair = Pair("layer", *(torch.nn.Parameter(torch.from_numpy(x)) for x in (a, b)))
    adam = torch.optim.AdamW([pair.a, pair.b])

    def gradients(scale: float) -> list[torch.Tensor]:
        return list(torch.autograd.grad((scale * pair.b @ pair.a * target).sin().sum(), [pair.a, pair.b]))

    for parameter, gradient in zip((pair.a, pair.b), gradients(16 / 4), strict=True):
        adam.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": gradient, "exp_avg_sq": gradient**2}
    squares = adam.state[pair.a]["exp_avg_sq"]
    cut = best_cut(*pair.grams(), 2)
    carry(adam, pair, cut)
    pair.set(torch.from_numpy(cut.down) @ pair.a.detach(), pair.b.detach() @ torch.from_numpy(cut.up))
    for parameter, expected in zip((pair.a, pair.b), gradients(16 / 2), strict=True):
        np.testing.assert_allclose(adam.state[parameter]["exp_avg"], expected, rtol=1e-9, atol=1e-9)
        assert adam.state[parameter]["exp_avg_sq"].shape == parameter.shape
    by_hand = sum((4 / 2 * cut.up[i, 1]) ** 2 * squares[i, 3] for i in range(4))
    assert float(adam.state[pair.a]["exp_avg_sq"][1, 3]) == pytest.approx(float(by_hand))


def test_a_reset_forgets_the_averages_of_the_factors_alone() -> None:
    method = Lora(rank=2, lora_alpha=16, lora_dropout=0.0, anneal=[4, 2], anneal_optimizer="reset")
    model = adapted(method)
    adam = optimiser(model)
    model(input_ids=torch.arange(3, 13).reshape(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    adam.step()
    annealing(model, method).after_step(5, adam)
    left = {name for name, p in model.named_parameters() if adam.state.get(p)}
    assert left
    assert all("classifier" in name for name in left)
    adam.zero_grad()
    model(input_ids=torch.arange(3, 13).reshape(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    adam.step()


# --- Options ---


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"anneal": [8, 32]}, "anneal=8:32: expected ranks that fall"),
        ("lora", {"anneal": [8]}, "anneal=8: expected ranks that fall"),
        ("lora", {"anneal": [32, 8], "rank": 16}, "anneal=32:8 ends at another rank than rank=16; leave 'rank' out"),
        ("lora", {"anneal": [32, 8], "anneal_at": [0.2, 0.5]}, "anneal_at: expected 1 for anneal=32:8"),
        ("lora", {"anneal_by": "task"}, "'anneal_by' needs 'anneal'"),
        ("lora", {"anneal": [32, 8], "anneal_by": "energy"}, "anneal_by='energy': expected one of plain, task"),
        ("dora", {"anneal": [32, 8]}, "'anneal' is no option of the method dora.* belongs to lora, msplora"),
        ("adalora", {"anneal_at": [5]}, "'anneal_at' is no option of the method adalora"),
        ("msplora", {"anneal": [8, 0]}, "anneal=8:0: expected ranks that fall, the last at least 1"),
        ("msplora", {"anneal": [10, 4]}, "anneal: at rank 10 .* layer 2.5 is no rank"),
        ("msplora", {"anneal": [32, 8], "ranks": {"global": 4, "mid": 2, "layer": 1}}, "first of 'ranks' is 4"),
    ],
)
def test_wrong_options(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        make_settings(model="m", task="cola", method=method, output_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anneal", "8:32"], "--anneal=8:32: expected ranks that fall"),
        (["--anneal", "32-8"], "--anneal='32-8': expected ranks from the first to the last, such as 32:8"),
        (["--anneal", "32:8", "--anneal-at", "half"], "--anneal-at='half': expected steps, or parts of all steps"),
        (["--anneal", "32:8", "--method", "dora"], "--anneal is no option of the method dora"),
        (["--anneal-optimizer", "reset"], "--anneal-optimizer needs --anneal"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "msplora_core.cli", "--output-dir", str(tmp_path / "run")]
    command += arguments if "--method" in arguments else [*arguments, "--method", "lora"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_when() -> None:
    def cuts(**options: Any) -> dict[int, int]:
        return Lora(**options).cuts(100)

    assert cuts(anneal=[32, 8]) == {50: 8}
    assert cuts(anneal=[32, 16, 8]) == {25: 16, 50: 8}
    assert cuts(anneal=[32, 16, 8], anneal_at=[10, 0.75]) == {10: 16, 75: 8}
    for wrong in ([100], [0.001], [-5]):
        with pytest.raises(TrainingError, match=r"anneal_at=.* of 100; expected one after the other, and before"):
            cuts(anneal=[32, 8], anneal_at=wrong)


def test_a_step_that_the_training_has_not_costs_nothing(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, method="lora", anneal=[8, 4], anneal_at=[9])  # as many as there are
    with pytest.raises(TrainingError, match="steps 9 of 9"):
        train(settings)
    assert not settings.output_dir.exists()


# --- Runs ---

ANNEALED: dict[str, tuple[int, dict[str, Any]]] = {  # and after which of nine steps the run is killed
    "lora": (4, {"method": "lora", "anneal": [8, 4, 2], "anneal_at": [2, 5]}),
    "lora, by the task": (4, {"method": "lora", "anneal": [8, 2], "anneal_at": [5], "anneal_by": "task"}),
    "msplora": (5, {"method": "msplora", "anneal": [16, 4], "anneal_at": [5], "anneal_optimizer": "reset"}),
    "msplora, by the task": (6, {"method": "msplora", "anneal": [16, 4], "anneal_at": [5], "anneal_by": "task"}),
}
Annealed = tuple[Settings, int, list[str]]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Trainer collects garbage at its start, among all that was ever imported: most of a toy's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=ANNEALED)
def annealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Annealed:
    """A run of nine steps, and what it told; a cut is in the middle of its second epoch."""
    lines: list[str] = []
    killed_after, options = ANNEALED[request.param]
    settings = toy_settings(tmp_path_factory.mktemp("annealed"), lora_dropout=0.1, micro_batch_size=4, **options)
    train(settings, report=lines.append)
    return settings, killed_after, lines


def test_resuming_gives_the_same_bits(annealed: Annealed, tmp_path: Path) -> None:
    whole, killed_after, _ = annealed
    settings = replace(whole, output_dir=tmp_path / "run", save_steps=1)

    class Killed(BaseException):
        pass

    save = AdapterTrainer._save_checkpoint

    def die(self: AdapterTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == killed_after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "_save_checkpoint", die)
        with pytest.raises(Killed):
            train(settings, report=lambda line: None)
    train(replace(settings, resume=True), report=lambda line: None)
    assert differences(settings.output_dir, whole.output_dir) == []
    assert record.read(settings.output_dir)["cuts"] == record.read(whole.output_dir)["cuts"]


def test_what_a_run_leaves(annealed: Annealed, capsys: pytest.CaptureFixture[str]) -> None:
    settings, _, lines = annealed
    method, run = settings.method, record.read(settings.output_dir)
    assert isinstance(method, Lora)
    assert method.anneal is not None
    assert run["settings"]["anneal"] == method.anneal
    assert run["settings"]["rank"] == method.anneal[-1]
    assert [(cut["step"], cut["to"]) for cut in run["cuts"]] == [*method.cuts(9).items()]
    assert all(0 < cut["kept"] <= 1 for cut in run["cuts"])
    assert sum("cut to" in line for line in lines) == len(run["cuts"])
    results = [EpochResult(**result) for result in run["results"]]
    _print_results([replace(results[1], metric=1.0), *results], settings)
    assert "in epoch 1 " not in capsys.readouterr().out  # which was of a higher rank

    last = settings.output_dir / "checkpoint-9"
    base = AutoModelForSequenceClassification.from_pretrained(settings.model)
    again: Any = PeftModel.from_pretrained(base, last)
    adapter = sum(p.numel() for name, p in again.named_parameters() if "lora_" in name)
    assert run["parameters"]["adapter"] == adapter
    expected = {"r": 2} if method.name == "lora" else {"ranks": {"global": 4, "mid": 2, "layer": 1}}
    assert expected.items() <= json.loads((last / "adapter_config.json").read_text()).items()


@pytest.mark.parametrize("annealed", ["lora", "msplora"], indirect=True)
def test_what_reads_runs_copes_with_ranks_that_change(annealed: Annealed, tmp_path: Path) -> None:
    settings, _, _ = annealed
    run, method = settings.output_dir, settings.method
    spectra = ma.load_spectra(run)
    parts = spectra[spectra["scale"] == ("layer" if method.name == "lora" else "global")]
    ranks = {0: 8, 3: 4, 6: 2, 9: 2} if method.name == "lora" else {0: 16, 3: 16, 6: 4, 9: 4}
    assert parts.groupby("step")["k"].max().to_dict() == ranks

    label = "LoRA r=2 from 8" if method.name == "lora" else "MSPLoRA 4/2/1 from 16"
    (row,) = ma.load_results([str(run)]).to_dict("records")
    assert row["method"] == label
    course = course_of(newest(discover([run]))[0])
    assert course is not None
    assert [when for when, _ in course.points] == [0, 2, 3]  # the first epoch was of a higher rank
    assert ma.advise(run)
    assert [point.adapter.step for point in Run(run).update()] == [*ranks]  # for watch
    if method.name == "msplora":  # the same code draws LoRA's, with fewer figures
        assert "m_eff_over_epochs" in list(ma.draw_figures(run))
        assert "checkpoint-9" in write_report([run], tmp_path / "report.html").read_text()
