"""From rows of text to what a model takes."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from msplora_core.data.instructions import Encoded, encode_instructions
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
