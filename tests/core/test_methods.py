"""Every training method: its parameters, a run with it, resuming, reloading with PEFT, its spectra."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import msplora_analysis as ma
from msplora_core.errors import TrainingError
from msplora_core.methods import METHODS, Method
from msplora_core.methods.qlora import QLora, keep_quantized
from msplora_core.models import is_head
from msplora_core.run.settings import Settings, make_settings
from msplora_core.train import training

from .conftest import make_bert

WORDS = ["the", "a", "cat", "dog", "sees", "chases", "him", "her", "big", "small", "not"]
STEPS = 6  # an epoch of the toy task has 3
WITHOUT_SPECTRA = {
    "bitfit": "it learns biases",
    "adapterdrop": "its adapters are small networks",
}
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
METHODS_HERE = [
    pytest.param(name, marks=pytest.mark.skipif(name == "qlora" and not HAS_BITSANDBYTES, reason="needs bitsandbytes"))
    for name in METHODS
]


# --- Parameters ---

WIDTH, LAYERS, FEED_FORWARD = 768, 12, 3072  # of RoBERTa-base
PAIR = WIDTH + WIDTH  # a row of A and a column of B of a query or value
BIASES_OF_A_LAYER = 4 * WIDTH + FEED_FORWARD + WIDTH + 2 * WIDTH  # attention, feed-forward, two norms
EMBEDDINGS = (50265 + 514 + 1) * WIDTH
WEIGHTS_OF_A_LAYER = 4 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD + 2 * WIDTH
HEAD = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2

ON_ROBERTA_BASE = {
    # global 8, six mid groups (three for each of query and value) of 4, each of 24 modules 2
    "msplora": ({}, 2 * 8 * PAIR + 6 * 4 * PAIR + 24 * 2 * PAIR, 135_168),
    "lora": ({}, 24 * 8 * PAIR, 294_912),
    "rslora": ({}, 24 * 8 * PAIR, 294_912),
    "dora": ({}, 24 * (8 * PAIR + WIDTH), 313_344),
    "adalora": ({}, 24 * 12 * (PAIR + 1), 442_656),  # 12 = 1.5 * 8 singular values each before pruning
    "dylora": ({}, 24 * 8 * PAIR, 294_912),
    "sora": ({}, 24 * (8 * PAIR + 8), 295_104),
    "pissa": ({}, 24 * 8 * PAIR, 294_912),
    "qlora": ({}, 24 * 8 * PAIR, 294_912),
    "lily": ({}, 2 * (3 + 3) * 32 * WIDTH + 24 * 32 * 3, 297_216),
    "bitfit": ({}, LAYERS * BIASES_OF_A_LAYER + WIDTH, 102_144),
    "adapterdrop": ({}, LAYERS * (2 * WIDTH * 16 + 16 + WIDTH), 304_320),
    "adapterdrop 48": ({"bottleneck": 48}, LAYERS * (2 * WIDTH * 48 + 48 + WIDTH), 894_528),
    "adapterdrop 48, 8 dropped": (
        {"bottleneck": 48, "dropped_layers": 8},
        4 * (2 * WIDTH * 48 + 48 + WIDTH),
        298_176,
    ),
    "fft": ({}, EMBEDDINGS + 2 * WIDTH + LAYERS * (WEIGHTS_OF_A_LAYER + BIASES_OF_A_LAYER), 124_055_040),
}  # fmt: skip


@pytest.mark.parametrize("case", ON_ROBERTA_BASE)
def test_parameters_on_roberta_base(case: str) -> None:
    options, by_hand, count = ON_ROBERTA_BASE[case]
    assert by_hand == count
    settings = make_settings(model="m", task="cola", method=case.split()[0], output_dir=Path("run"), **options)
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        model = settings.method.adapt(RobertaForSequenceClassification(config), "SEQ_CLS")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(count for name, count in trained.items() if is_head(name)) == HEAD
    assert sum(count for name, count in trained.items() if not is_head(name)) == count


def test_every_method_has_its_count() -> None:
    assert {case.split()[0] for case in ON_ROBERTA_BASE} == set(METHODS)


# --- Options ---


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"ranks": {"global": 8}}, "'ranks' is no option of the method lora, .*'rank'.*belongs to msplora"),
        ("fft", {"rank": 8}, "'rank' is no option of the method fft, which takes none .*belongs to .*msplora"),
        ("fft", {"lora_alpha": 8}, "'lora_alpha' is no option of the method fft"),
        ("bitfit", {"target_modules": ["query"]}, "'target_modules' is no option of the method bitfit"),
        ("lora", {"bottleneck": 8}, "'bottleneck' is no option of the method lora.* belongs to adapterdrop"),
        ("msplora", {"rank": 8, "ranks": {"global": 8}}, "'rank' and 'ranks' .* exclude each other"),
        ("adapterdrop", {"bottleneck": 0}, "bottleneck=0: expected a whole number of at least 1"),
        ("adapterdrop", {"dropped_layers": -1}, "dropped_layers=-1: expected a whole number of at least 0"),
        ("lora", {"orthogonality": 0.5}, "'orthogonality' is no option of the method lora.*belongs to adalora"),
        ("adalora", {"orthogonality": -0.1}, "orthogonality=-0.1: expected a number of at least 0"),
        ("nope", {}, "unknown method 'nope'; .*lora, msplora"),
    ],
)
def test_wrong_options(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        make_settings(model="m", task="cola", method=method, output_dir=tmp_path, **options)


def test_defaults(tmp_path: Path) -> None:
    def make(method: str, **options: Any) -> Settings:
        return make_settings(model="m", task="cola", method=method, output_dir=tmp_path, **options)

    assert (make("fft").learning_rate, make("fft").head_learning_rate) == (2e-5, 2e-5)
    assert make("fft", learning_rate=1e-5).head_learning_rate == 1e-5
    assert (make("lora").method.rank, make("lily").method.rank, make("adapterdrop").method.bottleneck) == (8, 32, 16)
    adalora, pissa, lora = make("adalora"), make("pissa"), make("lora")
    assert (adalora.method.lora_alpha, adalora.method.orthogonality, lora.method.lora_alpha) == (32, 0.1, 16)
    assert adalora.method.adapt(make_bert(), "SEQ_CLS").peft_config["default"].orth_reg_weight == 0.1
    assert (pissa.weight_decay, pissa.method.lora_dropout, pissa.method.lora_alpha) == (0, 0, 16)
    assert (lora.weight_decay, lora.method.lora_dropout) == (0.1, 0.05)
    assert make("pissa", lora_dropout=0.1, weight_decay=0.2).method.lora_dropout == 0.1
    assert make("pissa", lora_dropout=0.1, weight_decay=0.2).weight_decay == 0.2
    of_others = make("bitfit").what_matters()  # which run.json has too
    assert (of_others["rank"], of_others["lora_alpha"], of_others["bottleneck"]) == (None, None, None)


def test_qlora_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="qlora needs the package bitsandbytes; run: pip install 'bitsandbytes"):
        QLora().quantization("fp32")


# --- Runs ---


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Trainer collects garbage at its start, again and again among all that was ever imported: half of a toy's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_bert(layers=3).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with a cat, or with a dog."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for split, size in (("train", 24), ("validation", 8)):
        rows = []
        for i in range(size):
            words = generator.choices([word for word in WORDS if word not in ("cat", "dog")], k=4)
            words[i % 4] = ("cat", "dog")[i % 2]
            rows.append({"sentence": " ".join(words), "label": i % 2})
        (folder / f"cola_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(model_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train; gives the model as it was trained, and the results of the epochs."""

    adapt = Method.adapt

    def train(method: str, output_dir: Path, report: Callable[[str], None] = lambda line: None, **options: Any) -> Any:
        models: list[Any] = []

        def spy(self: Method, *args: Any) -> Any:
            models.append(adapt(self, *args))
            return models[-1]

        monkeypatch.setattr(Method, "adapt", spy)
        given = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "head_learning_rate": 1e-2} | options
        settings = make_settings(
            model=str(model_dir), data_dir=data_dir, task="cola", method=method, output_dir=output_dir, **given
        )
        results = training.train(settings, report=report)
        return models[0].eval(), results

    return train


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13).reshape(2, 5)).logits


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


def base_of(model_dir: Path, method: str) -> Any:
    options = {}
    if method == "qlora":
        options["quantization_config"] = QLora().quantization("fp32")
    return keep_quantized(AutoModelForSequenceClassification.from_pretrained(model_dir, **options))


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_run(method: str, run: Callable[..., Any], model_dir: Path, tmp_path: Path) -> None:
    """Two epochs at once, and with a break between: what is trained, what is frozen, what the files hold."""
    model, results = run(method, tmp_path / "whole")
    assert results[0].validation_loss == pytest.approx(math.log(2), abs=0.05)  # of two classes, and of nothing else
    assert results[2].train_loss < results[1].train_loss
    last = tmp_path / "whole" / f"checkpoint-{STEPS}"

    # what is frozen stays, bit for bit, and what is trained moves
    before = dict(base_of(model_dir, method).named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and method != "pissa" and "original_module" not in name:
            bare = name.removeprefix("base_model.model.").replace("base_layer.", "")
            if bare in before:
                assert torch.equal(parameter, before[bare]), name

    first, final = weights(tmp_path / "whole" / "checkpoint-0"), weights(last)
    assert all(first[name].shape != final[name].shape or not torch.equal(first[name], final[name]) for name in final)

    # a run that breaks in its second epoch continues to the same bits
    class Interrupted(Exception):
        pass

    def interrupt(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(method, tmp_path / "broken", report=interrupt)
    assert not (tmp_path / "broken" / f"checkpoint-{STEPS}").exists()
    _, resumed = run(method, tmp_path / "broken", resume=True)
    assert [result.epoch for result in resumed] == [0, 1, 2]
    found = weights(tmp_path / "broken" / f"checkpoint-{STEPS}")
    assert found.keys() == final.keys()
    assert all(torch.equal(found[name], final[name]) for name in final)

    # the file alone gives the same model
    if method == "fft":
        again = AutoModelForSequenceClassification.from_pretrained(last)
    else:
        again = PeftModel.from_pretrained(base_of(model_dir, method), last)
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-4, atol=1e-5)

    # only the newest checkpoint holds what resuming needs
    assert {path.parent.name for path in (tmp_path / "whole").rglob("*.pt")} == {last.name}

    options = {"base": tmp_path / "whole" / "checkpoint-0"} if method == "fft" else {}
    if method in WITHOUT_SPECTRA:
        with pytest.raises(ma.AnalysisError, match=WITHOUT_SPECTRA[method]):
            ma.load_spectra(tmp_path / "whole")
    else:
        spectra = ma.load_spectra(tmp_path / "whole", **options)
        assert set(spectra["step"]) == {0, 3, 6}
        assert (spectra.loc[spectra["step"] == 0, "sigma"] == 0).all()
        compare_with_model(spectra[spectra["step"] == STEPS], model, before, method)


def compare_with_model(spectra: pd.DataFrame, model: Any, base: dict[str, torch.Tensor], method: str) -> None:
    """Singular values in the table beside those of the update of the query weights that the model really makes."""
    for layer in range(3):
        name = f"bert.encoder.layer.{layer}.attention.self.query"
        scale = "total" if method == "msplora" else "layer"
        if method == "lily":  # its router mixes the updates of its experts
            parts = [f"{name}.{expert}" for expert in range(3)]
            assert set(parts) <= set(spectra["name"])
        rows = spectra[(spectra["name"] == (parts[0] if method == "lily" else name)) & (spectra["scale"] == scale)]
        module = model.get_submodule(name if method == "fft" else f"base_model.model.{name}")
        if method == "fft":
            update = module.weight - base[f"{name}.weight"]
        elif method == "pissa":
            update = module.get_base_layer().weight + module.get_delta_weight("default") - base[f"{name}.weight"]
        elif method == "lily":
            a, b = module.lily_A["default"].weight, module.lily_B["default"].weight
            update = module.scaling["default"] * b[: len(a)].T @ a
        else:
            update = module.get_delta_weight("default")
        expected = torch.linalg.svdvals(update.detach().double())[: len(rows)]
        np.testing.assert_allclose(rows["sigma"], expected, rtol=1e-3, atol=2e-6)
        assert expected[0] > 5e-4
