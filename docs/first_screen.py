"""The first picture of README.md: what `advise` answers, beside the figure of its ablation.

    make demo
    python docs/first_screen.py demo/runs/lora-8 docs/pictures/first_screen.png

Needs the extra `report`, whose vl-convert draws the text.
"""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import vl_convert
from PIL import Image
from rich.console import Console

import msplora_analysis as ma
from msplora_analysis.ask.advice.gather import advise_all
from msplora_analysis.commands.shared import answers as printing
from msplora_analysis.options import Execution, Options

WIDTH, SHOWN = 80, 2  # columns; the first answers


def main(run: str, out: str) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)

    @contextmanager
    def recorded():
        yield console

    (advice,) = advise_all([run], Options(), Execution())
    printing.printed_whole = recorded
    console.print(f"[bold]$ msplora-analyze {run}[/bold]\n")
    here = f"{Path.cwd()}/"
    answers = [replace(answer, command=(answer.command or "").replace(here, "")) for answer in advice.answers[:SHOWN]]
    printing.print_advice(replace(advice, answers=answers))
    svg = console.export_svg(title="msplora-analyze").replace("Fira Code", "DejaVu Sans Mono")
    text = Image.open(io.BytesIO(vl_convert.svg_to_png(svg, scale=1.6))).convert("RGB")
    figure = next(iter(ma.draw_figures(run, "icml-column", which="metric_against_rank").values()))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=text.height / figure.get_figheight(), format="png")
    picture = Image.open(drawn).convert("RGB")
    both = Image.new("RGB", (text.width + picture.width + 30, max(text.height, picture.height)), "white")
    both.paste(text, (0, (both.height - text.height) // 2))
    both.paste(picture, (text.width + 30, (both.height - picture.height) // 2))
    both.quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
