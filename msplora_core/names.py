"""Names that training writes and the analysis reads: files of a run folder, scales, tasks, labels of methods.

Both packages import them from here. Nothing heavy is imported.
"""

from collections.abc import Mapping, Sequence

RECORD = "run.json"
"""The record of a run: settings, seed, versions, data, results."""
STATE = "trainer_state.json"
"""The state of Hugging Face Trainer in a checkpoint."""
CONFIG = "adapter_config.json"
"""PEFT's configuration of an adapter."""
WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of an adapter's tensors."""
ABLATION = "ablation"
"""The name, before the dot, of the files of an ablation."""
PARTIAL = ".partial"
"""The folder inside a run folder for what is being written or deleted. Nothing outside it is ever half there."""
LOCK = ".lock"
"""The file inside a run folder that a training holds while it writes there."""

RANK_DECAY = {"global": 1, "mid": 2, "layer": 4}
"""What r is divided by for the rank of each scale: r, r/2, r/4 (arXiv 2503.21838, section 3.2)."""
SCALES = tuple(RANK_DECAY)
"""The scales of MSPLoRA, from the most to the least shared (arXiv 2503.21838, section 3)."""
TOTAL = "total"
"""The whole update of a layer: the sum of its scales."""

METHOD_NAMES = {
    "fft": "Full fine-tuning", "bitfit": "BitFit", "adapterdrop": "AdapterDrop", "lora": "LoRA", "rslora": "rsLoRA",
    "dora": "DoRA", "adalora": "AdaLoRA", "dylora": "DyLoRA", "pissa": "PiSSA", "qlora": "QLoRA", "lily": "Lily",
    "msplora": "MSPLoRA", "sora": "SoRA",
}  # fmt: skip
"""How a method is written in text, where not as in ``--method``; a new one needs no entry."""

TASKS = ("cola", "mrpc", "stsb", "rte", "sst2", "qnli", "acceptability", "alpaca", "qqp", "mnli", "wnli")
"""The tasks that a run may be of; ``msplora-train`` has all but the last three."""


def halved_ranks(r: int) -> dict[str, int]:
    """The rank of each scale by default.

    Args:
        r: Rank of the global scale.

    Returns:
        Scale to rank, in the order of :data:`SCALES`.

    Example:
        >>> halved_ranks(8)
        {'global': 8, 'mid': 4, 'layer': 2}
    """
    return {scale: r // divisor for scale, divisor in RANK_DECAY.items()}


def method_label(
    method: str, ranks: int | str | Mapping[str, int | str] | None = None, anneal: Sequence[int] | None = None
) -> str:
    """A method with its ranks, as a table's row or a figure's legend has it.

    Args:
        method: The method's name in ``--method``.
        ranks: One rank, such as 8 or "2–8", for MSPLoRA its r; or the rank of each scale. None: not told.
        anneal: The ranks that it had one after the other while it was trained, if it had several.

    Example:
        >>> method_label("lora", 8), method_label("msplora", 8), method_label("bitfit")
        ('LoRA r=8', 'MSPLoRA 8/4/2', 'BitFit')
        >>> method_label("lora", 8, [32, 8])
        'LoRA r=8 from 32'
        >>> method_label("msplora", {"global": 8, "mid": "2–4"})
        'MSPLoRA 8/2–4 global+mid'
    """
    if anneal:
        return f"{method_label(method, ranks)} from {anneal[0]}"
    name = METHOD_NAMES.get(method, method)
    if ranks is None:
        return name
    if method == "msplora" and isinstance(ranks, int):
        ranks = halved_ranks(ranks)
    if not isinstance(ranks, Mapping):
        return f"{name} r={ranks}"
    scales = [scale for scale in SCALES if scale in ranks]
    label = f"{name} {'/'.join(str(ranks[scale]) for scale in scales)}"
    return label if len(scales) == len(SCALES) else f"{label} {'+'.join(scales)}"


def printable(text: str) -> str:
    """A text with everything that a terminal may act on written as escapes.

    Such are line breaks, control and direction characters, and lone surrogates.

    Args:
        text: Anything, such as a name in a stranger's file.

    Example:
        >>> print(printable("red: \x1b[31m"))
        red: \\x1b[31m
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
