"""The run folder: what may be written to, and the record of everything needed to repeat the run."""

import importlib.metadata
import json
import math
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from msplora_core import records
from msplora_core.atomic import replacing
from msplora_core.data.loading import Split
from msplora_core.data.tasks import get_task
from msplora_core.errors import TrainingError
from msplora_core.models import ModelSource, is_head
from msplora_core.names import LOCK, RECORD, method_label
from msplora_core.options import options_of
from msplora_core.run import checkpoints, distributed, lock
from msplora_core.run.settings import Settings
from msplora_core.version import __version__

_CIRCUMSTANCES = ("processes", "device")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


def check_output_dir(settings: Settings) -> Path | None:
    """Check that the run may be written to its folder, without touching it.

    Returns:
        The newest checkpoint when resuming, None for a fresh start.

    Raises:
        TrainingError: the folder holds something and neither resume nor overwrite was asked for, or the
            run to resume had other settings.
    """
    folder = settings.output_dir
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: is a file; give 'output_dir' a folder")
    if not folder.exists():
        return None
    lock.check_free(folder)
    if settings.overwrite or not any(path.name != LOCK for path in folder.iterdir()):
        return None
    if not settings.resume:
        raise TrainingError(
            f"{folder}: the output folder is not empty; continue its run with resume=True, delete the run in it "
            "with overwrite=True, or give another 'output_dir'"
        )
    newest, _ = checkpoints.newest_whole(folder)
    if (folder / RECORD).is_file():
        recorded = read(folder)["settings"]
        asked = json.loads(json.dumps(settings.what_matters()))
        own = options_of(Settings) | options_of(type(settings.method))
        older = {n: f.default if f.option.unrecorded is None else f.option.unrecorded for n, f in own.items()}
        before = older | recorded  # whatever came after the record is as it was then
        changed = [
            f"{n} {records.shown(before.get(n))} -> {value!r}" for n, value in asked.items() if value != before.get(n)
        ]
        if changed:
            raise TrainingError(
                f"{folder}: the run to resume has other settings ({'; '.join(changed)}); repeat its settings, "
                "or start anew with overwrite=True"
            )
    elif newest is not None:
        raise TrainingError(
            f"{folder / RECORD}: is missing, so that nobody can tell whether {newest.name} had these settings; "
            "put it back, or start anew with overwrite=True"
        )
    return newest


def results_if_finished(settings: Settings) -> list[dict[str, Any]] | None:
    """The results of a run that has come to its end and kept its last checkpoint, when it is to be resumed."""
    folder = settings.output_dir
    if not settings.resume or not (folder / RECORD).is_file():
        return None
    results = read(folder).get("results")
    if not results or checkpoints.fault(folder / f"checkpoint-{results[-1]['step']}"):
        return None
    return results


def make_output_dir(settings: Settings, last_checkpoint: Path | None, until_end: ExitStack) -> list[str]:
    """Make the run folder and hold it; with overwrite, delete the run in it first.

    Args:
        last_checkpoint: What :func:`check_output_dir` found.
        until_end: What is left at the end of the run.

    Returns:
        What the user should know, in sentences: what a killed run had left unfinished there and is removed now.

    Raises:
        TrainingError: another training writes there, or has since the folder was checked.
    """
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    note = until_end.enter_context(lock.held(folder))
    others = [path for path in folder.iterdir() if path.name != LOCK]
    newest = checkpoints.newest_whole(folder)[0] if settings.resume else None
    if newest != last_checkpoint or (others and not settings.resume and not settings.overwrite):
        raise TrainingError(f"{folder}: another training wrote to it just now; give another 'output_dir'")
    if settings.overwrite:  # only what a run writes: the folder may be somebody's home
        for checkpoint in checkpoints.all_in(folder).values():
            checkpoints.discard(checkpoint)
        (folder / RECORD).unlink(missing_ok=True)  # the last, as it tells whose checkpoints there are
    removed = checkpoints.remove_partial(folder)
    notes = [f"{folder}: removed {name}, which a killed run had not finished" for name in removed]
    return [note, *notes] if note else notes


def notes_on_resuming(settings: Settings, run: dict[str, Any]) -> list[str]:
    """What the user should know before a run continues, a sentence each.

    Args:
        run: What :func:`describe_run` says now.

    Raises:
        TrainingError: the data or the model's weights are not those that the run began with.
    """
    folder = settings.output_dir
    if not settings.resume or not (folder / RECORD).is_file():
        return []
    before = read(folder)
    data, weights = before.get("data", {}), before.get("model", {}).get("weights_sha256")
    changed = [
        f"the {name} data ({run['data'][name]['source']})"
        for name in run["data"]
        if data.get(name, {}).get("sha256") != run["data"][name]["sha256"]
    ]
    if weights != run["model"]["weights_sha256"]:
        changed.append(f"the weights of the model ({run['model']['name']})")
    if changed:
        raise TrainingError(
            f"{folder}: {' and '.join(changed)} changed since the run began; bring back what it began with, "
            "or start anew with overwrite=True"
        )
    notes = [f"{note}: passed over" for note in checkpoints.newest_whole(folder)[1]]
    now, then = ({**r.get("versions", {}), **{k: r.get(k) for k in _CIRCUMSTANCES}} for r in (run, before))
    other = [f"{name} {str(then.get(name))[:99]} -> {now[name]}" for name in now if now[name] != then.get(name)]
    if other:
        notes.append(f"other circumstances than the run began with ({', '.join(other)}): results may differ slightly")
    return notes


def describe_run(settings: Settings, source: ModelSource, splits: dict[str, Split], model: Any) -> dict[str, Any]:
    """Everything needed to repeat the run, as JSON values.

    Args:
        model: The model to train; its parameters are counted once each, however many layers share them.
    """
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    task = get_task(settings.task)
    return {
        "settings": settings.what_matters(),
        "metric": {"name": task.metric, "greater_is_better": task.greater_is_better},
        "model": {"name": source.name, "class": type(base_model).__name__, "weights_sha256": source.fingerprint()},
        "parameters": parameters(model),
        "data": {
            name: {"source": split.source, "rows": len(split.rows), "sha256": split.fingerprint}
            for name, split in splits.items()
        },
        "versions": {"msplora": __version__, "python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in _LIBRARIES},
        "processes": distributed.process_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def parameters(model: Any) -> dict[str, int]:
    """How many parameters the adapter, the head and the frozen base have."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if is_head(name))
    # two weights of 4 bits are one number of the quantised tensor
    total = sum(math.prod((getattr(p, "quant_state", None) or p).shape) for p in model.parameters())
    return {
        "adapter": sum(trainable.values()) - head,
        "head": head,
        "base": total - sum(trainable.values()),
    }


def summary(run: dict[str, Any]) -> str:
    """One line about a run: method, model, task, parameter counts."""
    settings, parameters = run["settings"], run["parameters"]
    size = f" (bottleneck {settings['bottleneck']})" if settings["bottleneck"] else ""
    label = method_label(settings["method"], settings["ranks"] or settings["rank"], settings["anneal"])
    return (
        f"{label}{size} on {run['model']['name']}, task {settings['task']} "
        f"({run['data']['train']['rows']} + {run['data']['validation']['rows']} examples), seed {settings['seed']}: "
        f"{parameters['adapter']:,} trained parameters, {parameters['head']:,} in the head, "
        f"{parameters['base']:,} frozen"
    )


def read(folder: Path) -> dict[str, Any]:
    """Read a run's record.

    Raises:
        TrainingError: the record is none of ``msplora-train``.
    """
    path = folder / RECORD
    try:
        record: dict[str, Any] = records.read(path, records.RUN_RECORD)
    except (OSError, records.RecordError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); start anew with overwrite=True") from error
    return record


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write a run's record, whole or not at all.

    Raises:
        TrainingError: it cannot be written, as when the disk is full.
    """
    with checkpoints.told(folder / RECORD), replacing(folder / RECORD, durable=True) as beside:
        beside.write_text(records.text_of(run) + "\n", encoding="utf-8")
