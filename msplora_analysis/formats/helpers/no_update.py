"""PEFT methods whose files hold no low-rank weight update, and why.

A method is here if it changes no weight, changes it by something else than a sum of low-rank
products, changes it as the input says, or if its update needs the base model.
"""

from __future__ import annotations

_PROMPT = "it learns virtual tokens, and changes no weight"
_ORTHOGONAL = "it multiplies the base weight by an orthogonal matrix; the update needs the base model"
_SUBSPACE = "it trains inside a singular value decomposition of the base weight; the update needs the base model"
_CONVERT = "; peft.save_as_lora, of a model with the adapter loaded, writes the nearest LoRA of a rank"
_SPARSE = "it changes single entries of the weight, at positions anywhere; the update is not of low rank"

REASONS = {
    "ADAMSS": _SUBSPACE,
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "it learns biases, and changes no weight matrix",
    "BITFIT": "it learns biases, and a bias is a vector: no weight matrix changes",
    "BOFT": _ORTHOGONAL,
    "BOTTLENECK": "its adapters are small networks behind a layer, not linear: they make no update of its weight",
    "CARTRIDGE": "it learns a prefix of keys and values, and changes no weight",
    "CPT": _PROMPT,
    "DEFT": "it takes a projection of the base weight out of it; the update needs the base model",
    "FROD": _SUBSPACE,
    "GLORA": "its update has a product with the base weight; it needs the base model",
    "HRA": _ORTHOGONAL,
    "LN_TUNING": "it trains the layer norms, and changes no weight matrix",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _ORTHOGONAL,
    "OSF": _SUBSPACE,
    "PEANUT": "its update is a small network of the base weight; it needs the base model",
    "POLY": "it mixes several low-rank updates as the task says; there is no one update",
    "PREFIX_TUNING": "it learns a prefix of keys and values, and changes no weight",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _SUBSPACE + _CONVERT,
    "P_TUNING": _PROMPT,
    "ROAD": "it rotates and scales pairs of activations; the update is the base weight with rotated rows",
    "SHADOW": "it runs a small network beside the model, and changes no weight",
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "TINYLORA": _SUBSPACE + _CONVERT,
    "TRAINABLE_TOKENS": "it trains single rows of the embedding, and has no low-rank factors",
    "UNILORA": f"its factors are entries of one vector, at positions drawn anew for the base's sizes{_CONVERT}",
    "WAVEFT": f"its update is sparse in wavelets, whose positions are not in the file{_CONVERT}",
    "XLORA": "it mixes several adapters as the input says; there is no one update",
}
