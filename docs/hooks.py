"""What the site needs beside its pages: files of the repository outside ``docs``, formulas, and made pages.

- A link that leaves ``docs`` works in the repository; on the site, pictures, tables and notebooks that are linked go
  along under ``repository/``, README.md becomes the first page, and of a folder only its name is left.
- A ```math block, which GitHub shows as a formula, becomes MathML, which browsers draw by themselves.
- ``{{ commands }}`` becomes the reference of both commands, from their own code.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"
_PAGES = {"README.md": "index.md"}
_FETCHED = "https://unpkg.com/iframe-worker/shim"
_LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, wherever in the repository they are."""
    linked = {match["path"] for page in files.documentation_pages() for match in _LINK.finditer(page.content_string)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and path not in _PAGES:
            files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def moved(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: links to ../{path}, which is not there")
        if (ROOT / path).is_dir():
            return f"`{PurePosixPath(path)}`" if match["text"].strip("[]`") == path.strip("/") else match["text"][1:-1]
        return f"{match['text']}({_PAGES.get(path, f'{FOLDER}/{path}')}{anchor})"

    markdown = _LINK.sub(moved, markdown)
    return markdown.replace("{{ commands }}", commands()) if "{{ commands }}" in markdown else markdown


def formula(
    source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **more: Any
) -> str:  # the signature that superfences asks for
    """A block of LaTeX as MathML, one formula a line."""
    from latex2mathml.converter import convert

    lines = [convert(line, display="block") for line in source.splitlines() if line.strip()]
    return f'<div class="{css_class}">{"".join(lines)}</div>'


def commands() -> str:
    """All commands with their subcommands, arguments, options and examples, as Markdown."""
    import msplora_analysis.cli
    import msplora_core.cli
    import msplora_core.measure.cli

    return "\n".join(
        _reference(name, cli.app)
        for name, cli in (
            ("msplora-analyze", msplora_analysis.cli),
            ("msplora-train", msplora_core.cli),
            ("msplora-measure", msplora_core.measure.cli),
        )
    )


def _reference(name: str, app: Any) -> str:
    import typer
    from typer.cli import get_docs_for_click

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name=name, indent=1)
    # Paragraphs that click leaves as they are (its mark for them is a backspace) are examples and lists.
    text = re.sub(r"\x08\n((?:  .*\n?|\n(?=  ))+)", lambda match: f"```text\n{_dedented(match[1])}\n```\n", text)
    text = text.replace("* `--help`: Show this message and exit.\n", "")
    return re.sub(r"^\*\*Options\*\*:\n\n(?!\*)", "", text, flags=re.MULTILINE)


def _dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text).strip("\n")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Let the search run from the disk with a file of ours: the theme would fetch one from elsewhere."""
    return output.replace(_FETCHED, get_relative_url("worker.js", page.url))


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    return output_content.replace(_FETCHED, "worker.js")
