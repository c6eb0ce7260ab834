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

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import (
    At,
    Folder,
    Place,
    as_at,
    as_place,
    identity,
    is_file,
    list_folder,
    natural_key,
    parts,
    read_json,
)
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
_ADAPTERHUB = "pytorch_adapter.bin"
_OTHERS = ("adapters.safetensors", _ADAPTERHUB, "adapter.safetensors", "lit_model.pth.lora")
_SAYS_NOTHING = frozenset((*PEFT_NAMES, *DIFFUSERS_NAMES, *_OTHERS))
_NAMED = frozenset((*PEFT_NAMES, *DIFFUSERS_NAMES, MOMENTS))
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


Top = tuple[str, ...]
"""The names that lead to a path that was given."""


class Saved(NamedTuple):
    """A file of weights, and what its place tells of it.

    Attributes:
        at: Where it is.
        path: The names that lead to its folder, from the root of the file system.
        name: Its own.
        run: The names that lead to its run.
        step: As the names count it, else the state; None where they say nothing.
        epoch: As the names count it.
        state: How many folders above it the trainer_state.json stands that tells its epoch; None: there is none.
    """

    at: At
    path: tuple[str, ...]
    name: str
    run: tuple[str, ...]
    step: int | None
    epoch: int | None
    state: int | None


def adapters_in(folder: Folder, *, full: bool = False) -> list[str]:
    """The names of a folder's adapters, each once; with ``full``, of a folder without any that of a whole checkpoint.

    Raises:
        AnalysisError: An adapter is incomplete.
    """
    files = folder.files
    present = [name for name in PEFT_NAMES if name in files]
    peft = present[0] if present else None
    if peft in NEED_CONFIG and CONFIG not in files:
        raise missing_config(folder.file(peft))
    if present[:2] == [*NEED_CONFIG]:
        _check_copies(*map(folder.file, NEED_CONFIG))
    found = present[:1]
    found += [name for name in DIFFUSERS_NAMES if name in files][:1]
    others = [name for name in files if name.endswith(WEIGHTS_SUFFIXES) and name not in _NAMED]
    for name in sorted(others, key=natural_key) if others else ():
        if _NUMBERED.fullmatch(name):
            if not (peft and _CHECKPOINT.fullmatch(folder.parts[-1])):  # there it is a copy in torchtune's own spelling
                found.append(name)
        elif not _OTHER.fullmatch(name) and _looks_like_adapter(folder.file(name)):
            found.append(name)
    if not found:
        found = _whole(folder)
        if CONFIG in files and not found and not _whole_inside(folder):
            raise _no_weights(folder)
        if full and not found:
            found = [name for name in FULL_NAMES if name in files][:1]
    return found


def is_whole(name: str) -> bool:
    """Whether a file of this name is of a whole checkpoint, which may stand beside a file of its adapter alone."""
    return _WHOLE.fullmatch(name) is not None


def without_copies(found: list[tuple[Saved, Top]]) -> list[tuple[Saved, Top]]:
    """Without whole checkpoints whose adapter stands in a file of its own: beside, or around theirs.

    A checkpoint that is itself a path that was given stays.
    """
    whole = [is_whole(saved.name) for saved, _ in found]
    if not any(whole):
        return found
    alone = {saved.path for (saved, _), is_copy in zip(found, whole, strict=True) if not is_copy}
    return [
        (saved, top)
        for (saved, top), may_go in zip(found, whole, strict=True)
        if not may_go
        or top == (*saved.path, saved.name)
        or alone.isdisjoint((saved.path, saved.path[:-1], (*saved.path, "lora_adapter")))
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
                with open_checkpoint(folder.file(name)) as tensors:
                    if any(_FACTORS.search(key) for key in tensors.shapes) and looks_like_adapter(tensors.shapes):
                        return [name]
            except AnalysisError:
                if CONFIG in folder.files or _VERL in folder.files or name == METADATA:
                    raise
    return []


def _whole_inside(folder: Folder) -> bool:
    """Whether a folder of a checkpoint holds the weights, as DeepSpeed and accelerate have it."""
    return any(name in _INSIDE for name in folder.folders) or _has_checkpoints(folder)


def config_of(file: Place) -> Place | None:
    """The configuration of a file of weights: beside it; of a whole checkpoint also in the folder around."""
    beside = file.parent / CONFIG
    if is_file(beside):
        return beside
    around = file.parent.parent / CONFIG
    return around if is_whole(file.name) and is_file(around) else None


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
    config = folder.file(CONFIG)
    if _ADAPTERHUB in folder.files and isinstance(about := read_json(config).get("config"), dict):
        return AnalysisError(
            f"{folder.file(_ADAPTERHUB)}: an adapter of AdapterHub, of architecture "
            f"{about.get('architecture') or 'bottleneck'}: of its methods LoRA alone has low-rank factors of a weight"
        )
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


def describe(folder: Folder, file: str) -> Saved:
    """Run, step and epoch of a file, from the names of its folders and its own; only where they tell no step is
    trainer_state.json read.

    Args:
        folder: Where it is.
        file: Its name.
    """
    path, at = folder.parts, folder.inside(file)
    run = path
    step: int | None = None
    epoch: int | None = None
    # The checkpoint is the file's folder, or the one above it: PEFT saves an adapter that is not called "default" in a
    # folder of its own. DeepSpeed has a global_step<n> in a checkpoint-<n>.
    own_folder, above = _checkpoint(folder, 1), _checkpoint(folder, 2)
    for up, found in enumerate((own_folder, above), 1):
        if found:
            run = path[:-up]
            if found[1] == "epoch":
                epoch = int(found[2])
            elif step is None:
                step = int(found[2])
    if above and not own_folder and path[-1] not in _INSIDE:
        run = (*run, path[-1])
    name_step, name_epoch, own = _from_name(file)
    step = name_step if step is None else step
    epoch = name_epoch if epoch is None else epoch
    if own is not None:
        return Saved(at, path, file, (*run, own), step, epoch, None)

    state: int | None = 2 if above else 1
    is_there = is_file(_state_of(as_place(at), 2)) if above else STATE in folder.files
    # Beside checkpoints, the state of a run's folder is that of its end: it belongs to the last of them.
    if not is_there or not (own_folder or above or not _has_checkpoints(list_folder(folder.place))):
        state = None
    if step is None and state:
        steps = number_of(as_place(at), state, "global_step")
        step = None if steps is None else int(steps)
    return Saved(at, path, file, run, step, epoch, state)


def folder_of(file: Place) -> Folder:
    """The folder of a file that is given, as far as ``describe`` asks for it."""
    files = {name for name in (file.name, STATE) if is_file(file.parent / name)}
    return Folder(as_at(file.parent), files, [], parts(file.parent), identity(file.parent))


def _from_name(name: str) -> tuple[int | None, int | None, str | None]:
    """Step and epoch that a file's own name tells, and the name of its run where several may share the folder."""
    if name in _SAYS_NOTHING or is_whole(name):
        return None, None, None
    if match := _NUMBERED.fullmatch(name):
        return None, int(match[1]), None
    stem = os.path.splitext(name)[0]
    if match := _LIGHTNING.fullmatch(stem):
        return int(match[3]), int(match[2]), match[1]
    if match := _MLX.fullmatch(stem):
        return int(match[1]), None, None
    if match := _KOHYA.fullmatch(stem):
        return int(match[2]) if match[2] else None, int(match[3]) if match[3] else None, match[1]
    return None, None, stem


def _checkpoint(folder: Folder, up: int) -> re.Match[str] | None:
    """What the name of a folder (``up`` 1), or of the one above (2), says of step or epoch, and its number.

    A number alone is one where numbers of its length begin with zeros: 0500 beside 1000.
    """
    name = folder.parts[-up] if len(folder.parts) >= up else ""
    if not (name.isdigit() and name.isascii() and len(name) > 1):
        return _CHECKPOINT.fullmatch(name)
    beside = [name]
    if name[0] != "0" and isinstance(folder.at, str):
        beside = list_folder(Path(folder.at).parents[up - 1]).folders
    return re.fullmatch("()([0-9]{1,18})", name) if any(_padded(other, name) for other in beside) else None


def _padded(name: str, like: str) -> bool:
    return len(name) == len(like) and name.isdigit() and name[0] == "0"


def _has_checkpoints(folder: Folder) -> bool:
    return any(
        _CHECKPOINT.fullmatch(name)
        or (len(name) > 1 and name.isdigit() and any(_padded(other, name) for other in folder.folders))
        for name in folder.folders
    )


def _looks_like_adapter(file: Place) -> bool:
    """Whether a file has an adapter's tensors. Of other files than safetensors many are no tensors at all."""
    try:
        with open_tensors(file) as tensors:
            return looks_like_adapter(tensors.shapes)
    except AnalysisError:
        if file.suffix == ".safetensors" or _PROMISING.search(file.name):
            raise
        return False


def _state_of(file: Place, up: int) -> Place:
    return (file.parent if up == 1 else file.parent.parent) / STATE


def number_of(file: Place, up: int, key: str) -> int | float | None:
    """What a trainer_state.json says under a key; None if nothing.

    Args:
        file: The weights.
        up: How many folders above them it stands.
        key: ``epoch``, say.

    Raises:
        AnalysisError: The file cannot be read, or does not hold a number there.
    """
    state = _state_of(file, up)
    value: int | float | None = read_json(state, TRAINER_STATE).get(key)
    if value is None:
        return None
    if not abs(value) < 2**63:  # the tables hold whole numbers as int64; NaN compares false
        raise AnalysisError(f"{state}: {key} must be a number, got {shown(value)}")
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
