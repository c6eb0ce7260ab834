"""Which checkpoint, and whether the training learned anything: from records and moments of several checkpoints."""

import json

import numpy as np
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from moment_cases import lora_factors, random_tokens, update_of, write_moments

import msplora_analysis as ma
from msplora_analysis.ask.advice.training import Course

NAMES = ("layer.0.query", "layer.1.query")
LOSSES = [None, 0.60, 0.55, 0.50, 0.45]


def answer(advice, question):
    """The answer to the question that begins so."""
    return next(one for one in advice.answers if one.question.startswith(question))


def write_run(folder, metrics, *, losses=LOSSES, examples=400, task_type="SEQ_CLS", size=1.0, metric="accuracy"):
    """A run of msplora-train that kept every checkpoint, with moments of each; its task-weighted norms."""
    norms = []
    for epoch, _ in enumerate(metrics):
        if epoch == 0:
            continue
        at = folder / f"checkpoint-{10 * epoch}"
        tensors = lora_tensors(*NAMES, rank=2)
        tensors = {name: value * (epoch if ".lora_B." in name else 1) for name, value in tensors.items()}
        write_adapter(at, tensors, lora_config(r=2, lora_alpha=4, target_modules=["query"], task_type=task_type))
        (at / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 10 * epoch}))
        factors = lora_factors(tensors)
        tokens = {name: random_tokens(5, 6, seed=i) for i, name in enumerate(NAMES)}
        tokens = {name: of._replace(g=of.g * size) for name, of in tokens.items()}
        write_moments(at, factors, tokens)
        squares = [np.linalg.norm(tokens[name].weighted(update_of(factors[name]))) ** 2 for name in NAMES]
        norms.append(np.sqrt(sum(squares)))
    results = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": loss if epoch else None,
            "validation_loss": 0.6,
            "metric": of,
        }
        for epoch, (of, loss) in enumerate(zip(metrics, losses, strict=True))
    ]
    record = {"metric": {"name": metric, "greater_is_better": True}, "results": results}
    (folder / "run.json").write_text(json.dumps(record | {"data": {"validation": {"rows": examples, "source": "x"}}}))
    return norms


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(400, 4), (10_000, 3)],  # 0.015 is less than a standard error of 400 examples, and more than one of 10,000
)
def test_chance_decides_how_much_better_another_checkpoint_must_be(tmp_path, examples, expected):
    write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.815, 0.80], examples=examples)
    (advice,) = ma.advise(tmp_path / "run")
    found = answer(advice, "Which checkpoint")
    assert found.value == expected
    assert f"{examples:,} examples" in found.sure
    if expected == 3:
        assert found.command.endswith("checkpoint-30")  # it is kept: all else is asked of it


def test_moments_of_each_checkpoint_say_how_much_still_changed(tmp_path):
    norms = write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80])
    (advice,) = ma.advise(tmp_path / "run")
    evidence = answer(advice, "Which checkpoint").evidence
    assert f"{norms[0]:.3g} (" in evidence
    assert f"{norms[-1]:.3g} (" in evidence
    (tmp_path / "run" / "checkpoint-20" / "moments.safetensors").unlink()  # one may lack them
    (advice,) = ma.advise(tmp_path / "run")
    assert f"{norms[-1]:.3g} (" in answer(advice, "Which checkpoint").evidence


def test_without_a_metric_moments_leave_it_open(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80])
    (tmp_path / "run" / "run.json").unlink()
    (advice,) = ma.advise(tmp_path / "run")
    found = answer(advice, "Which checkpoint")
    assert found.value is None
    assert found.command.startswith("msplora-measure ablate")


def test_an_early_checkpoint_is_told_its_own_metric(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80])
    (advice,) = ma.advise(tmp_path / "run" / "checkpoint-20")
    assert "0.750 now" in answer(advice, "Did it learn").evidence


def test_a_loss_that_does_not_fall_is_no_learning(tmp_path):
    write_run(tmp_path / "run", [0.5] * 5, losses=[None, 0.69, 0.69, 0.68, 0.68])
    (advice,) = ma.advise(tmp_path / "run")
    assert [one.value for one in advice.answers] == [False]
    found = ma.diagnose(tmp_path / "run").set_index("id").loc["barely-learned"]
    assert (found["severity"], found["run"], found["epoch"]) == ("warning", "run", 4)
    assert found["value"] == pytest.approx(1 - 0.68 / 0.69)


def test_outputs_that_do_not_follow_the_labels_are_no_learning(tmp_path):
    losses = [None, 6.1, 2.3, 2.2, 2.1]  # a regression learns the mean at first
    write_run(tmp_path / "run", [0.01, 0.05, 0.15, 0.08, 0.06], losses=losses, metric="pearson")
    found = ma.diagnose(tmp_path / "run").set_index("id").loc["barely-learned"]
    assert (found["value"], found["threshold"]) == (0.06, 0.1)
    write_run(tmp_path / "other", [0.01, 0.05, 0.15, 0.3, 0.4], losses=losses, metric="pearson")
    assert "barely-learned" not in set(ma.diagnose(tmp_path / "other")["id"])


def test_a_language_model_may_start_with_a_low_loss(tmp_path):
    write_run(tmp_path / "run", [0.5] * 5, losses=[None, 0.69, 0.69, 0.68, 0.68], task_type="CAUSAL_LM")
    assert "barely-learned" not in set(ma.diagnose(tmp_path / "run")["id"])


def test_outputs_that_do_not_move_are_no_learning(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80], size=1e-6)
    (advice,) = ma.advise(tmp_path / "run")
    assert answer(advice, "Did it learn").value is False
    assert "barely-learned" in set(ma.diagnose(tmp_path / "run")["id"])


def test_a_run_that_learned_has_no_such_finding(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80])
    assert "barely-learned" not in set(ma.diagnose(tmp_path / "run")["id"])


@pytest.mark.parametrize("metric", ["accuracy", "Matthews correlation", "Pearson correlation"])
def test_a_standard_error_is_about_that_of_resampled_examples(metric):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(400)
    y = 0.6 * x + 0.8 * rng.standard_normal(400)
    if not metric.startswith("Pearson"):
        x, y = x > 0, y > 0
    measure = (lambda x, y: np.mean(x == y)) if metric == "accuracy" else (lambda x, y: np.corrcoef(x, y)[0, 1])
    draws = rng.integers(400, size=(4000, 400))
    spread = np.std([measure(x[rows], y[rows]) for rows in draws])
    course = Course(metric, True, [], examples=400)
    assert course.standard_error(measure(x, y)) == pytest.approx(spread, rel=0.2)
    assert Course("F1", True, [], examples=400).standard_error(0.8) is None


def test_moments_are_a_table_by_module_that_jupyter_shows_in_words(tmp_path):
    norms = write_run(tmp_path / "run", [0.5, 0.7, 0.75, 0.78, 0.80])
    table = ma.load_moments(tmp_path / "run", cache=False)
    assert list(table["name"]) == 4 * list(NAMES)  # of each checkpoint
    totals = table.groupby("epoch")["task_norm"].agg(lambda norms: np.sqrt((norms**2).sum()))
    np.testing.assert_allclose(totals, norms, rtol=1e-4)
    (advice,) = ma.advise(tmp_path / "run")
    last = table[table["epoch"] == 4]
    assert f"about {last['whole_kl'].iloc[0]:.2g} nats" in answer(advice, "Did it learn").evidence
    shown = last._repr_html_()
    assert "40 examples, labels sampled" in shown
    order = last.sort_values("predicted_kl", ascending=False)["name"]
    assert shown.index(order.iloc[0]) < shown.index(order.iloc[1])
    assert "dataframe" in table[["run", "name"]]._repr_html_()  # what pandas shows
    (tmp_path / "run" / "checkpoint-40" / "moments.safetensors").unlink()
    with pytest.raises(ma.AnalysisError, match="msplora-measure moments"):
        ma.load_moments(tmp_path / "run" / "checkpoint-40")
