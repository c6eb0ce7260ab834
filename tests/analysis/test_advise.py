"""Advice on adapters whose tasks are known: from hand-made moments, ablations and records."""

import json
import os
import shlex

import numpy as np
import pandas as pd
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from moment_cases import Tokens, lora_factors, module_moments, random_tokens, update_of, write_moments
from test_task_weighted import msplora_case

import msplora_analysis as ma
from msplora_analysis.ask.advice.advise import KL
from msplora_analysis.cli import app
from msplora_core.moments import Moments

NAMES = ("layer.0.query", "layer.1.query")
R = 4


def answer(advice, question):
    """The answer to the question that begins so."""
    return next(one for one in advice.answers if one.question.startswith(question))


def write_lora(folder, **changes):
    tensors = lora_tensors(*NAMES, rank=R)
    config = lora_config(r=R, lora_alpha=2 * R, target_modules=["query"], **changes)
    return write_adapter(folder, tensors, config), lora_factors(tensors)


def lost_kl(factors, tokens, k):
    """½ mean over examples of (Σ over modules and tokens of g · (ΔW − ΔW_k) x)², by dense matrices."""
    change = 0
    for name, of in tokens.items():
        update = update_of(factors[name])
        u, sigma, vt = np.linalg.svd(of.weighted(update))
        kept = np.linalg.solve(of.root_out(), u[:, :k] * sigma[:k] @ vt[:k]) @ np.linalg.inv(of.root_in())
        change = change + np.einsum("eti,ij,etj->e", of.g, update - kept, of.x)
    return 0.5 * np.mean(change**2)


@pytest.fixture
def measured(tmp_path):
    """An adapter of rank 4 that may be cut to rank 2, for 0.9 of the nats allowed; its factors and tokens."""
    folder, factors = write_lora(tmp_path / "run" / "checkpoint-10")
    tokens = {name: random_tokens(5, 6, seed=i) for i, name in enumerate(NAMES)}
    size = (0.9 * KL / lost_kl(factors, tokens, 2)) ** 0.5
    tokens = {name: Tokens(of.x, of.g * size) for name, of in tokens.items()}
    write_moments(folder, factors, tokens)
    return folder, factors, tokens


def test_the_rank_is_the_least_whose_predicted_kl_is_small(measured):
    folder, factors, tokens = measured
    (advice,) = ma.advise(folder)
    assert advice.rank == answer(advice, "What rank").value == 2
    assert "--rank 2" in answer(advice, "What rank").command
    assert answer(advice, "Train anew").value is False
    table = advice.ranks.set_index("rank")
    assert list(table.index) == [1, 2, 3, 4]
    for rank in (1, 2, 3):
        assert table["predicted_kl"][rank] == pytest.approx(lost_kl(factors, tokens, rank), rel=1e-3)
        assert table["parameters"][rank] == 2 * rank * (5 + 6)
    values = [np.linalg.svd(update_of(factors[name]), compute_uv=False) ** 2 for name in NAMES]
    assert table["energy"][1] == pytest.approx(sum(v[0] for v in values) / sum(v.sum() for v in values), rel=1e-5)


def test_weights_alone_leave_the_rank_open_and_say_what_would_tell(tmp_path, monkeypatch):
    folder, _ = write_lora(tmp_path / "run" / "checkpoint-10")
    monkeypatch.chdir(tmp_path)
    (advice,) = ma.advise(folder)
    assert advice.rank is None
    assert answer(advice, "What rank").command == "msplora-measure moments run/checkpoint-10"
    assert advice.ranks["predicted_kl"].isna().all()


def test_without_its_head_a_classifier_is_not_measured(tmp_path):
    classifier = lora_config(target_modules=["query"], task_type="SEQ_CLS")
    head = {"base_model.model.classifier.weight": np.ones((2, 6), dtype=np.float32)}
    for tensors in (lora_tensors(*NAMES), lora_tensors(*NAMES) | head):
        (advice,) = ma.advise(write_adapter(tmp_path / str(len(tensors)), tensors, classifier))
        has_head = "base_model.model.classifier.weight" in tensors
        assert (answer(advice, "What rank").command is not None) == has_head
        assert ("its head was not saved" in answer(advice, "What rank").evidence) != has_head


def test_diagnose_gives_the_same_answers(measured, capsys):
    folder, _, _ = measured
    said = []
    for command in ("advise", "diagnose"):
        with pytest.raises(SystemExit):
            app([command, str(folder), "--json"])
        said.append(json.loads(capsys.readouterr().out)["advice"])
    assert said[0] == said[1]


def test_commands_have_paths_that_a_shell_takes(tmp_path, monkeypatch):
    folder, _ = write_lora(tmp_path / "my run" / "checkpoint-10")
    deep = tmp_path.joinpath(*"folders" * 10)  # from where the absolute path is the shorter one
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    (advice,) = ma.advise(folder)
    assert answer(advice, "What rank").command == f"msplora-measure moments '{folder}'"
    monkeypatch.chdir(tmp_path)
    (advice,) = ma.advise(folder)
    assert answer(advice, "What rank").command == "msplora-measure moments 'my run/checkpoint-10'"


def test_an_adapter_of_zeros_learned_nothing(tmp_path):
    tensors = lora_tensors(*NAMES)
    zeros = {name: value * (".lora_A." in name) for name, value in tensors.items()}
    (advice,) = ma.advise(write_adapter(tmp_path / "run", zeros))
    assert [one.value for one in advice.answers] == [False]


def ablation(*rows):
    columns = ["cut", "what", "rank", "parameters", "metric", "metric_change", "low", "high", "kl", "predicted_kl"]
    return pd.DataFrame([("none", "", None, 88, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0), *rows], columns=columns).astype(
        {"rank": "Int64"}
    )


def test_a_measured_metric_goes_before_a_prediction(measured):
    folder, _, _ = measured
    cuts = [("rank_task", "", 1, 22, 0.7, -0.1, -0.2, -0.05, 0.3, 0.2)]
    cuts += [("rank_task", "", 2, 44, 0.75, -0.05, -0.1, -0.01, 0.02, 0.01)]
    cuts += [("rank_task", "", 3, 66, 0.795, -0.005, -0.02, 0.01, 0.001, 0.001)]
    ablation(*cuts).to_csv(folder / "ablation.csv", index=False)
    (advice,) = ma.advise(folder)
    assert advice.rank == 3
    assert "Measured" in answer(advice, "What rank").sure
    assert advice.ranks.set_index("rank")["metric"].to_dict() == {1: 0.7, 2: 0.75, 3: 0.795, 4: 0.8}


def test_an_ablation_of_other_weights_is_left_out_with_a_warning(measured):
    folder, _, _ = measured
    ablation(("rank_task", "", 1, 22, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0)).to_csv(folder / "ablation.csv", index=False)
    (folder / "ablation.json").write_text(json.dumps({"run": "run", "step": 10, "weights_sha256": "0" * 64}))
    with pytest.warns(UserWarning, match=r"ablation\.csv"):
        (advice,) = ma.advise(folder)
    assert advice.rank == 2
    assert advice.ranks["metric"].isna().all()


@pytest.mark.parametrize(("last", "expected"), [(0.80, 5), (0.795, 5), (0.75, 3)])
def test_the_last_checkpoint_unless_another_is_clearly_better(tmp_path, last, expected):
    folder, _ = write_lora(tmp_path / "run" / "checkpoint-10")
    log = [{"epoch": e, "eval_accuracy": v} for e, v in enumerate([0.5, 0.7, 0.75, 0.8, 0.79, last])]
    state = {"epoch": 5, "global_step": 10, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (advice,) = ma.advise(folder)
    assert answer(advice, "Which checkpoint").value == expected


def test_a_scale_that_moves_no_output_does_not_earn_its_parameters(tmp_path):
    factors, tokens = msplora_case(tmp_path / "run")
    modules = {name: module_moments(pairs, tokens[name]) for name, pairs in factors.items()}
    for module in modules.values():
        scores = np.array(module.scores["plain"])
        scores[:, module.part("global")] = 0
        module.scores["scale_plain"] = module.scores["scale_task"] = scores
    Moments(modules, {"examples": 40, "draws": 1}).save(tmp_path / "run" / "moments.safetensors")
    (advice,) = ma.advise(tmp_path / "run")
    assert answer(advice, "Which scales").value == ["global"]
    assert advice.scales.set_index("scale")["predicted_kl"]["global"] == 0


def test_strange_names_and_records_of_other_programs_are_no_failure(tmp_path):
    folder, _ = write_lora(tmp_path / os.fsdecode(b"caf\xe9; rm x") / "checkpoint-1")
    results = [{"epoch": epoch, "metric": 0.1} for epoch in (0, 1)]
    (folder / "run.json").write_text(json.dumps({"metric": {"name": 7, "greater_is_better": True}, "results": results}))
    with pytest.raises(SystemExit) as end:
        app(["advise", str(folder), "--out", str(tmp_path / "out")])
    assert not end.value.code
    (found,) = json.loads((tmp_path / "out" / "advice.json").read_text())["advice"]
    assert "caf\\udce9" in found["file"]
    commands = [shlex.split(one["command"]) for one in found["answers"] if one["command"]]
    assert commands  # each takes the path as one word, for they are copied into a shell
    assert all(any("caf" in word and word.endswith("checkpoint-1") for word in words) for words in commands)


def test_the_command_prints_answers_or_json_and_writes_files(measured, tmp_path, capsys):
    folder, _, _ = measured
    with pytest.raises(SystemExit) as end:
        app(["advise", str(folder), "--json", "--out", str(tmp_path / "out")])
    assert not end.value.code
    (found,) = json.loads(capsys.readouterr().out)["advice"]
    assert found["rank"] == 2
    assert {"question", "answer", "evidence", "sure", "command", "value"} == set(found["answers"][0])
    assert json.loads((tmp_path / "out" / "advice.json").read_text())["advice"] == [found]
    assert list(pd.read_csv(tmp_path / "out" / "ranks.csv")["rank"]) == [1, 2, 3, 4]
    with pytest.raises(SystemExit):
        app(["advise", str(folder)])
    assert "2 of 4" in capsys.readouterr().out
