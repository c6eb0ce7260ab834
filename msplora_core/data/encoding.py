"""From rows of text to what a model takes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from msplora_core.data.instructions import IGNORED, Encoded, encode_instructions
from msplora_core.data.loading import Split
from msplora_core.data.tasks import InstructionTask, Task


def encode(split: Split, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise without padding, as the task wants it: batches are padded to their own longest example.

    Raises:
        TrainingError: an instruction task whose prompts leave no room for any response.
    """
    if isinstance(task, InstructionTask):
        return encode_instructions(split.rows, tokenizer, max_length, split.source)
    return Encoded(tokenize(split, task, tokenizer, max_length))


def tokenize(split: Split, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Tokenise the texts of a classification task; longer ones lose their end."""
    columns = [[row[column] for row in split.rows] for column in task.text_columns]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [
        {**{name: values[i] for name, values in encoded.items()}, "labels": row["label"]}
        for i, row in enumerate(split.rows)
    ]


def collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What makes a batch of encoded examples, padded to the longest of them."""
    # The bare function: given the collator itself, Trainer would copy the tokenizer into every checkpoint.
    if not isinstance(task, InstructionTask):
        return DataCollatorWithPadding(tokenizer).__call__
    tokenizer.padding_side = "right"  # positions then count from the first token, not from the padding
    multiple = 8 if torch.cuda.is_available() else None  # the size that tensor cores want
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=multiple).__call__
