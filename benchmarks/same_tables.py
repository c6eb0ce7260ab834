"""Check that two versions of the analysis write the same bytes.

    git worktree add /tmp/before v0.1.0
    python benchmarks/same_tables.py --before /tmp/before examples/runs path/to/other/adapters

Each version writes every table of every path through its command line, in processes of its own. The files are then
compared byte by byte. Exit status 1 if any differs or is missing.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_RUN = "from msplora_analysis.cli import main; main()"


def commands(path: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every command that writes numbers of a path, or prints them.

    Args:
        path: An adapter, a run, or a folder of runs.
        out: Where the tables go; what a command prints goes beside them, as ``<name>.txt``.
    """
    several = sum(1 for _ in path.rglob("adapter_config.json")) > 1
    for kind in ("parquet", "csv"):
        yield f"spectra-{kind}", ["spectra", str(path), "--out", f"{out}/{kind}", "--format", kind, "--no-cache"]
        yield (
            f"redundancy-{kind}",
            [
                *("redundancy", str(path), "--out", f"{out}/pairs-{kind}", "--format", kind, "--details"),
            ],
        )
    yield "diagnose", ["diagnose", str(path), "--json", "--no-cache"]
    if several:
        yield "figures", ["figures", str(path), "--out", f"{out}/figures", "--format", "svg"]
    else:
        yield "export", ["export", str(path), "--out", f"{out}/export"]
        yield "compress", ["compress", str(path), "--out", f"{out}/compress", "--energy", "0.9"]
    runs = sorted(child for child in path.iterdir() if (child / "run.json").is_file()) if path.is_dir() else []
    if len(runs) > 1:
        yield "results", ["results", str(path), "--out", f"{out}/results"]
        sides = [str(runs[0]), "--with", str(runs[1])]
        yield "compare", ["compare", *sides, "--out", f"{out}/compare", "--format", "csv"]


def write(checkout: Path, path: Path, out: Path) -> None:
    """Let the version in ``checkout`` write all tables of a path."""
    out.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "120"}
    for name, arguments in commands(path, Path(".")):
        done = subprocess.run(
            [sys.executable, "-c", _RUN, *arguments], cwd=out, env=environment, capture_output=True, text=True
        )
        shown = done.stdout if name == "diagnose" else ""  # the words of a summary may change, numbers may not
        (out / f"{name}.txt").write_text(f"exit status {done.returncode}\n{shown}")
        if done.returncode:
            print(f"{checkout}: {' '.join(arguments)}: {done.stderr.strip()}")


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="adapters, runs, or folders of runs")
    parser.add_argument("--before", required=True, type=Path, help="a checkout of the other version")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[1], help="default: this checkout")
    options = parser.parse_args()
    files = differing = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(path.resolve() for path in options.paths):
            sides = [Path(folder) / str(number) / side for side in ("before", "after")]
            for checkout, out in zip((options.before, options.after), sides, strict=True):
                write(checkout.resolve(), path, out)
            names = {file.relative_to(side) for side in sides for file in side.rglob("*") if file.is_file()}
            files += len(names)
            for name in sorted(names):
                one, other = (side / name for side in sides)
                if not (one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)):
                    differing += 1
                    print(f"{path}: {name} differs")
    print(f"{files} files of {len(options.paths)} paths: {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
