"""Which of the rows that a module sees are tokens of the examples, and of which: padding counts nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from msplora_core.data.instructions import IGNORED
from msplora_core.errors import TrainingError

Batch = Mapping[str, torch.Tensor]


class Tokens:
    """The tokens of one batch: of the examples, and for an encoder-decoder model of their targets too.

    Args:
        batch: As the model takes it, after :func:`prepared`.
        targets: (examples, length) where the decoder's inputs are no padding; None for a model without a decoder.

    Attributes:
        examples: How many there are.
        masks: (examples, length) bool of each kind of tokens, by its length.
    """

    def __init__(self, batch: Batch, targets: torch.Tensor | None = None) -> None:
        self.examples = len(next(iter(batch.values())))
        own = _mask(batch, "attention_mask", "input_ids", "inputs_embeds")
        self.masks = {mask.shape[1]: mask.bool() for mask in (targets, own) if mask is not None}
        self._counts = {length: int(mask.sum()) for length, mask in self.masks.items()}
        self._padding = {
            length: None if self._counts[length] == mask.numel() else ~mask[..., None]
            for length, mask in self.masks.items()
        }

    def count(self) -> int:
        """How many tokens are no padding."""
        return sum(self._counts.values())

    def by_example(self, name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """What a module saw, as (examples, length, features); what of it is padding; how many rows are none.

        Args:
            name: The module's, for the error.
            rows: (examples, length, features), (examples · length, features), or (examples, features) of a module that
                sees one vector an example, such as a pooler.

        Raises:
            TrainingError: nobody can tell which row is of which example.
        """
        *shape, features = rows.shape
        for length, padding in self._padding.items():
            if shape in ([self.examples, length], [self.examples * length]):
                return rows.reshape(self.examples, length, features), padding, self._counts[length]
        if shape == [self.examples] or (shape[:1] == [self.examples] and len(shape) == 2 and not self.masks):
            return rows.reshape(self.examples, -1, features), None, rows.numel() // features
        tokens = f"{' or '.join(map(str, self.masks)) or 'n'} tokens"
        raise TrainingError(
            f"{name}: sees {tuple(shape)} rows where the batch has {self.examples} examples of {tokens}: nobody can "
            "tell which example a row is of; leave the module out of the adapter, or try batches of one example"
        )


def prepared(batch: Batch, model: Any) -> tuple[dict[str, torch.Tensor], Tokens]:
    """A batch as the model takes it to give its outputs, on its device, and the tokens in it.

    Targets of an encoder-decoder model become the decoder's inputs. Its two kinds of tokens get different lengths, by
    one more column of padding if need be: a module's kind is told by them.

    Args:
        batch: Tensors by the names of the model's arguments, labels among them or not.
        model: The base model.

    Raises:
        TrainingError: a decoder's inputs are missing.
    """
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = inputs.pop("labels", None)
    if not inputs:
        raise TrainingError("batches: expected dictionaries of tensors, with what the model takes; found none")
    if not getattr(model.config, "is_encoder_decoder", False):
        return inputs, Tokens(inputs)
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        if labels is None or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise TrainingError(
                "batches: an encoder-decoder model needs 'decoder_input_ids' or 'labels' in each of them"
            )
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    targets = _mask(inputs, "decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds")
    assert targets is not None
    if "decoder_attention_mask" not in inputs and labels is not None and labels.shape == targets.shape:
        targets = labels != IGNORED
    own = _mask(inputs, "attention_mask", "input_ids", "inputs_embeds")
    if own is not None and own.shape[1] == targets.shape[1]:
        if "input_ids" not in inputs:
            raise TrainingError("batches: inputs and targets of one length cannot be told apart; pad the inputs by one")
        inputs["attention_mask"] = pad(own.long(), (0, 1))
        inputs["input_ids"] = pad(inputs["input_ids"], (0, 1), value=model.config.pad_token_id or 0)
    return inputs, Tokens(inputs, targets)


def _mask(batch: Batch, mask: str, ids: str, embeddings: str) -> torch.Tensor | None:
    """The mask of a kind of tokens; without one all count; None where the batch has no such tokens."""
    if mask in batch:
        return batch[mask] != 0
    if ids in batch:
        return torch.ones_like(batch[ids], dtype=torch.bool)
    if embeddings in batch:
        return torch.ones(batch[embeddings].shape[:2], dtype=torch.bool, device=batch[embeddings].device)
    return None
