"""Adapter formats: which tensors of a file make up which matrices.

One module a format, with a ``FORMAT`` (see ``protocol``); it is found by being in this folder. Other packages add
theirs by an entry point of the group ``msplora.formats``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib import import_module

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import natural_key
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.helpers.no_update import REASONS
from msplora_analysis.formats.helpers.parts import trained_in_full
from msplora_analysis.formats.names import PREFIX
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Config, Contents, Shapes
from msplora_analysis.options import Options

ENTRY_POINTS = "msplora.formats"

# The checkpoints of a run have one header, one config and so the same contents.
_last: tuple[tuple[Shapes, Shapes | None, Config, Options], Contents] | None = None


def read_contents(config: Config, file: TensorFile, options: Options) -> Contents:
    """The matrices of an adapter file, from its config, the names and shapes of its tensors.

    Args:
        config: The parsed adapter_config.json; empty where there is none.
        file: The open file.
        options: How it is to be read.

    Raises:
        AnalysisError: The format or the layout is not supported, or the file has no matrix. The message does not
            name the file.
    """
    global _last
    key = (file.shapes, file.base, config, options)
    if _last is not None and _last[0] == key:
        return _last[1]
    known = find_format(config, file)
    found = _without_base(known.read(config, file, options))
    if not found.matrices and not found.unknown:
        raise AnalysisError("no low-rank factors in the file; was the adapter saved before it was added?")
    if (known.peft_types or known.lone) and (note := trained_whole(config, file, found)):
        found = found._replace(notes=[*found.notes, note])
    if not known.reads_values:
        _last = key, found
    return found


def _without_base(found: Contents) -> Contents:
    """A whole checkpoint of a model with adapters in it has the base's weights too, which are no updates."""
    if not any(name.endswith(".base_layer.weight") for name in found.unknown):
        return found
    rest = [name for name in found.unknown if "lora" in name]
    note = f"a whole checkpoint: {len(found.unknown) - len(rest)} tensors of the base model are left out"
    return Contents(found.matrices, rest, [*found.notes, note])


def trained_whole(config: Config, file: TensorFile, found: Contents) -> str | None:
    """The note of tensors that were trained whole beside the factors: heads, embeddings, biases."""
    unknown = set(found.unknown)
    names = [name.removeprefix(PREFIX) for name in file.shapes if name not in unknown]
    whole = sorted((name for name in names if trained_in_full(name, config)), key=natural_key)
    if not whole:
        return None
    listed = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
    count = "1 tensor trained whole is" if len(whole) == 1 else f"{len(whole)} tensors trained whole are"
    return f"{count} left out: {listed}"


def find_format(config: Config, file: TensorFile) -> Format:
    """The format of an adapter file: the first that matches, those of other packages last.

    Raises:
        AnalysisError: None does; the message says what is supported, and of PEFT's other methods why they are not.
    """
    for known in _all():
        if known.matches(config, file):
            return known
    kind = config.get("peft_type")
    if not config:
        first = next(iter(file.shapes), "none")
        raise AnalysisError(
            f"no adapter: its tensors ({first}, ...) have no names of low-rank factors that are known; of PEFT's "
            "adapters copy adapter_config.json beside it, and for a whole model give its base as base=",
            "base",
        )
    if kind is None:
        first = next(iter(file.shapes), "none")
        raise AnalysisError(
            f"adapter_config.json has no peft_type, and the file's tensors ({first}, ...) have no names of low-rank "
            "factors that are known; of PEFT's adapters use the configuration that was saved with the weights"
        )
    if kind in REASONS:
        raise AnalysisError(
            f"adapter_config.json: peft_type {kind!r} has no spectra of low-rank factors: {REASONS[kind]}"
        )
    supported = ", ".join(sorted({kind for known in _all() for kind in known.peft_types}))
    raise AnalysisError(f"adapter_config.json: peft_type {kind!r} is not supported; supported: {supported}")


def is_built_in(config: Config, file: TensorFile) -> bool:
    """Whether a file's format is one of this package, and not of another, whose version may change unseen."""
    return find_format(config, file) in built_in()


def takes_base(config: Config, file: TensorFile) -> bool:
    """Whether an adapter is read together with the model before training."""
    known = next((known for known in _all() if known.matches(config, file)), None)
    return known is not None and known.takes_base(config)


def shares_layers(config: Config) -> bool:
    """Whether layers have the same factors by design, as far as the config tells."""
    known = next((known for known in _all() if config.get("peft_type") in known.peft_types), None)
    return known is not None and known.shares_layers


def looks_like_adapter(names: Collection[str]) -> bool:
    """Whether tensors of these names are an adapter that needs no adapter_config.json."""
    return any(known.lone(names) for known in _all() if known.lone)


def config_files(name: str) -> tuple[str, ...]:
    """The files that configure a file of weights of this name in place of adapter_config.json."""
    return tuple(file for known in built_in() for file in known.config_files.get(name, ()))


def _all() -> Iterator[Format]:
    yield from built_in()
    yield from added()  # only asked for where no format of ours matches: finding packages takes time


@cache
def built_in() -> tuple[Format, ...]:
    """The formats of this folder, in the order in which they are asked."""
    modules = (import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return _in_order(module.FORMAT for module in modules if hasattr(module, "FORMAT"))


@cache
def added() -> tuple[Format, ...]:
    """The formats of other installed packages, in the order in which they are asked.

    Raises:
        AnalysisError: One of them cannot be loaded; the message names its package.
    """
    from importlib import metadata  # takes as long as all of ours

    formats = []
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
            if not isinstance(found, Format):
                raise TypeError(f"{point.value} is of type {type(found).__name__}, not Format")
        except Exception as error:  # the code of others may raise anything
            package = point.dist.name if point.dist else point.value
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise AnalysisError(
                f"package {package}: its format {point.name} cannot be loaded ({reason}); update or uninstall it"
            ) from None
        formats.append(found)
    return _in_order(formats)


def _in_order(formats: Iterable[Format]) -> tuple[Format, ...]:
    return tuple(sorted(formats, key=lambda known: (-known.priority, known.name)))
