"""The page: one HTML file with its data, style, script and drawing library inside."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from msplora_analysis.adapters.discovery import Adapter
from msplora_analysis.ask.advice.gather import advise_known
from msplora_analysis.ask.comparison.two_by_two import two_by_two
from msplora_analysis.ask.evidence import Evidence
from msplora_analysis.ask.findings import diagnose
from msplora_analysis.errors import AnalysisError, printable
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.show.report import charts, sections
from msplora_analysis.show.report.about import POINTS, About, about
from msplora_analysis.show.report.pictures import pictures
from msplora_core.atomic import replacing
from msplora_core.version import __version__

_MOST_ADVICE = 12  # runs
_HERE = Path(__file__).parent


def page(evidence: Evidence, paths: Sequence[StrPath]) -> str:
    """The HTML of a report on what was read at ``paths``.

    Raises:
        AnalysisError: a JSON file beside an adapter is broken.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    of_run: dict[str, list[Adapter]] = {}
    for adapter in evidence.adapters:
        of_run.setdefault(adapter.run, []).append(adapter)
    abouts = [about(run, of_run.get(run, [])) for run in evidence.runs]
    matrices, why_not = sections.prepared(evidence)
    answers = advise_known(evidence)
    data = sections.payload(evidence, abouts, sections.labels_of(matrices, evidence.runs), answers)
    data["glance"] = sections.glance(evidence, abouts, data)
    compared, not_compared = ([], why_not) if matrices is None else two_by_two(evidence, matrices)
    findings = diagnose(evidence)
    advice = [sections.advice(one) for one in answers]
    library, script = _library(), (_HERE / "script.js").read_text(encoding="utf-8")
    last = evidence.matrices.keys[evidence.matrices.keys["last"]]
    return environment.get_template("template.html").render(
        title=evidence.runs[0] if len(evidence.runs) == 1 else f"{len(evidence.runs)} runs compared",
        version=__version__,
        paths=[printable(path) for path in map(str, paths)],
        policy=_policy(library, script),
        library=library,
        script=script,
        style=(_HERE / "style.css").read_text(encoding="utf-8"),
        data=json_in_html(data),
        payload=data,
        abouts=abouts,
        cards=_cards(evidence, abouts, data),
        legend=_legend(data),
        pictures=pictures(evidence, matrices, paths),
        advice=advice[:_MOST_ADVICE],
        advice_left=max(0, len(advice) - _MOST_ADVICE),
        severities=sections.severities(findings),
        findings=sections.findings(findings),
        compared=compared,
        not_compared=not_compared,
        notes=[printable(note) for note in (*evidence.notes, *(one.message for one in evidence.broken))],
        scales=set(last["scale"]),
        has_task=evidence.matrices.task is not None,
        thinned=any(one.is_thinned for one in abouts),
        points=POINTS,
    )


def check_out(out: StrPath) -> None:
    """Raise AnalysisError, before the work, if ``out`` cannot be a file."""
    file = Path(out)
    if file.is_dir() or os.fspath(out).endswith(("/", os.sep)):
        raise AnalysisError(
            f"out={file}: a folder; give the path of the file to write, such as {file / 'report.html'}", "out"
        )
    if not file.parent.is_dir():
        raise AnalysisError(f"out={file}: no folder {file.parent}; make it, or give another path", "out")


def write(html: str, file: Path) -> None:
    """Write beside ``file``, then take its place. Raises AnalysisError if that cannot be done."""
    try:
        with replacing(file) as beside:
            beside.write_text(html, encoding="utf-8", newline="\n")
    except OSError as error:
        raise AnalysisError(f"out={file}: cannot be written: {error.strerror or error}", "out") from None


def json_in_html(data: Any) -> str:
    """JSON that ends no script element and opens none, whatever its strings hold: all but plain ASCII is escaped."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # U+2028 and U+2029 are escaped with all non-ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and vega-embed, as one script. Raises AnalysisError if the package is not there."""
    try:
        import vl_convert
    except ImportError:
        raise AnalysisError(
            "a report needs the package vl-convert-python (the drawing library): pip install 'msplora[report]'"
        ) from None
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version="6.4")
    # What HTML would read as the end of the element, or as a comment, is the same in a string of JavaScript.
    return bundle.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    """No request of any kind, and no script but these: neither others in the page nor attributes such as onerror."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes}",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _legend(data: dict[str, Any]) -> list[dict[str, str]]:
    labels = dict.fromkeys(run["label"] for run in data["runs"])
    styles = (charts.line_style(index) for index in range(len(labels)))
    return [
        {"label": label, "colour": colour, "dashes": " ".join(map(str, dashes)) if dashes != [1, 0] else "none"}
        for label, (colour, dashes) in zip(labels, styles, strict=True)
    ]


def _cards(evidence: Evidence, abouts: list[About], data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Key numbers: (what, value, how to read it, its name among the hints). Of several runs what they have together."""
    keys = evidence.matrices.keys
    checkpoints = int(keys.groupby("run")["time"].nunique().sum())
    cards = [("checkpoints read", f"{checkpoints}", f"of {len(abouts)} runs" if len(abouts) > 1 else "of one run", "")]
    matrices = data["matrices"]
    cards.append(
        ("matrices", f"{len(matrices['run'])}", "at the last checkpoint" + (" of each run" * (len(abouts) > 1)), "")
    )
    if len(abouts) > 1:
        return cards
    row = data["glance"]
    rank = row.get("rank", [None])[0]
    if rank is not None and (effective := row.get("effective_rank", [None])[0]) is not None:
        read = "mean of the layers' parts; higher = broader"
        cards.append(("effective rank", f"{effective:.3g} of {rank:g}", read, "effective_rank"))
    if rank is not None and (needed := row.get("rank_needed_99", [None])[0]) is not None:
        cards.append(("directions for 99 % of Σσ²", f"{needed:.3g} of {rank:g}", "mean of the layers' parts", "needed"))
    for name in list(data["curves"])[:4]:
        if (value := row.get(name, [None])[0]) is not None:
            cards.append((name, f"{value:.3g}", "last value known", "curve"))
    return cards
