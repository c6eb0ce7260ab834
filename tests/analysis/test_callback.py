"""SpectraCallback in real trainings: what it logs is what the saved files say, wherever Trainer logs to."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import msplora_analysis as ma
from msplora_analysis import SpectraCallback
from msplora_analysis.live.measures import adapter_values
from msplora_analysis.live.model import ModelTensors, active_adapters
from msplora_core import MSPLoraConfig

torch.set_num_threads(1)

TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
EVERYTHING = {"effective_rank", "m_eff_1", "m_eff_4", "frobenius"}


def make_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    )


def fill(model: nn.Module, seed: int = 1) -> None:
    """Values for every factor, as training would give; nothing but zeros leaves little to compare."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".modules_to_save." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def examples(n: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (n, 7), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(tokens)]


def train(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments = {
        "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    } | options  # fmt: skip
    trainer = Trainer(
        model=model, args=TrainingArguments(str(folder), **arguments), train_dataset=examples(),
        eval_dataset=examples(), callbacks=list(callbacks),
    )  # fmt: skip
    for callback in callbacks:
        if isinstance(callback, SpectraCallback):
            callback.add_to(trainer)
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    """Step -> the spectra in the entry of Trainer's history."""
    return {
        entry["step"]: found
        for entry in trainer.state.log_history
        if (found := {name: value for name, value in entry.items() if name.startswith("spectra/")})
    }


def values_of(model: nn.Module, **how: Any) -> dict[str, float]:
    (adapter,) = active_adapters(model)
    found, unknown = adapter_values(adapter.tensors, adapter.config, **how)
    assert unknown == []
    return found


def from_files(model: Any, folder: Path) -> dict[str, float]:
    """The same values from the saved adapter, by the tables."""
    model.save_pretrained(folder)
    metrics = ma.load_metrics(folder)
    found = {}
    for scale, rows in metrics.groupby("scale"):
        for name in EVERYTHING:
            if rows[name].notna().any():
                found[f"spectra/{scale}/{name}"] = rows[name].mean()
    pairs = ma.load_scale_pairs(folder)
    for (first, second), rows in pairs.groupby(["scale_i", "scale_j"]):
        for side in ("in", "out"):
            if rows[f"overlap_{side}"].notna().any():
                found[f"spectra/overlap/{first}-{second}_{side}"] = rows[f"overlap_{side}"].mean()
    return found


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6, abs=1e-9), name


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """A warning of the callback that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SpectraCallback")
        yield


# The values


CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, **TARGETS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"query": 2}, **TARGETS),
    "dora": peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **TARGETS),
    "lokr": peft.LoKrConfig(r=2, **TARGETS),
    "loha": peft.LoHaConfig(r=2, **TARGETS),
    "vera": peft.VeraConfig(r=4, **TARGETS),
    "msplora": MSPLoraConfig(r=8, **TARGETS),
    "msplora, two scales": MSPLoraConfig(ranks={"global": 3, "layer": 5}, use_rslora=True, **TARGETS),
    "msplora, layer alone": MSPLoraConfig(ranks={"layer": 4}, **TARGETS),
}


BFLOAT16 = [(method, torch.bfloat16) for method in ("lora", "msplora")]


@pytest.mark.parametrize(("method", "dtype"), [*((method, torch.float32) for method in CONFIGS), *BFLOAT16], ids=str)
def test_a_model_in_memory_has_the_spectra_of_its_files(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS[method])
    fill(model)
    model.to(dtype)
    found = values_of(model)
    assert_same(found, from_files(model, tmp_path))
    scales = {"msplora": {"global", "mid", "layer", "total", "overlap"}, "msplora, two scales": {"global", "layer", "total", "overlap"}}  # fmt: skip # noqa: E501
    if method in scales:
        assert {name.split("/")[1] for name in found} == scales[method]


def test_by_module_adds_values_of_each_type(tmp_path: Path) -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS["msplora"])
    fill(model)
    plain, found = values_of(model), values_of(model, by_module=True)
    assert plain.items() <= found.items()
    model.save_pretrained(tmp_path)
    rows = ma.load_metrics(tmp_path).query("scale == 'mid' and module == 'value'")
    assert found["spectra/mid/value/effective_rank"] == pytest.approx(rows["effective_rank"].mean(), rel=1e-6)


def test_a_dependent_factor_and_a_zero_row_are_no_trouble() -> None:
    """Where Cholesky fails: two equal rows in A, a zero column in B."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 20)), rng.standard_normal((30, 3))
    a[1], b[:, 2] = a[0], 0
    tensors = {"layer.0.q.lora_A.weight": torch.tensor(a), "layer.0.q.lora_B.weight": torch.tensor(b)}
    found, _ = adapter_values(ModelTensors("x", tensors), {"peft_type": "LORA", "r": 3, "lora_alpha": 6})
    sigma = np.linalg.svd(2 * b @ a, compute_uv=False)
    assert found["spectra/layer/frobenius"] == pytest.approx(np.linalg.norm(sigma), rel=1e-9)
    assert found["spectra/layer/effective_rank"] == pytest.approx(1, abs=1e-5)


def test_what_has_no_value_is_left_out() -> None:
    found = values_of(peft.get_peft_model(make_bert(), CONFIGS["msplora"]))
    assert found == {f"spectra/{scale}/frobenius": 0.0 for scale in ("global", "mid", "layer", "total")}


# In a training


class Recorder(TrainerCallback):
    """An integration: what it is given to log."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_every_integration_and_the_history_get_the_values(tmp_path: Path) -> None:
    before, after = Recorder(), Recorder()
    model = peft.get_peft_model(make_bert(), CONFIGS["msplora"])
    trainer = train(
        model, tmp_path, before, SpectraCallback(budget=None), after, eval_strategy="steps", eval_steps=2,
        eval_on_start=True, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    found = logged(trainer)
    assert list(found) == [2, 4]
    assert_same(found[4], from_files(trainer.model, tmp_path / "now"))
    assert before.logs == after.logs
    with_spectra = [logs for logs in before.logs if "spectra/total/effective_rank" in logs]
    assert [{**found[step], **logs} for step, logs in zip(found, with_spectra, strict=True)] == with_spectra
    assert all("loss" in logs for logs in with_spectra)  # and no log of an evaluation
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert found[4].items() <= next(entry for entry in state["log_history"] if "loss" in entry and entry["step"] == 4).items()  # fmt: skip # noqa: E501
    metrics = trainer.evaluate()
    assert not any(name.startswith("spectra/") for name in metrics)
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert kinds.count("SpectraCallback") == 1
    assert len(kinds) == len(set(kinds)) + 1  # two recorders


def test_tensorboard_shows_the_values(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    trainer = train(model, tmp_path, SpectraCallback(budget=None), report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out.*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    shown = events.Scalars("train/spectra/layer/effective_rank")
    found = logged(trainer)
    assert [event.step for event in shown] == list(found)
    assert shown[-1].value == pytest.approx(found[4]["spectra/layer/effective_rank"], rel=1e-6)


def test_every_asks_trainer_for_logs_of_its_own(tmp_path: Path) -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    trainer = train(model, tmp_path, SpectraCallback(every=3, budget=None), max_steps=7, logging_steps=2)
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [2, 3, 4, 6]
    assert list(logged(trainer)) == [3, 6]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [SpectraCallback(every=1, budget=None)]):
        model = peft.get_peft_model(make_bert(), CONFIGS["msplora"])
        train(model, tmp_path, *callbacks, max_steps=3)
        states.append(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_a_budget_that_is_used_up_skips_logs_and_says_so(tmp_path: Path) -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    with pytest.warns(UserWarning, match="not every log has them") as said:
        trainer = train(model, tmp_path, SpectraCallback(budget=1e-9), logging_steps=1)
    assert list(logged(trainer)) == [1]
    assert len([w for w in said if "SpectraCallback" in str(w.message)]) == 1


def test_several_active_adapters_are_told_apart(tmp_path: Path) -> None:
    # Without the task's head, of which only one can be active.
    model = peft.get_peft_model(make_bert(), peft.LoraConfig(r=8, target_modules=["query"]), adapter_name="first")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["first", "second"])
    trainer = train(model, tmp_path, SpectraCallback(budget=None))
    found = logged(trainer)[4]
    assert {tuple(name.split("/")[:3]) for name in found} == {("spectra", "first", "layer"), ("spectra", "second", "layer")}  # fmt: skip # noqa: E501
    assert found["spectra/second/layer/m_eff_4"] == 1.0 > found["spectra/first/layer/m_eff_1"]
    model.base_model.set_adapter("second")
    assert values_of(model)["spectra/layer/m_eff_4"] == 1.0


def test_adapters_of_transformers_own_models_count_too() -> None:
    model = make_bert()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query"]))
    fill(model)
    assert {name.split("/")[2] for name in values_of(model)} == EVERYTHING


@pytest.mark.slow
def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *"abcdefgh"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", eos_token="[EOS]",
    )  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    before = Recorder()
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **size)),
        args=trl.SFTConfig(
            str(tmp_path), max_steps=2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
            save_strategy="no", learning_rate=1e-2, max_length=16,
        ),
        train_dataset=Dataset.from_dict({"text": ["a b c d", "e f g h"] * 4}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[before],
    )  # fmt: skip
    SpectraCallback(budget=None).add_to(trainer)
    trainer.train()
    found = logged(trainer)
    assert list(found) == [1, 2]
    assert found[2]["spectra/layer/frobenius"] > 0
    assert found[2].items() <= next(logs for logs in before.logs[1:] if "loss" in logs).items()


# What goes wrong


def expect_one_warning(model: nn.Module, folder: Path, match: str) -> None:
    with pytest.warns(UserWarning, match=match) as said:
        trainer = train(model, folder, SpectraCallback(budget=None))
    assert trainer.state.global_step == 4
    assert logged(trainer) == {}
    assert len([w for w in said if "SpectraCallback" in str(w.message)]) == 1


def test_a_model_without_adapter_is_told_and_trained(tmp_path: Path) -> None:
    expect_one_warning(make_bert(), tmp_path, "no PEFT adapter; give Trainer a model that has one")


def test_a_method_without_spectra_is_told_and_trained(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        make_bert(), peft.IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")
    )
    expect_one_warning(model, tmp_path, r"scales the base's weight: its checkpoints can be read with .* --base MODEL$")


def test_nan_is_told_with_its_tensor(tmp_path: Path) -> None:
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "layer.2" in n and "value.lora_B" in n).fill_(float("nan"))

    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    spoil(model)
    with pytest.warns(UserWarning, match=r"adapter default: tensor .*lora_.\.weight holds NaN or Inf"):
        trainer = train(model, tmp_path, SpectraCallback(budget=None))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("mark", "reason"),
    [("ds_id", "DeepSpeed ZeRO-3"), ("placements", "DTensor")],
)
def test_sharded_adapters_are_told_once(mark: str, reason: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    setattr(parameter, mark, 1)
    expect_one_warning(model, tmp_path, f"sharded.*{reason}.*analyse its checkpoints")


def test_an_empty_shard_is_told() -> None:
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
    parameter.data = torch.empty(0)
    with pytest.raises(ma.AnalysisError, match=r"tensor .*lora_A\.weight is empty, so sharded"):
        active_adapters(model)


def test_an_unforeseen_failure_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr("msplora_analysis.live.callback.adapter_values", fail)
    model = peft.get_peft_model(make_bert(), CONFIGS["lora"])
    expect_one_warning(model, tmp_path, r"no spectra are logged: RuntimeError: out of\\nluck$")


def test_other_processes_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("computed")

    callback = SpectraCallback()
    monkeypatch.setattr(callback, "_values", fail)
    arguments, logs = TrainingArguments("unused", use_cpu=True), {"loss": 1.0}
    from transformers.trainer_callback import TrainerControl, TrainerState

    state = TrainerState(is_world_process_zero=False)
    callback.on_log(arguments, state, TrainerControl(), logs=logs, model=None)
    assert logs == {"loss": 1.0}


def test_as_one_callback_of_many_it_says_what_trackers_do_not_get(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    after = Recorder()
    trainer = Trainer(
        model=peft.get_peft_model(make_bert(), CONFIGS["lora"]),
        args=TrainingArguments(
            str(tmp_path), max_steps=1, logging_steps=1, report_to=["tensorboard"], disable_tqdm=True,
            save_strategy="no", use_cpu=True,
        ),
        train_dataset=examples(),
        callbacks=[SpectraCallback(budget=None), after],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"tensorboard .*gets no spectra.*add_to\(trainer\)"):
        trainer.train()
    assert logged(trainer)[1].items() <= next(logs for logs in after.logs if "loss" in logs).items()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every must be"), ({"ks": (0,)}, "every k must be"), ({"budget": 2}, "budget must be")],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ma.AnalysisError, match=message):
        SpectraCallback(**options)


def test_without_transformers_the_class_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import msplora_analysis as ma\n"
        "try: ma.SpectraCallback\n"
        "except ma.AnalysisError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.stdout == (
        "SpectraCallback needs transformers, which is not installed; run `pip install 'msplora[train]'`\n"
    )
