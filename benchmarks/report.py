"""Results as a page of tables, and whether the targets are reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from adapters import CASES

Result = dict[str, Any]

# Compute with two processes, as a multiple of pread.
COMPUTE = {
    **{"S float32": 4, "S bfloat16": 4, "M float32": 4.5, "M bfloat16": 4.5},
    **{"L float32": 6, "L bfloat16": 10, "XL float32": 6, "XL bfloat16": 6},
}
# The whole command on L, as a part of what gradience takes, and in bytes.
WALL, MEMORY, BYTES = 1 / 10, 1 / 3, 200e6
HELP = 0.25  # CPU seconds


def targets(results: Result) -> list[Result]:
    """Each target with what was measured; a target whose measurement is missing is left out."""
    rows: list[Result] = []

    def add(what: str, unit: str, target: float, measured: float) -> None:
        rows.append({"what": what, "unit": unit, "target": target, "measured": measured, "met": measured <= target})

    for row in results.get("compute", ()):
        if row["contender"] == "msplora, 2 processes" and "ratio" in row:
            add(f"{row['case']}: compute, 2 processes", "× pread", COMPUTE[row["case"]], row["ratio"]["median"])
    for row in results.get("command", ()):
        if not row["case"].startswith("L ") or "failed" in row:
            continue
        if row["command"].startswith("gradience"):
            add(f"{row['case']}: wall time", f"× {row['command']}", WALL, row["ratio"]["median"])
            add(f"{row['case']}: memory", f"× {row['command']}", MEMORY, row["memory_ratio"])
        else:
            add(f"{row['case']}: memory", "MB", BYTES / 1e6, row["memory"] / 1e6)
    for row in results.get("help", ()):
        if row["command"].endswith("--help"):
            add("msplora-analyze --help", "s of CPU", HELP, row["cpu"]["median"])
    return rows


def markdown(results: Result) -> str:
    """results.md; README.md beside it says what the columns mean."""
    about = results["machine"]
    lines = ["# Results", "", "Written by `make bench`; [README.md](README.md) says how to read it.", ""]
    lines += _about(about)
    if results["targets"]:
        lines += ["", "## Targets", ""]
        lines += _table(
            ("", "target", "measured", "reached"),
            (
                (row["what"], f"≤ {row['target']:.3g} {row['unit']}", _number(row["measured"]), _yes(row["met"]))
                for row in results["targets"]
            ),
        )
    for label in dict.fromkeys(row["case"] for row in results.get("compute", ())):
        case = CASES[label]
        size = f"{case.matrices} matrices, {case.nbytes / 1e6:.0f} MB"
        lines += ["", f"## {label}: {case.title} ({size})", "", "From files to singular values in memory.", ""]
        rows = [_compute(row) for row in results["compute"] if row["case"] == label]
        lines += _table(("", "seconds", "× pread", "quartiles", "rounds", "largest relative error"), rows)
    if "accuracy" in results:
        lines += ["", "## Accuracy where spectra fall to 1e-5 sigma_1", ""]
        rows = [(row["contender"], row.get("failed") or f"{row['error']:.0e}") for row in results["accuracy"]]
        lines += _table(("", "largest relative error"), rows)
    if "command" in results:
        lines += ["", "## Whole commands", "", "From the start of Python to the tables on disk.", ""]
        header = ("case", "command", "seconds", "quartiles", "rounds", "msplora : it", "memory MB", "of no file MB")
        lines += _table((*header, "memory, msplora : it"), map(_command, results["command"]))
    if "help" in results:
        lines += ["", "## Start", ""]
        rows = [
            (f"`{row['command']}`", _number(row["cpu"]["median"]), _spread(row["cpu"]), _number(row["ratio"]["median"]))
            for row in results["help"]
        ]
        lines += _table(("", "s of CPU", "quartiles", "× `python -c pass`"), rows)
    if "scale" in results:
        lines += _scale(results["scale"])
    return "\n".join(lines) + "\n"


def rounded(value: Any) -> Any:
    """Floats to four digits, at any depth: more is noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _about(about: Result) -> list[str]:
    versions = [
        f"- {environment}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for environment, found in about["versions"].items()
    ]
    load = f"{about['load_before']:.2f} before, {about['load_after']:.2f} after"
    return [
        f"- {about['cpu']}, {about['cores']} cores used, {about['memory_gb']} GB; {about['system']}",
        f"- load average {load}; {about['seconds']} s in all",
        f"- BLAS of numpy {about['numpy']}: {about['numpy_blas']}",
        *versions,
    ]


def _compute(row: Result) -> Sequence[str]:
    if "failed" in row:
        return (row["contender"], "–", "–", "–", "–", row["failed"])
    label = row["contender"] + (f" (a part, × {row['weight']:g})" if row["weight"] != 1 else "")
    ratio = row["ratio"]
    error = f"{row['error']:.0e}" if "error" in row else ""
    return (label, _number(row["seconds"]["median"]), _number(ratio["median"]), _spread(ratio), str(ratio["n"]), error)


def _command(row: Result) -> Sequence[str]:
    if "failed" in row:
        return (row["case"], f"`{row['command']}`", row["failed"], *["–"] * 6)
    label = f"`{row['command']}`" + (f" (a part, × {row['weight']:g})" if row["weight"] != 1 else "")
    wall = row["wall"]
    return (
        *(row["case"], label, _number(wall["median"]), _spread(wall), str(wall["n"])),
        *(_number(row["ratio"]["median"]), f"{row['memory'] / 1e6:.0f}", f"{row['anonymous'] / 1e6:.0f}"),
        _number(row["memory_ratio"]),
    )


def _scale(scale: Result) -> list[str]:
    size = f"{scale['runs']} runs, {scale['bytes'] / 1e6:.0f} MB"
    same = "The tables of all ways are the same, byte by byte." if scale["identical"] else "**The tables differ.**"
    title = f"## {scale['adapters']} small adapters: {scale['title']} ({size})"
    lines = ["", title, "", f"Whole commands `msplora-analyze spectra`. {same}", ""]
    base = [row["command"] for row in scale["workers"][:2]]
    header = ("`--no-cache` and", "seconds", "s of CPU", *(f"× `{label}`, quartiles" for label in base), "rounds")
    lines += _table(
        header,
        (
            (f"`{row['command']}`", *_times(row), *(_with_spread(row[f"of_{label}"]) for label in base), _rounds(row))
            if "failed" not in row
            else (f"`{row['command']}`", row["failed"], *["–"] * 4)
            for row in scale["workers"]
        ),
    )
    lines += ["", *_table(
        ("with a cache", "seconds", "s of CPU", "× first call, quartiles", "rounds", "cache MB"),
        (
            (row["call"], *_times(row), _with_spread(row["of_first"]), _rounds(row), _number(row["bytes"] / 1e6))
            for row in scale["cache"]
        ),
    )]  # fmt: skip
    counts = list(dict.fromkeys(row["adapters"] for row in scale["memory"]))
    of_command: dict[str, list[str]] = {}
    for row in scale["memory"]:
        text = f"{row['memory'] / 1e6:.0f} ({row['anonymous'] / 1e6:.0f})"
        of_command.setdefault(f"`{row['command']}`", []).append(text)
    header = ("memory MB (of no file)", *(f"{count} adapters" for count in counts))
    return [*lines, "", *_table(header, ((label, *cells) for label, cells in of_command.items()))]


def _times(row: Result) -> tuple[str, str]:
    return _number(row["wall"]["median"]), _number(row["cpu"]["median"])


def _with_spread(ratio: dict[str, float]) -> str:
    return "1" if ratio["q1"] == ratio["q3"] == 1 else f"{_number(ratio['median'])}, {_spread(ratio)}"


def _rounds(row: Result) -> str:
    return str(row["wall"]["n"])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(values: dict[str, float]) -> str:
    return f"{_number(values['q1'])} – {_number(values['q3'])}" if values["n"] > 1 else "–"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"
