"""What training programs leave in a folder: which files are adapters, of which run, step and epoch.

Known are PEFT with Trainer (and what builds on it: TRL, LLaMA-Factory, axolotl, Unsloth), with
``checkpoint-<step>`` folders; torchtune (``epoch_<n>/adapter_model.*``, ``adapter_<n>.pt``); the
diffusers scripts (``checkpoint-<step>/pytorch_lora_weights.safetensors``); kohya's sd-scripts and
LyCORIS (``<name>-<epoch>.safetensors``, ``<name>-step<step>.safetensors``, ``<name>.safetensors``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import Folder, Place, list_folder, natural_key, parts, read_json
from msplora_analysis.files.opening import FULL_NAMES, open_tensors
from msplora_analysis.formats import looks_like_adapter
from msplora_core.moments import MOMENTS
from msplora_core.names import CONFIG, STATE, WEIGHTS
from msplora_core.records import SETTINGS, TRAINER_STATE, Schema, fits, shown

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Each in order of preference, where a folder holds several copies of one adapter or model.
PEFT_NAMES = (WEIGHTS, "adapter_model.bin", "adapter_model.pt")
DIFFUSERS_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Without the configuration the scale of these is unknown; torchtune's .pt has none for some models.
NEED_CONFIG = PEFT_NAMES[:2]

_CHECKPOINT = re.compile(r"(checkpoint|step|epoch)[-_]([0-9]{1,18})")
_NUMBERED = re.compile(r"adapter_([0-9]{1,18})\.pt")
_KOHYA = re.compile(r"(.+)-(?:step([0-9]{8})|([0-9]{6}))")
_MODEL = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors|optimizer.*|\..*")  # never adapters: not looked into


@dataclass(frozen=True)
class Saved:
    """A file of weights, and what its place and the files beside it tell of it.

    Attributes:
        file: The weights.
        run: The names that lead to its run, from the root of the file system.
        step: As the names and the state count it; None where they say nothing.
        epoch: Likewise.
    """

    file: Place
    run: tuple[str, ...]
    step: int | None
    epoch: int | float | None


def adapters_in(folder: Folder, *, full: bool = False) -> list[Place]:
    """The adapters of a folder, each once; with ``full``, of a folder without any the checkpoint of a whole model.

    Raises:
        AnalysisError: An adapter is incomplete.
    """
    place, files, _ = folder
    peft = next((name for name in PEFT_NAMES if name in files), None)
    if peft in NEED_CONFIG and CONFIG not in files:
        raise missing_config(place / peft)
    found = [peft] if peft else []
    found += [name for name in DIFFUSERS_NAMES if name in files][:1]
    if not (peft and _CHECKPOINT.fullmatch(place.name)):  # there it is a copy in torchtune's own spelling
        found += sorted(filter(_NUMBERED.fullmatch, files), key=natural_key)
    for name in sorted(files.difference(PEFT_NAMES, DIFFUSERS_NAMES, [MOMENTS]), key=natural_key):
        if name.endswith(".safetensors") and not _MODEL.fullmatch(name) and _looks_like_adapter(place / name):
            found.append(name)
    if CONFIG in files and not found:
        raise AnalysisError(
            f"{place / CONFIG}: no weights beside it; expected "
            f"{' or '.join(NEED_CONFIG)}; remove the folder if its saving was cut off"
        )
    if full and not found:
        found = [name for name in FULL_NAMES if name in files][:1]
    return [place / name for name in found]


def missing_config(file: Place) -> AnalysisError:
    return AnalysisError(f"{file}: no {CONFIG} beside it; copy it there")


def describe(file: Place) -> Saved:
    """Run, step and epoch of a file, from the names of its folders, trainer_state.json, and its own name."""
    folder = checkpoint = file.parent
    run, match = parts(folder), None
    # The checkpoint is the file's folder, or the one above it: PEFT saves an adapter that is not
    # called "default" in a folder of its own.
    for checkpoint in (folder, folder.parent):
        if match := _CHECKPOINT.fullmatch(checkpoint.name):
            run = (*parts(checkpoint.parent), *parts(folder)[len(parts(checkpoint)) :])
            break
    step = int(match[2]) if match and match[1] != "epoch" else None
    epoch: int | float | None = int(match[2]) if match and match[1] == "epoch" else None
    name_step, name_epoch, own = _from_name(file)
    step = name_step if step is None else step
    epoch = name_epoch if epoch is None else epoch

    state = (checkpoint if match else folder) / STATE
    # Beside checkpoints, the state of a run's folder is that of its end: it belongs to the last of them.
    if own is None and state.is_file() and (match or not _has_checkpoints(folder)):
        content = read_json(state, TRAINER_STATE)
        known = _number(state, content, "epoch")
        epoch = epoch if known is None else known
        if step is None:
            steps = _number(state, content, "global_step")
            step = None if steps is None else int(steps)
    return Saved(file, run if own is None else (*run, own), step, epoch)


def _from_name(file: Place) -> tuple[int | None, int | None, str | None]:
    """Step and epoch that a file's own name tells, and the name of its run where several may share the folder."""
    if file.name in (*PEFT_NAMES, *DIFFUSERS_NAMES, *FULL_NAMES):
        return None, None, None
    if match := _NUMBERED.fullmatch(file.name):
        return None, int(match[1]), None
    if match := _KOHYA.fullmatch(file.stem):
        return int(match[2]) if match[2] else None, int(match[3]) if match[3] else None, match[1]
    return None, None, file.stem


def _has_checkpoints(folder: Place) -> bool:
    return any(map(_CHECKPOINT.fullmatch, list_folder(folder).folders))


def _looks_like_adapter(file: Place) -> bool:
    with open_tensors(file) as tensors:
        return looks_like_adapter(tensors.shapes)


def _number(path: Place, content: dict[str, Any], key: str) -> int | float | None:
    value: int | float | None = content.get(key)
    if value is None:
        return None
    if not abs(value) < 2**63:  # the tables hold whole numbers as int64; NaN compares false
        raise AnalysisError(f"{path}: {key} must be a number, got {shown(value)}")
    return int(value) if value == int(value) else value


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a run was trained with, by its run.json: task, seed, method, ...; without what it does not say.

    The file may be of another program: what does not fit is left out.
    """
    settings = record.get("settings")
    if not isinstance(settings, dict):
        return {}
    kinds = {name.rstrip("?"): kind for name, kind in SETTINGS.items()}
    known = {name: value for name, value in settings.items() if fits(value, kinds.get(name, object))}
    return {name: printable(value) if isinstance(value, str) else value for name, value in known.items()}


def nearest_json(file: Place, name: str, schema: Schema = None) -> dict[str, Any]:
    """The JSON object ``name`` beside a file, or at most two folders above; empty if there is none."""
    folder = file.parent
    for _ in range(3):
        if (folder / name).is_file():
            return read_json(folder / name, schema)
        folder = folder.parent
    return {}
