"""lm-evaluation-harness on an exported adapter, against MSPLoRA itself under PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from msplora_analysis.write.concatenate import export
from msplora_core import MSPLoraConfig

from .conftest import make_llama, randomise
from .test_instruction import make_tokenizer

WORDS = ["the", "cat", "dog", "sees", "big", "small", "a", "him", "her", "not", "is", "red"]
WORDS += [f"word{i}" for i in range(58 - len(WORDS))]  # as many as the model has: the harness would shrink it
QUESTIONS = [
    {"context": "the big cat sees", "choices": ["a dog", "not", "him her"], "answer": 0},
    {"context": "a dog is", "choices": ["red", "the cat", "not small"], "answer": 1},
    {"context": "the red dog sees the", "choices": ["cat", "cat is big", "her"], "answer": 2},
    {"context": "is", "choices": ["her", "small", "big big"], "answer": 0},
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "generation": """
output_type: generate_until
generation_kwargs: {until: ["red"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'msplora[eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return lm_eval


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            'test_split: test\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{answer}}"\n' + text.lstrip()
        )
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base model, and an MSPLoRA adapter of it that moves its outputs a lot."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    make_llama(layers=3).save_pretrained(base)
    make_tokenizer(WORDS).save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        MSPLoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=64, task_type="CAUSAL_LM"),
    )
    randomise(model)
    model.save_pretrained(adapter)
    return base, adapter


def log_likelihood(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0]
    log_probabilities = logits.double().log_softmax(-1)
    return sum(log_probabilities[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def generate(model: torch.nn.Module, tokens: list[int], stop: int, most: int) -> list[int]:
    """Greedy decoding, token by token, to the stop token."""
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens + new])).logits[0, -1].argmax())
        if token == stop:
            break
        new.append(token)
    return new


@pytest.mark.slow
def test_harness_on_the_exported_adapter(harness: Any, tasks: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    base, adapter = folders
    export(adapter, tmp_path / "exported")
    results = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "peft": str(tmp_path / "exported"), "dtype": "float32"},
        tasks=["local_choice", "local_generation"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )

    tokenizer = make_tokenizer(WORDS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    samples = {name: {s["doc_id"]: s for s in rows} for name, rows in results["samples"].items()}
    hits, moved = 0, 0.0
    for i, question in enumerate(QUESTIONS):
        context = tokenizer(question["context"])["input_ids"]
        choices = [tokenizer(choice)["input_ids"] for choice in question["choices"]]
        expected = [log_likelihood(model, context, choice) for choice in choices]
        found = [float(response[0]) for response in samples["local_choice"][i]["filtered_resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        moved = max(moved, abs(expected[0] - log_likelihood(plain, context, choices[0])))
        hits += expected.index(max(expected)) == question["answer"]

        red = tokenizer.convert_tokens_to_ids("red")
        text = tokenizer.decode(generate(model, context, red, most=4))
        assert samples["local_generation"][i]["filtered_resps"][0].strip() == text.strip()
    assert moved > 0.1  # without the adapter the numbers are others
    assert results["results"]["local_choice"]["acc,none"] == hits / len(QUESTIONS)
