"""Arguments and options that several commands have, and what they share in doing."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from msplora_analysis.errors import AnalysisError


class TableFormat(str, Enum):
    parquet = "parquet"
    csv = "csv"


class FigureFormat(str, Enum):
    pdf = "pdf"
    png = "png"
    svg = "svg"


Paths = Annotated[
    list[str],  # not Path: it would change an address such as hf://owner/name
    typer.Argument(
        metavar="PATH",
        help="Trainer output folders, adapter folders or files, or folders that hold them at any depth; "
        "local, hf://owner/name, or any fsspec address.",
        show_default=False,
    ),
]


class Semantics(str, Enum):
    paper = "paper"
    as_executed = "as-executed"


Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Processes to compute with.  [default: one for each CPU]", show_default=False
    ),
]

Dask = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Compute on the Dask cluster of this scheduler.", show_default=False),
]

UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Reuse what earlier calls computed from the same files.")
]

IgnoreUnknown = Annotated[
    bool,
    typer.Option("--ignore-unknown", help="Leave out tensors that no part of an adapter explains, with a warning."),
]

SemanticsChoice = Annotated[
    Semantics,
    typer.Option(
        metavar="paper|as-executed",
        help="For checkpoints of the released MSPLoRA code: read them as the paper shares, or as that code computed.",
    ),
]

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to; created if needed.", show_default=False)]

Format = Annotated[TableFormat, typer.Option(metavar="parquet|csv", help="File format of the tables.")]

StyleOption = Annotated[
    str | None,
    typer.Option(
        metavar="VENUE[-column|-full]",
        help="Figure width and fonts of a venue, such as neurips, icml-column or acl-full.",
        show_default=False,
    ),
]


def check_style(style: str | None, figures: Sequence[object] | None) -> None:
    """Raise AnalysisError, before the work, for a style that there is not, or one without a figure to draw."""
    if style is None:
        return
    from msplora_analysis.show.drawing.venues import style_of

    style_of(style)
    if not figures:
        raise AnalysisError("--style is that of a figure: add --figure pdf, png or svg")


Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model before training (a folder or file); full checkpoints are read as the difference to it.",
        show_default=False,
    ),
]


Device = Annotated[
    str,
    typer.Option(metavar="cpu|cuda", help="Where differences of whole models are computed; cuda uses a GPU."),
]


class Weights(str, Enum):
    moments = "moments"
    none = "none"


Moments = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none",
        help="The file of msplora-measure moments; none: use no moments.  "
        "[default: moments.safetensors beside the adapter, if there]",
        show_default=False,
    ),
]

AdapterPath = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Adapter folder or file, or a folder with one adapter; local, hf://owner/name, or any fsspec address.",
        show_default=False,
    ),
]

NewAdapter = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the new adapter; created if needed.", show_default=False)
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter in DIR.")]


def factor_type(default: str) -> Any:
    """The option ``--dtype`` of a new adapter; ``default``: what its help says of the default."""
    about = f"Type of the factors.  [default: {default}]"
    return typer.Option(metavar="float32|float16|bfloat16|float64", help=about, show_default=False)


def make_folder(folder: Path) -> None:
    """The folder of ``--out``. Raises AnalysisError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AnalysisError(f"--out {folder}: not a folder; give another path") from None
    except OSError as error:
        raise AnalysisError(f"--out {folder}: cannot be made: {error.strerror}") from None
