"""A toy model folder with a tokenizer, and toy data, for runs of the training command that take a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msplora_core.run.settings import Settings, make_settings

from .conftest import make_bert, make_llama

WORDS = ["the", "a", "cat", "dog", "sees", "chases", "him", "her", "big", "small", "not"]


def save_model(folder: Path, kind: str = "bert", **config: Any) -> Path:
    """A toy model with a tokenizer, as a local model folder; ``config`` overrides its configuration."""
    model: Any = make_bert(layers=3) if kind == "bert" else make_llama(layers=4)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[CLS]"
    ).save_pretrained(folder)
    return folder


def save_data(folder: Path, train: int = 21, validation: int = 19) -> Path:
    """CoLA's columns and alpaca's, as many rows as asked for: by default the last batch of 8 is short."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        texts = [" ".join(rng.choice(WORDS, 3 + i % 4)) for i in range(2 * count)]
        rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(texts[:count])]
        (folder / f"cola_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"instruction": a, "input": "", "output": b} for a, b in zip(texts, texts[count:], strict=False)]
        (folder / f"alpaca_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def toy_settings(folder: Path, kind: str = "bert", config: dict[str, Any] | None = None, **options: Any) -> Settings:
    """Settings of a run of a second; the toy model and data are made in ``folder``."""
    if not (folder / "model").exists():
        save_model(folder / "model", kind, **(config or {}))
        save_data(folder / "data")
    chosen = {"task": "cola", "method": "msplora", "epochs": 3, "batch_size": 8, "learning_rate": 1e-2} | options
    output_dir = chosen.pop("output_dir", folder / "run")
    return make_settings(model=str(folder / "model"), data_dir=folder / "data", output_dir=output_dir, **chosen)
