"""Instruction tuning: the prompt, its tokens, labels on the response alone, and rows held out for validation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msplora_core.data.tasks import Row
from msplora_core.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learnt, as torch's cross-entropy has it."""

# The prompt of Stanford Alpaca (tatsu-lab/stanford_alpaca, Apache-2.0), with the line break before the response
# that the code released with the MSPLoRA paper has. Adapters compare only under the same prompt.
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt(row: Row) -> str:
    """What the model reads before it responds, of the row's ``instruction`` and ``input`` (which may be empty)."""
    template = _PROMPT_WITH_INPUT if row["input"] else _PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row["input"])


@dataclass(frozen=True)
class Encoded:
    """Examples as a model takes them, and what ``max_length`` cost of instructions.

    Args:
        examples: Each with ``input_ids``, ``attention_mask`` and ``labels``.
        cut: Number of examples whose response lost its end.
        dropped: Number of rows whose prompt leaves no room for a response.
    """

    examples: list[dict[str, Any]]
    cut: int = 0
    dropped: int = 0

    def loss(self) -> str | None:
        """What was lost, in words; None if nothing was."""
        counts = {
            "rows dropped, whose prompts leave no room for a response": self.dropped,
            "responses cut at their end": self.cut,
        }
        return " and ".join(f"{count} {what}" for what, count in counts.items() if count) or None


def encode_instructions(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str) -> Encoded:
    """Tokens of prompt, response and end of text; labels of response and end of text alone.

    Prompt and response are tokenised apart, so that no token reaches over the boundary, and the response is
    learnt after the very tokens that the prompt alone gives when the model is used. The end of text is
    part of the response, unless the response is cut.

    Raises:
        TrainingError: the tokenizer has no end of text, or no row has room for a response.
    """
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer of '{tokenizer.name_or_path}' has no end-of-text token (eos_token)")
    # A tokenizer with a beginning of text puts it before any text, the empty one too; one with another frame
    # ([CLS] .. [SEP]) is none of a causal model.
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    beginning = [tokenizer.bos_token_id] if begins else []
    prompts = _tokens([prompt(row) for row in rows], tokenizer)
    responses = _tokens([row["output"] for row in rows], tokenizer)
    examples, cut = [], 0
    for prompt_ids, response_ids in zip(prompts, responses, strict=True):
        before = beginning + prompt_ids
        learnt = [*response_ids, tokenizer.eos_token_id]
        room = max_length - len(before)
        if room < 1:
            continue
        cut += len(learnt) > room
        learnt = learnt[:room]
        examples.append(
            {
                "input_ids": before + learnt,
                "attention_mask": [1] * (len(before) + len(learnt)),
                "labels": [IGNORED] * len(before) + learnt,
            }
        )
    if not examples:
        raise TrainingError(
            f"{source}: max_length={max_length} leaves no room for a response in any of {len(rows)} rows; raise "
            f"it above {min(map(len, prompts)) + len(beginning)} tokens, the shortest prompt"
        )
    return Encoded(examples, cut, dropped=len(rows) - len(examples))


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: prompts above the model's own limit are cut or dropped here
    encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
    return encoded["input_ids"]


def hold_out(rows: list[Row], fraction: float, most: int) -> tuple[list[Row], list[Row]]:
    """Part rows into training and validation, the same way on every machine and for every seed.

    Chosen are the prompts with the smallest SHA-256, so neither the order of the rows nor a library's
    generator matters, rows of the same prompt stay together, and a smaller part of the data holds out
    much the same rows.

    Args:
        fraction: Part of the rows to hold out, at least one row; ``most`` is the limit.

    Returns:
        Training rows and held-out rows, each in the order given.
    """
    digests = [hashlib.sha256(prompt(row).encode()).digest() for row in rows]
    count = max(1, min(most, round(fraction * len(rows))))
    last = sorted(digests)[count - 1]
    return (
        [row for row, digest in zip(rows, digests, strict=True) if digest > last],
        [row for row, digest in zip(rows, digests, strict=True) if digest <= last],
    )
