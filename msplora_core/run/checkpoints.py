"""Checkpoints that are whole or not there: written aside, flushed, then renamed; checked before resuming."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msplora_core import names, records
from msplora_core.atomic import flush, flush_all, not_written
from msplora_core.errors import TrainingError, reason_of

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
METHOD_STATE = "method_state.pt"
"""What a method whose adapter file is not what training continues from keeps beside it."""
# What Trainer needs to continue from a checkpoint; kept in the newest one only, as it is far larger than the adapter.
_RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "running_loss*.json", METHOD_STATE)


def publish(folder: Path, target: Path) -> None:
    """Give a finished folder its final name, at once; survives a power cut, not only a kill."""
    flush_all(folder)
    discard(target)
    os.rename(folder, target)
    flush(target.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill leaves nothing half deleted under its name."""
    if folder.exists():
        aside = folder.parent / names.PARTIAL / f"{folder.name}.old"
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def remove_partial(output_dir: Path) -> list[str]:
    """Remove what a killed run was writing or deleting; returns the names."""
    partial = output_dir / names.PARTIAL
    left = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else []
    shutil.rmtree(partial, ignore_errors=True)
    for path in output_dir.glob(f".{names.RECORD}.*.tmp"):
        path.unlink(missing_ok=True)
    return left


def drop_resume_files(folder: Path) -> None:
    """Drop what only resuming needs, once a newer checkpoint is whole."""
    for path in _resume_files(folder):
        path.unlink(missing_ok=True)


def _resume_files(folder: Path) -> list[Path]:
    return [path for pattern in _RESUME_FILES for path in folder.glob(pattern)]


def all_in(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, the newest first."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can continue from, and a sentence on every newer one that is not whole.

    Older epochs keep the adapter alone; they are no fault, and nothing to continue from.
    """
    notes: list[str] = []
    for step, folder in all_in(output_dir).items():
        reason = fault(folder)
        if reason is None:
            return folder, notes
        if step > 0 and (not notes or _resume_files(folder)):
            notes.append(f"{folder} is not whole ({reason})")
    return None, notes


def fault(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or damaged, and how; None if the run can continue from it."""
    whole_model = (folder / "config.json").is_file()  # of full fine-tuning
    model = ["config.json"] if whole_model else [names.CONFIG, names.WEIGHTS]
    needed = [folder / name for name in (*model, names.STATE, "optimizer.pt", "scheduler.pt")]
    if whole_model:
        needed += sorted(folder.glob("model*.safetensors*")) or [folder / "model.safetensors"]
    needed += sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    needed += [path for path in (folder / METHOD_STATE, folder / "scaler.pt") if path.exists()]
    for path in needed:
        if not path.is_file():
            return f"{path.name} is missing"
        if reason := _damage(path):
            return f"{path.name} is damaged or cut off: {reason}"
    return None


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Tell of a failure to write to ``folder``.

    Raises:
        TrainingError: it names the file, the reason, and how to go on.
    """
    try:
        yield
    except Exception as error:
        failure = not_written(error, folder)
        if failure is None:
            raise
        files = [path for path in folder.rglob("*") if path.is_file()]
        file = max(files, key=lambda path: path.stat().st_mtime_ns, default=folder)
        raise TrainingError(
            f"{file}: cannot be written ({failure.strerror}); make room there and continue with resume=True: "
            "the checkpoints of earlier epochs are whole"
        ) from error


@contextmanager
def continuing(folder: Path) -> Iterator[None]:
    """Tell of a failure to continue from the files of a checkpoint.

    Raises:
        TrainingError: it names the folder, the reason, and how to go on.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except (TrainingError, OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of PyTorch, pickle, zip, or of the optimizer that is given something else
        raise TrainingError(
            f"{folder}: training cannot continue from it ({reason_of(error)}); delete it to continue from an earlier "
            "checkpoint, or start anew with overwrite=True"
        ) from error


def _damage(path: Path) -> str | None:
    """What is wrong with a file, if anything; None for one that is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.name == names.STATE:
            from transformers import TrainerState

            unknown = records.read(path, records.RESUMED_STATE).keys() - TrainerState.__dataclass_fields__.keys()
            if unknown:
                raise records.RecordError(f"{records.shown(min(unknown))} is not known to this Trainer")
        elif path.suffix == ".json":  # also the index of a model in several files
            records.read(path, {})
        elif path.suffix == ".safetensors":
            with safe_open(path, "np"):  # compares the file's length with its header
                pass
        else:
            with zipfile.ZipFile(path) as archive:  # as torch.save writes it, with a checksum of every tensor
                if damaged := archive.testzip():
                    return f"of {records.shown(damaged)}"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return reason_of(error)
    return None
