"""The folder of an ablation: its table, what it is of, and what each example gave, so that a second call goes on."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msplora_core import records
from msplora_core.atomic import replacing
from msplora_core.errors import TrainingError
from msplora_core.measure.ablation import DRAWS, Ablation, Measured, measure, summed_up
from msplora_core.measure.cuts import Bases, Cut, standard_cuts
from msplora_core.measure.updates import updates_of
from msplora_core.moments import MOMENTS, read_moments
from msplora_core.names import ABLATION, WEIGHTS
from msplora_core.run.checkpoints import CHECKPOINT
from msplora_core.version import __version__

if TYPE_CHECKING:
    from msplora_core.measure.loading import Subject

FORMATS = ("parquet", "csv")
_EXAMPLES = f"{ABLATION}.npz"
_OFTEN = 10.0
"""Seconds between two writings of what is measured so far."""


def ablate_to(
    out: Path,
    subject: Subject,
    *,
    ranks: Sequence[int] = (1, 2, 4),
    format: str = "parquet",
    batch_size: int | None = None,
    say: Callable[[str], object] = print,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Measure all standard cuts of an adapter on the validation examples, and write their table.

    ``ablation.<format>`` is the table of :meth:`Ablation.table`, ``ablation.json`` says what it is of, and
    ``ablation.npz`` keeps what every example gave. A call that was stopped goes on from there.

    Args:
        out: The folder; it is made.
        subject: Model, adapter and data.
        ranks: What every module is cut to; by the task-weighted spectrum too if moments are beside the adapter.
        format: ``parquet`` or ``csv``.
        batch_size: Examples computed at once.
        say: Called with a line for the user.
        progress: Called with the passes done and all there are.

    Returns:
        The path of the table.

    Raises:
        TrainingError: the adapter cannot be measured, its moments are not its own, or the options are wrong.
        OSError: a file cannot be written.
    """
    if format not in FORMATS:
        raise TrainingError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    path = subject.adapter / MOMENTS
    moments = read_moments(path) if path.is_file() else None
    try:
        bases = Bases(updates_of(subject.model), moments)
    except TrainingError as error:
        raise TrainingError(f"{path if moments else subject.adapter}: {error}") from None
    cuts = standard_cuts(bases.updates, ranks, task=moments is not None)
    batches = subject.batches("validation", batch_size=batch_size, by_length=True)
    about = {
        **_place(subject.adapter),
        **subject.about("validation"),
        "metric": subject.task.metric,
        "greater_is_better": subject.task.greater_is_better,
        "max_length": subject.max_length,
        "weights_sha256": _sha256(subject.adapter / WEIGHTS),
        "base_sha256": subject.source.fingerprint(),
        "moments_sha256": _sha256(path) if moments else None,
        "ranks": list(ranks),
        "bootstrap": {"confidence": 0.95, "draws": DRAWS, "seed": 0},
        "examples": sum(len(batch["labels"]) for batch in batches),
        "batch_size": len(batches[0]["labels"]),
        "version": __version__,
    }
    out.mkdir(parents=True, exist_ok=True)
    parts = _known(out / _EXAMPLES, about, len(batches), say)
    found = _measured(out / _EXAMPLES, about, subject.model, batches, cuts, bases, parts, progress)
    table = found.table(subject.task.metric)
    with replacing(out / f"{ABLATION}.{format}") as beside:
        if format == "csv":
            table.to_csv(beside, index=False, lineterminator="\n")
        else:
            table.to_parquet(beside, index=False)
    with replacing(out / f"{ABLATION}.json") as beside:
        beside.write_text(records.text_of(about) + "\n", encoding="utf-8")
    return out / f"{ABLATION}.{format}"


def _measured(
    file: Path,
    about: Mapping[str, Any],
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    cuts: Sequence[Cut],
    bases: Bases,
    parts: list[Measured],
    progress: Callable[[int, int], object],
) -> Ablation:
    """Measure what is missing of the batches; what is done is in the file by the end, whatever ends it."""
    passes, total = len(parts) * len(cuts), len(batches) * len(cuts)

    def passed() -> None:
        nonlocal passes
        passes += 1
        progress(passes, total)

    progress(passes, total)
    written, at = len(parts), time.monotonic()
    try:
        for part in measure(model, batches[len(parts) :], cuts, bases, progress=passed):
            parts.append(part)
            if time.monotonic() - at > _OFTEN:
                _keep(file, about, parts)
                written, at = len(parts), time.monotonic()
    finally:
        if len(parts) > written:
            _keep(file, about, parts)
    return summed_up(cuts, bases, parts)


def _keep(file: Path, about: Mapping[str, Any], parts: Sequence[Measured]) -> None:
    arrays = {f"{name}/{i}": array for i, part in enumerate(parts) for name, array in part._asdict().items()}
    with replacing(file) as beside, beside.open("wb") as stream:
        np.savez(stream, about=np.array(_identity(about)), **arrays)


# What numpy and zipfile raise for files that are damaged, RuntimeError for those that claim to be encrypted.
_BROKEN: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, AttributeError, TypeError, EOFError)
_BROKEN += (MemoryError, NotImplementedError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)


def _known(file: Path, about: Mapping[str, Any], batches: int, say: Callable[[str], object]) -> list[Measured]:
    """The batches that an earlier call of the same measurement has left."""
    if not file.is_file():
        return []
    try:
        with np.load(file, allow_pickle=False) as stored:
            if (then := str(stored["about"])) != _identity(about):
                before = records.parse(then.encode())
                changed = ", ".join(
                    name for name, value in json.loads(_identity(about)).items() if before.get(name) != value
                )
                say(f"{file}: of another measurement ({changed} changed); all is measured anew")
                return []
            count = sum(name.startswith("kl/") for name in stored.files)
            parts = [Measured(*(stored[f"{name}/{i}"] for name in Measured._fields)) for i in range(count)]
    except _BROKEN as error:
        say(f"{file}: cannot be read ({type(error).__name__}); all is measured anew")
        return []
    if count:
        say(f"{file}: has {count} of {batches} batches; these are not measured again")
    return parts


def _identity(about: Mapping[str, Any]) -> str:
    """What must be the same for a measurement to go on; not where the files are."""
    data = {**about["data"], "source": None}
    return json.dumps({**about, "data": data, "run": None, "step": None, "bootstrap": None}, sort_keys=True)


def _place(adapter: Path) -> dict[str, Any]:
    """The run and step that an adapter's folder tells."""
    folder = adapter.resolve()
    step = CHECKPOINT.fullmatch(folder.name)
    return {"run": folder.parent.name, "step": int(step[1])} if step else {"run": folder.name, "step": None}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
