"""Toy models of the real architectures: same module names, a few thousand parameters."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

# Toy matrices: threads would only wait for each other, badly so on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


def make_bert(layers: int = 6) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    ).eval()


def make_roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(
        RobertaConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48, vocab_size=60)
    ).eval()


def make_llama(layers: int = 6) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=60,
        )
    ).eval()


def make_gpt2(layers: int = 6) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=layers, n_head=2, vocab_size=60, n_positions=32)).eval()


def make_t5(layers: int = 6) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_decoder_layers=layers, num_heads=4, vocab_size=60,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip


def make_vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def run_model(model: torch.nn.Module) -> torch.Tensor:
    """Logits on a fixed input of the architecture."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (2, 7), generator=generator)
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "vit":
            return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
        if kind == "t5":
            return model(input_ids=tokens, decoder_input_ids=tokens).logits
        return model(input_ids=tokens).logits


def randomise(model: torch.nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Give the adapter's B factors values, as training would: they start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".{adapter_name}.B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return make_bert()
