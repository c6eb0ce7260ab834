"""What an adapter's README.md says of its update: a section for the Hub, between two marks, with one figure."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from msplora_analysis.adapters.discovery import discover
from msplora_analysis.ask.advice.gather import advise_known
from msplora_analysis.ask.evidence import Evidence, gather
from msplora_analysis.ask.findings import KINDS, diagnose
from msplora_analysis.compute.measures.rank_needed import energy_rank
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import Execution, Options
from msplora_analysis.show.typeset import plain
from msplora_core.atomic import replacing
from msplora_core.version import __version__

if TYPE_CHECKING:
    import pandas as pd

FIGURE = "msplora_spectra.png"
_BEGIN, _END = "<!-- msplora card: begin -->", "<!-- msplora card: end -->"
_ROWS = 12  # of the table; modules beyond are summed up


def write_card(adapter: StrPath, options: Options, execution: Execution) -> list[Path]:
    """Write a section on the update of an adapter into the README.md beside it, and its figure.

    A section of before is replaced; all else in the file stays.

    Args:
        adapter: Folder or file of one adapter, on disk.
        options: How it is to be read.
        execution: How it is to be computed.

    Returns:
        The paths written.

    Raises:
        AnalysisError: not one local adapter, its content cannot be used, or README.md is no UTF-8 text.
    """
    found = discover(adapter)
    if len(found) > 1:
        raise AnalysisError(f"{adapter}: {len(found)} adapters; give one, such as {found[-1].file.parent}")
    file = found[0].file
    if not isinstance(file, Path):
        raise AnalysisError(f"{adapter}: not on this disk; download it, as the card is written beside it")
    evidence = gather([file], options, execution)
    if evidence.spectra.empty:
        raise AnalysisError(
            evidence.broken[0].message if evidence.broken else f"{file}: no low-rank factors; a card needs some"
        )
    given = Path(adapter)
    folder = given if given.is_dir() and given.resolve() == file.parent.resolve() else file.parent
    readme = folder / "README.md"
    try:
        before = readme.read_text(encoding="utf-8") if readme.exists() else _new(found[0].config)
    except UnicodeDecodeError:
        raise AnalysisError(f"{readme}: not UTF-8 text; save it as UTF-8") from None
    from msplora_analysis.show.figures import draw_figures

    figure = next(iter(draw_figures(evidence.spectra, which="spectra_by_layer").values()))
    picture = folder / FIGURE
    with replacing(picture) as beside:
        figure.savefig(beside, format="png", dpi=150)
    with replacing(readme) as beside:
        beside.write_text(_placed(section(evidence, file), before), encoding="utf-8", newline="\n")
    return [readme, picture]


def section(evidence: Evidence, file: Path) -> str:
    """The section in Markdown, without its marks."""
    lines = ["## What this adapter changed", ""]
    lines += _table(evidence.metrics, evidence.spectra)
    lines += ["", f"![Singular values by layer]({FIGURE})", ""]
    for advice in advise_known(evidence):
        for answer in advice.answers:
            lines.append(f"- **{plain(answer.question)}** {plain(answer.answer)} {plain(answer.evidence)}".rstrip())
    for kind, rows in diagnose(evidence).groupby("id", sort=False):
        found = (
            f"{rows['severity'].iloc[0]}: {KINDS[str(kind)].title} ({len(rows)} of {len(evidence.metrics)} matrices)"
        )
        lines.append(f"- {plain(found)}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    lines += [
        "",
        "Effective rank: exp of the entropy of the normalised singular values (high: broad). Rank for 99 %: how many "
        "directions hold 99 % of the sum of squares. Both describe what was learned, not what rank a task needs.",
        "",
        f"Computed by msplora {__version__} from `{plain(file.name)}` (SHA-256 {digest[:16]}…) with "
        "`msplora-analyze card`.",
    ]
    return "\n".join(lines)


def _table(metrics: pd.DataFrame, spectra: pd.DataFrame) -> list[str]:
    """A row for each module type of each scale: means over its matrices."""
    import pandas as pd

    by_matrix = spectra.groupby(["scale", "name"], sort=False)["sigma"]
    needed = {key: float(energy_rank(sigma.to_numpy(), 0.99)) for key, sigma in by_matrix}
    lines = ["| scale | module | matrices | rank | norm | effective rank | rank for 99 % |", f"|---|---|{'--:|' * 5}"]
    groups = list(metrics.groupby(["scale", "module"], sort=False))
    for (scale, module), rows in groups[:_ROWS]:
        ranks = "–".join(dict.fromkeys((str(rows["rank"].min()), str(rows["rank"].max()))))
        of_rows = pd.Series([needed[scale, name] for name in rows["name"]])
        cells = [plain(str(scale)), plain(str(module)), str(len(rows)), ranks]
        cells += [_mean(values) for values in (rows["frobenius"], rows["effective_rank"], of_rows)]
        lines.append(f"| {' | '.join(cells)} |")
    if len(groups) > _ROWS:
        lines.append(f"\n{len(groups) - _ROWS} more kinds of modules are not listed.")
    return lines


def _mean(values: pd.Series[float]) -> str:
    mean = values.mean()
    return "–" if mean != mean else f"{mean:.3g}"


def _new(config: dict[str, object]) -> str:
    """A README.md where there is none, with the front matter that the Hub reads."""
    base = config.get("base_model_name_or_path")
    is_name = isinstance(base, str) and base.count("/") == 1 and not base.startswith(("/", "."))
    about = [f"base_model: {base}"] if is_name and str(base).replace("/", "").replace("-", "").isalnum() else []
    return "\n".join(["---", "library_name: peft", *about, "tags:", "- lora", "---", "", "# Adapter", "", ""])


def _placed(section: str, text: str) -> str:
    """The text with the section in the place of that of before, or at the end."""
    marked = f"{_BEGIN}\n{section}\n{_END}"
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        return text[:begin] + marked + text[end + len(_END) :]
    return f"{text.rstrip()}\n\n{marked}\n"
