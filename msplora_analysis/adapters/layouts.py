"""What training programs leave in a folder: which files are adapters, of which run, step and epoch.

Known are PEFT with Trainer (and what builds on it: TRL, LLaMA-Factory, axolotl, Unsloth), with
``checkpoint-<step>`` folders; torchtune (``epoch_<n>/adapter_model.*``, ``adapter_<n>.pt``); the
diffusers scripts (``checkpoint-<step>/pytorch_lora_weights.safetensors``); kohya's sd-scripts and
LyCORIS (``<name>-<epoch>.safetensors``, ``<name>-step<step>.safetensors``, ``<name>.safetensors``); MLX-LM
(``<step>_adapters.safetensors``). Any other file of tensors is taken whose tensors' names are an adapter's.

Whole checkpoints of a model with PEFT's adapters in it are taken where there is no file of the adapter alone: Trainer's
``model.safetensors``, Lightning's ``epoch=1-step=8.ckpt``, DeepSpeed's ``global_step2/mp_rank_00_model_states.pt``,
PyTorch's distributed ones (``.metadata`` and ``__0_0.distcp``), and verl's ``model_world_size_2_rank_0.pt``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import Folder, Place, is_file, list_folder, natural_key, parts, read_json
from msplora_analysis.files.opening import FULL_NAMES, open_checkpoint, open_tensors
from msplora_analysis.files.several import METADATA
from msplora_analysis.formats import looks_like_adapter
from msplora_core.moments import MOMENTS
from msplora_core.names import CONFIG, STATE, WEIGHTS
from msplora_core.records import SETTINGS, TRAINER_STATE, Schema, fits, shown

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")
# Each in order of preference, where a folder holds several copies of one adapter or model.
PEFT_NAMES = (WEIGHTS, "adapter_model.bin", "adapter_model.pt")
DIFFUSERS_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# Of MLX-LM, AdapterHub and litgpt: names that say nothing of the run.
_OTHERS = ("adapters.safetensors", "pytorch_adapter.bin", "adapter.safetensors", "lit_model.pth.lora")
# Without the configuration the scale of these is unknown; torchtune's .pt has none for some models.
NEED_CONFIG = PEFT_NAMES[:2]

# Of DeepSpeed; the first of verl's processes stands for all, ``.metadata`` for the parts of a distributed checkpoint.
_STATES = re.compile(r"(?:zero_pp_rank_0+_)?mp_rank_0+_model_states\.pt")
_RANK_0 = re.compile(r"model_world_size_[0-9]{1,5}_rank_0\.pt")
_VERL = "lora_train_meta.json"
_WHOLE = re.compile(
    "|".join((*map(re.escape, (*FULL_NAMES, METADATA, "pytorch_model_fsdp.bin")), _STATES.pattern, _RANK_0.pattern))
)
_LIGHTNING = re.compile(r"(?:(.+)[-_])?epoch=([0-9]{1,18})-step=([0-9]{1,18})(?:-v[0-9]+)?")
_INSIDE = ("pytorch_model", "pytorch_model_fsdp_0", "lora_adapter")  # folders of a checkpoint: no runs of their own
_CHECKPOINT = re.compile(r"(checkpoint|ckpt|global_step|step|iteration|iter|epoch)[-_]?([0-9]{1,18})")
_NUMBERED = re.compile(r"adapter_([0-9]{1,18})\.pt")
_KOHYA = re.compile(r"(.+)-(?:step([0-9]{8})|([0-9]{6}))")
_MLX = re.compile(r"([0-9]{1,18})_adapters")
# Never adapters: not looked into.
_OTHER = re.compile(
    r"model(-[0-9]+-of-[0-9]+)?\.safetensors|(diffusion_)?pytorch_model(_fsdp)?\b.*|optim.*|scheduler.*|scaler.*"
    r"|rng_state.*|training_args.*|recipe_state.*|(bf16_|fp16_)?(zero_pp|mp)_rank_.*|(model|extra_state)_world_size_.*|\..*"
)
_FACTORS = re.compile(r"\.(lora_|adapter)")
_PROMISING = re.compile("adapter|lora", re.IGNORECASE)
_FEW = 4  # names that a message shows


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
    copies = [name for name in NEED_CONFIG if name in files]
    if len(copies) > 1:
        _check_copies(place / copies[0], place / copies[1])
    found = [peft] if peft else []
    found += [name for name in DIFFUSERS_NAMES if name in files][:1]
    numbered = sorted(filter(_NUMBERED.fullmatch, files), key=natural_key)
    if not (peft and _CHECKPOINT.fullmatch(place.name)):  # there it is a copy in torchtune's own spelling
        found += numbered
    for name in sorted(files.difference(PEFT_NAMES, DIFFUSERS_NAMES, numbered, [MOMENTS]), key=natural_key):
        if name.endswith(WEIGHTS_SUFFIXES) and not _OTHER.fullmatch(name) and _looks_like_adapter(place / name):
            found.append(name)
    if not found:
        found = _whole(folder)
    if CONFIG in files and not found and not _whole_inside(folder):
        raise _no_weights(folder)
    if full and not found:
        found = [name for name in FULL_NAMES if name in files][:1]
    return [place / name for name in found]


def is_whole(file: Place) -> bool:
    """Whether a file, by its name, is of a whole checkpoint, which may stand beside a file of its adapter alone."""
    return _WHOLE.fullmatch(file.name) is not None


def without_copies(files: list[Place]) -> list[Place]:
    """The files but those of whole checkpoints whose adapter stands in a file of its own: beside, or around theirs."""
    if not any(map(is_whole, files)):
        return files
    alone = {str(file.parent) for file in files if not is_whole(file)}
    return [
        file
        for file in files
        if not is_whole(file)
        or alone.isdisjoint((str(file.parent), str(file.parent.parent), str(file.parent / "lora_adapter")))
    ]


def check_states(file: Place) -> None:
    """Raise AnalysisError if DeepSpeed has spread a model over several files, of which this is one."""
    if not _STATES.fullmatch(file.name):
        return
    if file.name.startswith("zero"):
        raise AnalysisError(
            f"{file}: ZeRO 3 leaves each process a part of every tensor; run zero_to_fp32.py, which DeepSpeed wrote "
            "beside the folder, and give what it writes"
        )
    other = re.sub("rank_(0*)0_model", r"rank_\g<1>1_model", file.name)
    if (file.parent / other).is_file():
        raise AnalysisError(
            f"{file}: {other} beside it has other parts of the tensors; gather them into one file first"
        )


def _whole(folder: Folder) -> list[str]:
    """The whole checkpoint in a folder, if an adapter's tensors are in it."""
    for name in sorted(folder.files, key=natural_key):
        if _WHOLE.fullmatch(name):
            try:
                with open_checkpoint(folder.place / name) as tensors:
                    if any(_FACTORS.search(key) for key in tensors.shapes) and looks_like_adapter(tensors.shapes):
                        return [name]
            except AnalysisError:
                if CONFIG in folder.files or _VERL in folder.files or name == METADATA:
                    raise
    return []


def _whole_inside(folder: Folder) -> bool:
    """Whether a folder of a checkpoint holds the weights, as DeepSpeed and accelerate have it."""
    return any(name in _INSIDE or _checkpoint(folder.place / name) for name in folder.folders)


def config_of(file: Place) -> Place | None:
    """The configuration of a file of weights: beside it; of a whole checkpoint also in the folder around."""
    beside = file.parent / CONFIG
    if is_file(beside):
        return beside
    around = file.parent.parent / CONFIG
    return around if is_whole(file) and is_file(around) else None


def config_of_verl(file: Place) -> dict[str, Any]:
    """What verl leaves in place of adapter_config.json: ``r`` and ``lora_alpha``; empty without it."""
    place = file.parent / _VERL
    if not _RANK_0.fullmatch(file.name) or not place.is_file():
        return {}
    about = read_json(place)
    return {"peft_type": "LORA"} | {key: about[key] for key in ("r", "lora_alpha") if key in about}


def config_of_opendelta(file: Place) -> dict[str, Any]:
    """The config.json that OpenDelta leaves beside pytorch_model.bin; empty where it is that of a model."""
    place = file.parent / "config.json"
    if file.name != "pytorch_model.bin" or not is_file(place):
        return {}
    about = read_json(place)
    return about if "delta_type" in about else {}


def missing_config(file: Place) -> AnalysisError:
    return AnalysisError(f"{file}: no {CONFIG} beside it; copy it there")


def _no_weights(folder: Folder) -> AnalysisError:
    """The error of a configuration alone: what stands beside it may be the weights under a name that says nothing."""
    config = folder.place / CONFIG
    others = sorted(folder.files - {CONFIG}, key=natural_key)
    expected = f"no weights of an adapter beside it; expected {' or '.join(NEED_CONFIG)}"
    if lost := dangling(folder.place):
        return AnalysisError(
            f"{config}: {expected}; {lost[0]} is a link to a file that is not there: download it again"
        )
    if not others:
        return AnalysisError(f"{config}: {expected}; the folder has no other file: copy the weights there")
    shown_names = ", ".join(others[:_FEW]) + (", ..." if len(others) > _FEW else "")
    return AnalysisError(f"{config}: {expected}; beside it: {shown_names}; copy the weights there, or rename them")


def dangling(folder: Place) -> list[str]:
    """The links of a local folder that lead nowhere, such as those of a download that was cut off."""
    if not isinstance(folder, Path):
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_symlink() and not entry.exists())


def _check_copies(first: Place, second: Place) -> None:
    """Raise AnalysisError if two files of one adapter, in two types of file, are not the same."""
    try:
        with open_tensors(first) as one, open_tensors(second) as other:
            same = one.shapes == other.shapes and (
                not isinstance(first, Path)  # from afar, reading both may take minutes
                or all(np.array_equal(one.read(name), other.read(name), equal_nan=True) for name in one.shapes)
            )
    except AnalysisError:  # a copy that cannot be read is none; of the first it is said where it is opened
        return
    if not same:
        raise AnalysisError(f"{first}: {second.name} beside it has other tensors; keep the one that is meant")


def describe(file: Place) -> Saved:
    """Run, step and epoch of a file, from the names of its folders, trainer_state.json, and its own name."""
    folder = checkpoint = file.parent
    path = parts(folder)
    run, own_folder = path, folder.name
    step: int | None = None
    epoch: int | float | None = None
    # The checkpoint is the file's folder, or the one above it: PEFT saves an adapter that is not called "default" in a
    # folder of its own. DeepSpeed has a global_step<n> in a checkpoint-<n>.
    matches = [_checkpoint(folder), _checkpoint(folder.parent)]
    for up, found in enumerate(matches, 1):
        if found:
            run = path[:-up]
            if found[1] == "epoch":
                epoch = int(found[2])
            elif step is None:
                step = int(found[2])
    match = any(matches)
    if matches[1]:
        checkpoint = folder.parent
        if not matches[0] and own_folder not in _INSIDE:
            run = (*run, own_folder)
    name_step, name_epoch, own = _from_name(file)
    step = name_step if step is None else step
    epoch = name_epoch if epoch is None else epoch

    state = (checkpoint if match else folder) / STATE
    # Beside checkpoints, the state of a run's folder is that of its end: it belongs to the last of them.
    if own is None and is_file(state) and (match or not _has_checkpoints(folder)):
        content = read_json(state, TRAINER_STATE)
        known = _number(state, content, "epoch")
        epoch = epoch if known is None else known
        if step is None:
            steps = _number(state, content, "global_step")
            step = None if steps is None else int(steps)
    return Saved(file, run if own is None else (*run, own), step, epoch)


def _from_name(file: Place) -> tuple[int | None, int | None, str | None]:
    """Step and epoch that a file's own name tells, and the name of its run where several may share the folder."""
    if file.name in (*PEFT_NAMES, *DIFFUSERS_NAMES, *_OTHERS) or is_whole(file):
        return None, None, None
    if match := _NUMBERED.fullmatch(file.name):
        return None, int(match[1]), None
    if match := _LIGHTNING.fullmatch(file.stem):
        return int(match[3]), int(match[2]), match[1]
    if match := _MLX.fullmatch(file.stem):
        return int(match[1]), None, None
    if match := _KOHYA.fullmatch(file.stem):
        return int(match[2]) if match[2] else None, int(match[3]) if match[3] else None, match[1]
    return None, None, file.stem


def _checkpoint(folder: Place) -> re.Match[str] | None:
    """What the name of a folder says of step (or epoch) and its number; None if it is no checkpoint's.

    A number alone is one where numbers of its length begin with zeros: 0500 beside 1000.
    """
    name = folder.name
    if name.isascii() and name.isdigit() and len(name) > 1:
        beside = [name] if name[0] == "0" or not isinstance(folder, Path) else list_folder(folder.parent).folders
        if any(len(other) == len(name) and other.isdigit() and other[0] == "0" for other in beside):
            return re.fullmatch("()([0-9]{1,18})", name)
    return _CHECKPOINT.fullmatch(name)


def _has_checkpoints(folder: Place) -> bool:
    return any(_checkpoint(folder / name) for name in list_folder(folder).folders)


def _looks_like_adapter(file: Place) -> bool:
    """Whether a file has an adapter's tensors. Of other files than safetensors many are no tensors at all."""
    try:
        with open_tensors(file) as tensors:
            return looks_like_adapter(tensors.shapes)
    except AnalysisError:
        if file.suffix == ".safetensors" or _PROMISING.search(file.name):
            raise
        return False


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
