"""What llama.cpp calls the modules of a model, and in which order it keeps their rows.

Names are those of the gguf package. What its converter (``LlamaModel.permute`` in conversion/llama.py) does to the
weights of Llama and its kin, an adapter needs too: within each head, rows i and i + half of queries and keys become
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.base_model import BaseModel, classes_of

# Of transformers' classes, the name of llama.cpp's architecture; those of _PERMUTED have other rows.
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "PhiForCausalLM": "phi2",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    "Olmo2ForCausalLM": "olmo2",
    "CohereForCausalLM": "command-r",
}
_PERMUTED = ("llama", "smollm3", "granite")
# As the converter drops them, of models that see or hear.
_OUTER = (("model.language_model.", "model."), ("language_model.", ""))


class LlamaCpp:
    """A model in llama.cpp's words.

    Args:
        base: The model; its configuration is needed.

    Raises:
        AnalysisError: The configuration is not there, or of an architecture that is not known; or gguf is not
            installed.

    Example:
        >>> LlamaCpp(read_base("SmolLM2-135M")).name("model.layers.0.self_attn.q_proj")
        'blk.0.attn_q'
    """

    def __init__(self, base: BaseModel | None) -> None:
        try:
            import gguf
        except ImportError:
            raise AnalysisError("names of llama.cpp need the package gguf: pip install 'msplora[gguf]'") from None
        if base is None:
            raise AnalysisError("llama.cpp has names of its own: give the folder of the model as base=", "base")
        config: Mapping[str, Any] = base.config
        inner = config.get("text_config")
        text: Mapping[str, Any] = inner if isinstance(inner, dict) else {}
        classes = classes_of(text) or classes_of(config)
        found = next((_ARCHITECTURES[one] for one in classes if one in _ARCHITECTURES), None)
        if found is None:
            what = f"of the classes {classes}" if classes else "without architectures in its config.json"
            raise AnalysisError(
                f"base={base.place}: a model {what}; of llama.cpp's are known those of {', '.join(_ARCHITECTURES)}",
                "base",
            )
        self.architecture, self._base = found, base
        self._config = {**config, **text}
        layers = self._count("num_hidden_layers", "n_layer")
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == found)
        self._map = gguf.get_tensor_name_map(arch, layers)

    def name(self, module: str) -> str:
        """What llama.cpp calls a module."""
        for prefix, inner in _OUTER:
            if module.startswith(prefix):
                module = module.replace(prefix, inner, 1)
                break
        tied = self._config.get("tie_word_embeddings")
        found: str | None = self._map.get_name(module)
        if found is None:
            raise AnalysisError(f"{module}: llama.cpp has no module of this name in {self.architecture}")
        if (found == "output" and tied) or (found == "token_embd" and tied is not False):
            raise AnalysisError(
                f"{module}: the input and output embeddings of the model are one tensor, or config.json does not say "
                "that they are two (tie_word_embeddings): llama.cpp cannot adapt one of them"
            )
        return found

    def modules(self) -> dict[str, str]:
        """The module of each of llama.cpp's names, of the base's own modules.

        Raises:
            AnalysisError: the names of these are not known.
        """
        names = [name for of in self._base.names.values() for name in of]
        if not names:
            raise AnalysisError(
                f"base={self._base.place}: it has no weights, whose names are needed; give the folder with them, or "
                "their index",
                "base",
            )
        found: dict[str, str] = {}
        for name in names:
            inner = next((name.replace(p, i, 1) for p, i in _OUTER if name.startswith(p)), name)
            if (known := self._map.get_name(inner)) is not None:
                found[known] = name
        return found

    def rows(self, name: str, count: int) -> NDArray[np.intp] | None:
        """Which rows of the model's weight ``name`` ("blk.0.attn_q") has in turn; None: they are in one order."""
        kind = name.rpartition(".")[2]
        if self.architecture not in _PERMUTED or kind not in ("attn_q", "attn_k"):
            return None
        heads = self._count("num_attention_heads")
        if kind == "attn_k" and self._config.get("num_key_value_heads"):
            heads = self._count("num_key_value_heads")
        if count % (2 * heads):
            raise AnalysisError(
                f"{name}: {count} rows are no {heads} heads; is base={self._base.place} its model?", "base"
            )
        return np.arange(count).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def _count(self, *keys: str) -> int:
        value = next((self._config[key] for key in keys if key in self._config), None)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**5:
            raise AnalysisError(
                f"base={self._base.place}: {keys[0]} of its config.json is {value!r}; expected a count", "base"
            )
        return value
