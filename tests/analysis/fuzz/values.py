"""Values that are likely to hurt, and texts and bytes that hold them."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = [0, 1, 2, 3, 4, 8, -1, 1.5, 1e300, float("nan"), float("inf"), 2**31, 2**53, 2**62, 2**63, 2**64, 10**250]
NUMBERS += [10**400]
_PLAIN = r"""a F32 F16 BF16 I64 F4 none all NaN =1+1 @x -1 LORA MSPLORA LOHA LOKR ADALORA VERA VBLORA DELORA GRALORA OFT
    IA3 RANDLORA ( .* query layer.0.query __metadata__ global $x$ $\frac{ <script> {{x}} a|b `x` %s cola lora msplora
    perplexity accuracy [a-z]{1,5} (a+)+b ^layer.0.query$ \1 (.*)*x (?=a) [bold] [/bold] ../x base_model.model. ](x)"""
TEXTS = [*_PLAIN.split(), "", "\n", "\0", "\x1b[1m", "\u202egpj", "é" * 50, "x" * 5000]
WORDS = [*TEXTS, "\ud800"]  # half of a character, which JSON can say and no file can hold
KEYS = ["r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "ranks", "use_rslora", "bias", "use_dora"]
KEYS += ["modules_to_save", "target_modules", "mid_groups", "dtype", "shape", "data_offsets", "__metadata__", "alpha"]
KEYS += ["lora_bias", "trainable_token_indices", "rank", "module_dropout", "fan_in_fan_out", "layers_to_transform"]
KEYS += ["epoch", "step", "loss", "eval_loss", "log_history", "settings", "results", "metric", "task", "seed", "method"]
PARTS = ["lora_A", "lora_B", "lora_down", "lora_up", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1"]
PARTS += ["lokr_w2", "lokr_w1_a", "lokr_t2", "msplora_global.A", "msplora_layer.B", "lora_embedding_A", "oft_blocks"]
PARTS += ["lora_magnitude_vector", "alpha", "diff", "lora_E", "vera_lambda_b", "lora_a", "lora_b", "weight", "bias"]
BYTES = [b"0", b"-", b"9" * 30, b"[", b"{", b'"', b"\x00", b"\xff", b"\\ud800", b"e9", b"\x1b[1m", b"[" * 3000, b"="]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice([*WORDS, *KEYS])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice([*KEYS, *WORDS])): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate_json(rng: random.Random, node: Any, keys: list[str]) -> Any:
    """One change somewhere in ``node``."""
    inside = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    if not inside or rng.random() < 0.1:
        if isinstance(node, int) and not isinstance(node, bool) and rng.random() < 0.7:
            return node + rng.choice([-8, -4, -1, 1, 4, 8, 24])
        return value(rng)
    at = rng.choice(list(inside))
    change = rng.random()
    if change < 0.1:
        del node[at]
    elif change < 0.3 and isinstance(node, dict):
        node[rng.choice([*keys, *WORDS, *KEYS])] = value(rng) if change < 0.2 else node[at]
    elif change < 0.5 and isinstance(node, dict):  # another name
        new = at.replace(rng.choice(PARTS), rng.choice(PARTS)) + rng.choice(
            ["", "", "x", ".", ".weight", *WORDS[:5], "F32", "none"]
        )
        node[new] = node.pop(at)
    else:
        node[at] = mutate_json(rng, node[at], keys)
    return node


def mutate_bytes(rng: random.Random, content: bytes, limit: int | None = None) -> bytes:
    """A few bytes changed, inserted or cut out within the first ``limit``."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(limit or len(damaged), len(damaged)) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            damaged[at:at] = rng.choice(BYTES)
        elif kind == 2:
            del damaged[at : at + rng.choice([1, 2, 8, 50])]
        else:
            del damaged[at if rng.random() < 0.1 else len(damaged) :]
    return bytes(damaged)


def mutated_text(rng: random.Random, content: bytes, keys: list[str]) -> bytes:
    """JSON with other values, or with other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    node = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        node = mutate_json(rng, node, keys)
    if rng.random() < 0.02:
        return b'{"a":' * rng.choice([60, 900, 20_000]) + b"1" + b"}" * rng.choice([60, 900, 20_000])
    return json.dumps(node).encode()
