"""Open an adapter: its file of tensors, and the matrices that its format finds in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msplora_analysis.adapters.discovery import Adapter, read_config
from msplora_analysis.adapters.layouts import check_states
from msplora_analysis.adapters.magnitude import magnitude_note
from msplora_analysis.errors import AnalysisError, ChangedError
from msplora_analysis.files.addresses import parse
from msplora_analysis.files.opening import AdapterWithBase, PairedFile, RenamedFile, open_checkpoint
from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats import looks_like_adapter, read_contents, takes_base
from msplora_analysis.formats.names import PREFIX, without_wrappers
from msplora_analysis.formats.updates import Contents
from msplora_analysis.options import Options


@contextmanager
def opened(adapter: Adapter, options: Options, *, base_notes: bool = True) -> Iterator[tuple[TensorFile, Contents]]:
    """The open file of an adapter, and what it holds.

    Args:
        adapter: What discovery found.
        options: How it is to be read.
        base_notes: Also give the notes that take reading the base model.

    Raises:
        AnalysisError: the content is not understood; the message names the file.
        ChangedError: at the end, if what was read is not of one moment.
    """
    config = adapter.config  # its errors name its own file
    with open_adapter(adapter, options) as file:
        try:
            contents = read_contents(config, file, options)
            notes = [*contents.notes, *(_base_notes(adapter, file, options) if base_notes else ())]
        except AnalysisError as error:
            raise AnalysisError(f"{adapter.file}: {error}", *error.arguments) from None
        if contents.unknown and not options.ignore_unknown:
            if parts := _of_adapted(contents):
                raise AnalysisError(
                    f"{adapter.file}: {unknown_text(parts)}; they stand in modules that are adapted, and may "
                    "change their updates: this form of adapter is not supported"
                )
            raise AnalysisError(
                f"{adapter.file}: {unknown_text(contents.unknown)}; pass ignore_unknown=True to leave them out",
                "ignore_unknown",
            )
        yield file, contents._replace(notes=notes)
        file.check_unchanged()
    # Its configuration was read before the file, perhaps long before.
    if isinstance(adapter.file, Path) and repr(read_config(adapter.file)) != repr(config):
        raise ChangedError(f"{adapter.file}: the configuration beside it changed while it was read; try again")


def unknown_text(names: Sequence[str]) -> str:
    """Names the first few tensors that no format explains."""
    return f"unknown tensors ({len(names)}): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _of_adapted(contents: Contents) -> list[str]:
    """Unknown tensors of modules that are adapted, such as a gate between the factors; not biases."""
    modules = {matrix.name for matrix in contents.matrices}
    paths = {name: name.removeprefix(PREFIX).split(".") for name in contents.unknown if not name.endswith("bias")}
    return [
        name
        for name, path in paths.items()
        if any(".".join(path[:length]) in modules for length in range(1, len(path)))
    ]


def open_adapter(adapter: Adapter, options: Options) -> TensorFile:
    """The file of an adapter; that of a whole model, and of an update of the base's weights, together with the base."""
    file = _own_file(adapter)
    if options.base is None:
        return file
    if takes_base(adapter.config, file):
        return AdapterWithBase(file, parse(options.base))
    if not adapter.config and not looks_like_adapter(file.shapes):
        return PairedFile(file, parse(options.base))
    return file


def _own_file(adapter: Adapter) -> TensorFile:
    check_states(adapter.file)
    file = open_checkpoint(adapter.file)
    names = without_wrappers(file.shapes)
    return RenamedFile(file, names) if any(name != own for name, own in names.items()) else file


def reads_base(adapter: Adapter) -> bool:
    """Whether an adapter's update needs the model before training."""
    with _own_file(adapter) as file:
        return takes_base(adapter.config, file)


def _base_notes(adapter: Adapter, file: TensorFile, options: Options) -> list[str]:
    """What only the base can tell of an adapter: how far DoRA moved the magnitudes. Or that it is not read."""
    if options.base is None:
        return []
    if not adapter.config.get("use_dora"):
        is_read = isinstance(file, (AdapterWithBase, PairedFile))
        return [] if is_read else ["the base model given is not read: the file alone has the update"]
    with open_checkpoint(parse(options.base)) as base:
        file.states |= base.states
        return [magnitude_note(file, base, adapter.config)]
