"""Instruction tuning: prompts, labels, held-out rows, the loss on responses, whole runs."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler

from msplora_core import models as base_models
from msplora_core.cli import _print_results
from msplora_core.data.encoding import encode
from msplora_core.data.evaluation import metric_function, sum_token_losses
from msplora_core.data.instructions import IGNORED, encode_instructions, hold_out, prompt
from msplora_core.data.loading import load_splits
from msplora_core.data.tasks import TASKS, InstructionTask
from msplora_core.errors import TrainingError
from msplora_core.run.settings import Settings, make_settings
from msplora_core.train.trainer import set_order
from msplora_core.train.training import EpochResult, train

from .conftest import make_bert, make_llama

WORDS = ["say", "name", "a", "the", "cat", "dog", "sees", "big", "small", "Instruction", "Input", "Response"]
ALPACA = TASKS["alpaca"]


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """Words as tokens; padding is the end of text, as in many causal models."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="[UNK]", padding_side="left"
    )


def row(instruction: str, output: str, context: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output}


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")


def rows_to_learn(count: int) -> list[dict[str, str]]:
    """Prompts and responses of many lengths; a response is always the first words of the same sentence."""
    rng = random.Random(0)
    sentence = ["the", "big", "cat", "sees", "a", "small", "dog"]
    return [
        row(f"say {' '.join(rng.choices(WORDS, k=1 + i % 7))} {i}", " ".join(sentence[: 1 + i % 5]))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_llama(layers=3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_data_dir(folder: Path) -> Path:
    write_rows(folder / "alpaca_train.jsonl", rows_to_learn(22))
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return make_data_dir(tmp_path)


def quietly(settings: Settings) -> list[EpochResult]:
    return train(settings, report=lambda line: None)


@pytest.fixture(scope="module")
def make_run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    folder = make_data_dir(tmp_path_factory.mktemp("runs"))

    def make(name: str, **options: Any) -> Settings:
        options = {
            "ranks": {"global": 8, "mid": 4, "layer": 2}, "epochs": 2, "batch_size": 8, "learning_rate": 1e-2,
            "max_length": 33, "save_steps": 2,
        } | options  # fmt: skip
        return make_settings(
            model=str(model_dir), task="alpaca", method="msplora", data_dir=folder, output_dir=folder / name, **options
        )

    return make


@pytest.fixture(scope="module")
def whole_run(make_run: Callable[..., Settings]) -> tuple[Settings, list[EpochResult], list[str]]:
    """A run of two epochs of three steps: its settings, its results, and what it said."""
    lines: list[str] = []
    chosen = make_run("whole")
    return chosen, train(chosen, report=lines.append), lines


def final_adapter(run: Settings) -> dict[str, torch.Tensor]:
    newest = max(run.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- Prompt, tokens and labels ---


def test_prompts() -> None:
    assert prompt(row("Add {x}.", "3", "1 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    assert prompt(row("Sing.", "la")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )


def test_labels_are_the_response_and_the_end_of_text() -> None:
    tokenizer = make_tokenizer()
    example = encode_instructions([row("say cat", "the big dog")], tokenizer, 100, "rows").examples[0]
    response = [tokenizer.convert_tokens_to_ids(word) for word in ("the", "big", "dog", "</s>")]
    before = tokenizer(prompt(row("say cat", "")))["input_ids"]
    assert example["input_ids"] == before + response
    assert example["labels"] == [IGNORED] * len(before) + response
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_no_token_reaches_over_the_boundary_and_the_text_begins_once() -> None:
    response = "ab"
    characters = sorted(set(prompt(row("", ""))) | set(response))
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *characters, "\na"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "a")]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    before = prompt(row("", response))
    assert vocabulary["\na"] in wrapped(before + response)["input_ids"]  # tokenised at once, they do merge
    example = encode_instructions([row("", response)], wrapped, 1000, "rows").examples[0]
    learnt = [vocabulary["a"], vocabulary["b"], vocabulary["</s>"]]
    assert example["input_ids"] == wrapped(before)["input_ids"] + learnt
    assert example["input_ids"].count(vocabulary["<s>"]) == 1
    assert example["labels"] == [IGNORED] * (1 + len(before)) + learnt


def test_max_length_cuts_the_response_and_drops_rows_without_room() -> None:
    tokenizer = make_tokenizer()
    rows = [row("say cat", "the"), row("say cat", "the big dog"), row("say the big small cat", "dog")]
    length = len(tokenizer(prompt(rows[0]))["input_ids"])
    encoded = encode_instructions(rows, tokenizer, length + 2, "rows")
    assert [example["labels"][length:] for example in encoded.examples] == [
        tokenizer.convert_tokens_to_ids(["the", "</s>"]),
        tokenizer.convert_tokens_to_ids(["the", "big"]),  # an end of text here would teach to stop too early
    ]
    assert (encoded.cut, encoded.dropped) == (1, 1)
    assert encoded.loss() == (
        "1 rows dropped, whose prompts leave no room for a response and 1 responses cut at their end"
    )
    assert encode_instructions(rows, tokenizer, 1000, "rows").loss() is None
    with pytest.raises(TrainingError, match=rf"data: max_length=5 leaves no room .* above {length} tokens"):
        encode_instructions(rows, tokenizer, 5, "data")


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TrainingError, match=r"no end-of-text token \(eos_token\)"):
        encode_instructions([row("a", "b")], tokenizer, 100, "rows")


# --- The loss ---


def losses_by_hand(model: torch.nn.Module, examples: list[dict[str, Any]]) -> list[list[float]]:
    """Loss of every response token, each example alone, from log-probabilities in float64."""
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double().numpy()
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(
            [
                -log_probabilities[position - 1, token]
                for position, token in enumerate(example["labels"])
                if token != IGNORED
            ]
        )
    return losses


def test_the_loss_of_a_batch_is_that_of_its_response_tokens() -> None:
    tokenizer, model = make_tokenizer(), make_llama()
    examples = encode_instructions(rows_to_learn(6), tokenizer, 100, "rows").examples
    by_hand = losses_by_hand(model, examples)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=8)
        batch = collator([dict(example) for example in examples])
        # padding is the end of text, but only the true end is seen and learnt
        assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]
        assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1] * len(examples)
        with torch.no_grad():
            output = model(**batch)
        assert output.loss.item() == pytest.approx(np.mean(np.concatenate(by_hand)), rel=1e-5)
        sums = sum_token_losses(output.logits, batch["labels"])
        assert sums[:, 0].tolist() == pytest.approx([sum(losses) for losses in by_hand], rel=1e-5)
        assert sums[:, 1].tolist() == [len(losses) for losses in by_hand]
    perplexity = metric_function(ALPACA)(EvalPrediction(sums.numpy(), None))["perplexity"]
    assert perplexity == pytest.approx(math.exp(np.mean(np.concatenate(by_hand))), rel=1e-5)


# --- Held-out rows ---


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.text(max_size=2)), min_size=1), st.randoms())
def test_held_out_rows(pairs: list[tuple[str, str]], rng: random.Random) -> None:
    rows = [row(instruction, output) for instruction, output in pairs]
    train_rows, held = hold_out(rows, 0.25, most=3)
    keys = lambda part: sorted(map(str, part))  # noqa: E731
    assert keys(train_rows + held) == keys(rows)
    assert not {r["instruction"] for r in train_rows} & {r["instruction"] for r in held}
    assert len(held) >= min(3, max(1, round(0.25 * len(rows))))
    shuffled = rng.sample(rows, len(rows))
    assert keys(hold_out(shuffled, 0.25, most=3)[1]) == keys(held)


def test_without_a_validation_file_a_part_is_held_out_and_named(data_dir: Path) -> None:
    splits = load_splits(ALPACA, data_dir)
    assert [len(splits[name].rows) for name in ("train", "validation")] == [20, 2]
    assert splits["validation"].source.endswith("alpaca_train.jsonl, 2 held out of 22 rows, by the hash of the prompt")
    assert "without 2 held out of 22 rows" in splits["train"].source

    write_rows(data_dir / "alpaca_validation.jsonl", [row("name", "cat")])
    splits = load_splits(ALPACA, data_dir)
    assert [len(splits[name].rows) for name in ("train", "validation")] == [22, 1]
    assert splits["train"].source == str(data_dir / "alpaca_train.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "output": "b"}], "column 'input' is missing; alpaca needs instruction, input, output"),
        ([row("a", "b"), {**row("a", ""), "output": None}], "row 2: 'output' must be text, found None"),
        ([row("a", "b"), row("a", "c")], "a single prompt cannot be parted into training and validation"),
    ],
)
def test_bad_rows(data_dir: Path, rows: list[Any], message: str) -> None:
    write_rows(data_dir / "alpaca_train.jsonl", rows)
    with pytest.raises(TrainingError, match=message):
        load_splits(ALPACA, data_dir)


@pytest.mark.skipif("MSPLORA_TEST_DATA" not in os.environ, reason="needs MSPLORA_TEST_DATA with an Alpaca part")
def test_the_real_alpaca_part() -> None:
    splits = load_splits(ALPACA, Path(os.environ["MSPLORA_TEST_DATA"]) / "glue")
    assert (len(splits["train"].rows), len(splits["validation"].rows)) == (15348, 1705)


# --- Settings and models ---


def test_the_recipe_is_the_released_one(tmp_path: Path) -> None:
    assert isinstance(ALPACA, InstructionTask)
    recipe = ALPACA.recipe
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.micro_batch_size) == (3, 3e-4, 128, 4)
    assert (recipe.max_length, recipe.rank, recipe.lora_alpha, recipe.lora_dropout) == (256, 64, 16, 0.05)
    # 51,760 rows less 2,000 in batches of 128, three epochs: 1,167 steps
    assert recipe.warmup_ratio * 3 * math.ceil((51_760 - 2000) / 128) == pytest.approx(100, abs=1)
    chosen = make_settings(model="m", task="alpaca", method="lora", output_dir=tmp_path, batch_size=6)
    assert (chosen.method.rank, chosen.micro_batch_size) == (64, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3: expected a divisor of batch_size=8"),
        ({"model_dtype": "int8"}, "model_dtype='int8': expected one of float32, bfloat16, float16"),
        ({"model_dtype": "bfloat16"}, "precision='fp32': expected bf16, with model_dtype=bfloat16"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        make_settings(model="m", task="alpaca", method="lora", output_dir=tmp_path, **options)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    make_bert(layers=3).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        TrainingError, match=r"is an encoder \(bert\); instruction tuning needs a causal language model"
    ):
        base_models.load_model(base_models.find_model(str(tmp_path)), ALPACA)


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(TrainingError, match="a GGUF file is quantised already and is expanded on loading"):
        base_models.load_model(base_models.find_model(str(tmp_path)), ALPACA, quantization_config={"any": True})


# --- Order ---


def test_order_follows_from_seed_and_epoch_and_groups_lengths() -> None:
    lengths = [random.Random(i).randrange(1, 100) for i in range(64)]

    def order(seed: int, epoch: int, burn: int = 0) -> list[int]:
        torch.rand(burn)  # what happened before does not matter
        sampler = LengthGroupedSampler(8, lengths=lengths)
        set_order(sampler, seed=seed, epoch=epoch, batch_size=4)
        return list(sampler)

    assert order(0, 1) == order(0, 1, burn=3)
    assert len({tuple(order(0, 0)), tuple(order(0, 1)), tuple(order(5, 0))}) == 3
    assert sorted(order(0, 1)) == list(range(64))

    def spread(indices: list[int]) -> float:
        return float(np.mean([np.ptp([lengths[i] for i in indices[k : k + 4]]) for k in range(0, 64, 4)]))

    assert spread(order(0, 0)) < spread(list(SequentialSampler(lengths))) / 2


# --- Whole runs ---


def test_a_run(whole_run: Any, model_dir: Path) -> None:
    chosen, results, lines = whole_run
    assert [result.step for result in results] == [0, 3, 6]
    assert results[-1].metric < 0.9 * results[0].metric  # it does learn
    run = json.loads((chosen.output_dir / "run.json").read_text())
    assert run["parameters"]["head"] == 0
    said = [line for line in lines if line.startswith(("train:", "validation:"))]
    assert len(said) == 2
    assert all("by the hash of the prompt" in line for line in said)
    splits = load_splits(ALPACA, chosen.data_dir)
    lost = encode(splits["train"], ALPACA, make_tokenizer(), 33)
    assert lost.cut > 0
    assert lost.dropped > 0
    assert (run["data"]["train"]["cut"], run["data"]["train"]["dropped"]) == (lost.cut, lost.dropped)
    assert f"{lost.cut} responses cut" in said[0]

    final = chosen.output_dir / "checkpoint-6"
    assert json.loads((final / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), final).eval()
    held = encode(splits["validation"], ALPACA, make_tokenizer(), 33).examples
    loss = float(np.mean(np.concatenate(losses_by_hand(model, held))))
    assert results[-1].validation_loss == pytest.approx(loss, rel=1e-5)
    assert results[-1].metric == pytest.approx(math.exp(loss), rel=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole_batch(make_run: Any) -> None:
    adapters = []
    for micro in (8, 2):
        chosen = make_run(f"micro-{micro}", micro_batch_size=micro, epochs=1, lora_dropout=0.0, learning_rate=1e-3)
        quietly(chosen)
        adapters.append(final_adapter(chosen))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=2e-5, rtol=1e-3)


def test_resuming_within_an_epoch_gives_the_same_adapter(make_run: Any, whole_run: Any) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(line: str) -> None:
        if line.startswith("epoch 2"):  # after its evaluation, before its checkpoint: back to step 4 of 6
            raise Interrupted

    broken = make_run("broken")
    with pytest.raises(Interrupted):
        train(broken, report=interrupt)
    assert (broken.output_dir / "checkpoint-4").exists()
    torch.rand(7)
    quietly(make_run("broken", resume=True))
    assert same(final_adapter(whole_run[0]), final_adapter(broken))


def test_gradient_checkpointing_changes_nothing_but_memory(make_run: Any, whole_run: Any) -> None:
    recomputed = make_run("recomputed", gradient_checkpointing=True)
    quietly(recomputed)
    assert same(final_adapter(whole_run[0]), final_adapter(recomputed))


def test_a_bfloat16_base_has_a_float32_adapter(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = base_models.load_model
    monkeypatch.setattr(
        "msplora_core.train.training.load_model", lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1]
    )
    chosen = make_run("bfloat16", model_dtype="bfloat16", precision="bf16", epochs=1, gradient_checkpointing=True)
    results = quietly(chosen)
    assert results[-1].metric < results[0].metric
    assert {p.dtype for p in loaded[0][0].parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {tensor.dtype for tensor in final_adapter(chosen).values()} == {torch.float32}


@pytest.mark.parametrize(("task", "best"), [("alpaca", "perplexity 3.5000 in epoch 1"), ("mrpc", "accuracy 9.0000")])
def test_the_best_perplexity_is_the_lowest(
    task: str, best: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [EpochResult(epoch, epoch, None, 1.0, metric) for epoch, metric in enumerate((9.0, 3.5, 4.0))]
    chosen = make_settings(model="m", task=task, method="lora", output_dir=tmp_path)
    _print_results(results, chosen)
    assert f"Best {best}" in capsys.readouterr().out
