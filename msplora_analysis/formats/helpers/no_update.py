"""PEFT methods whose files hold no low-rank weight update, and why.

A method is here if it changes no weight, changes it by something else than a sum of low-rank
products, changes it as the input says, or if its update needs the base model.
"""

from __future__ import annotations

_PROMPT = "it learns virtual tokens, and changes no weight"
_ORTHOGONAL = "it multiplies the base weight by an orthogonal matrix; the update needs the base model"
_SUBSPACE = "it trains inside a singular value decomposition of the base weight; the update needs the base model"
_SPARSE = "it changes single entries of the weight, at positions anywhere; the update is not of low rank"

REASONS = {
    "ADAMSS": _SUBSPACE,
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "it learns biases, and changes no weight matrix",
    "BITFIT": "it learns biases, and a bias is a vector: no weight matrix changes",
    "BOFT": _ORTHOGONAL,
    "BONE": "its update repeats one small block over the weight, as often as the base model's sizes say",
    "BOTTLENECK": "its adapters are small networks behind a layer, not linear: they make no update of its weight",
    "C3A": "its update is made of circulant blocks; it is not of low rank",
    "CARTRIDGE": "it learns a prefix of keys and values, and changes no weight",
    "CPT": _PROMPT,
    "DEFT": "it takes a projection of the base weight out of it; the update needs the base model",
    "FOURIERFT": "its update is sparse in frequencies, not of low rank, and their positions are not in the file",
    "FROD": _SUBSPACE,
    "GLORA": "its update has a product with the base weight; it needs the base model",
    "HIRA": "its update is the elementwise product of the base weight and B A; it needs the base model",
    "HRA": _ORTHOGONAL,
    "IA3": "it scales activations by vectors; the update is the base weight with scaled rows or columns",
    "LN_TUNING": "it trains the layer norms, and changes no weight matrix",
    "MISS": "its update repeats one small block over the weight, as often as the base model's sizes say",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OFT": _ORTHOGONAL,
    "OSF": _SUBSPACE,
    "PEANUT": "its update is a small network of the base weight; it needs the base model",
    "POLY": "it mixes several low-rank updates as the task says; there is no one update",
    "PREFIX_TUNING": "it learns a prefix of keys and values, and changes no weight",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": _SUBSPACE,
    "P_TUNING": _PROMPT,
    "RANDLORA": "its update sums scaled random bases up to full rank",
    "ROAD": "it rotates and scales pairs of activations; the update is the base weight with rotated rows",
    "SHADOW": "it runs a small network beside the model, and changes no weight",
    "SHIRA": _SPARSE,
    "SUPERTUNING": _SPARSE,
    "TINYLORA": _SUBSPACE,
    "TRAINABLE_TOKENS": "it trains single rows of the embedding, and has no low-rank factors",
    "UNILORA": "its factors are entries of one vector, at positions drawn anew for the sizes of the base model",
    "WAVEFT": "its update is sparse in wavelets, not of low rank, and their positions are not in the file",
    "XLORA": "it mixes several adapters as the input says; there is no one update",
}
