"""Every command and code block of README.md and docs/ runs, and what the pages show of output is what comes out.

The blocks of a page run in their order in one folder, in which lies what the page takes for granted (``ASSUMED``).
Commands run in this process. To keep that cheap, and nothing else is changed:

- training runs of one epoch (``--epochs 1`` is added) on a toy model, which stands where the page's model would, with
  20 examples;
- pictures are empty files, since other tests draw each figure; their numbers are written;
- of a loop, the first pass runs, and the commands of the others are parsed.

What cannot run in a test is in ``NOT_RUN``, with the reason, and is checked as far as possible. Any other command
fails. A block that is headed ``title="x.py"`` is that file. After a Python block, a ``text`` block is what it prints.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomllib
import typer
from markdown_it import MarkdownIt

import msplora_analysis.cli
import msplora_core.cli
import msplora_core.measure.cli
from msplora_core.models import EMBEDDED_MODELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
APPS = {"msplora-analyze": msplora_analysis.cli.app, "msplora-train": msplora_core.cli.app}
APPS["msplora-measure"] = msplora_core.measure.cli.app

# What lies in the folder of a page, beside what all have: runs of examples/, or one checkpoint of them.
RUNS = {"runs/cola/msplora": "msplora-8-8-8", "runs/cola/lora": "lora-8"}
BOTH = {"runs/lora-8": "lora-8", "runs/msplora-8-8-8": "msplora-8-8-8"}
ADAPTERS = {
    "runs/msplora/checkpoint-270": "msplora-8-8-8/checkpoint-270",
    "runs/lora-64/checkpoint-500": "lora-8/checkpoint-270",
}
TWO = {"style": "lora-8/checkpoint-270", "subject": "msplora-8-8-8/checkpoint-270"}
PAIR = {"style-a": "lora-8/checkpoint-270", "style-b": "msplora-8-8-8/checkpoint-270"}
ASSUMED: dict[str, dict[str, str]] = {
    "README.md": ADAPTERS | TWO | PAIR,
    "card.md": ADAPTERS,
    "export.md": ADAPTERS,
    "figures.md": BOTH,
    "merge.md": TWO | {f"loras/{name}": place for name, place in TWO.items()},
    "redundancy.md": RUNS,
    "relate.md": PAIR | {"runs/cola/lora-8": "lora-8", "runs/mrpc/lora-8": "msplora-8-8-8"},
    "share.md": ADAPTERS,
}
# The others train or draw, and are slow tests.
QUICK = ("README.md", "choose_a_rank.md", "extending.md", "python.md", "tables.md")


class Block(NamedTuple):
    """A fenced block: its language, the file that it is, its text, and where its text begins."""

    language: str
    title: str | None
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map is not None:
            language, _, more = token.info.strip().partition(" ")
            title = re.search(r'title="([^"]+)"', more)
            found.append(Block(language, title[1] if title else None, token.content, token.map[0] + 2))
    return found


# Commands


class Command(NamedTuple):
    words: list[str]
    is_run: bool  # or else only parsed
    shown: str | None  # the output that the page shows


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block, with its loops unrolled."""
    if block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield Command(shlex.split(command, comments=True), True, shown)
        return
    lines = block.text.replace("\\\n", " ").splitlines()
    for words, is_run in unrolled([shlex.split(line, comments=True) for line in lines], {}, True):
        yield Command(words, is_run, None)


def unrolled(lines: list[list[str]], variables: dict[str, str], is_run: bool) -> Iterator[tuple[list[str], bool]]:
    """Commands with the variables of ``for`` put in, and whether they are of the first pass."""
    waiting = list(lines)
    while waiting:
        words = waiting.pop(0)
        if words[:1] == ["for"]:
            name, values = words[1], [word.rstrip(";") for word in words[3:] if word != "do"]
            body, depth = [], 1
            while depth:
                line = waiting.pop(0)
                depth += (line[:1] == ["for"]) - (line == ["done"])
                body.append(line)
            for i, value in enumerate(values):
                yield from unrolled(body[:-1], {**variables, name: value}, is_run and i == 0)
        elif words:
            yield [re.sub(r"\$(\w+)", lambda match: variables[match[1]], word) for word in words], is_run


def expanded(words: list[str]) -> list[str]:
    """A shell's patterns as the paths that they match."""
    return [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]


def parse(words: list[str]) -> None:
    """Fail if a command's options are not as its code has them; nothing is run."""
    command: Any = typer.main.get_command(APPS[words[0]])
    context = None
    rest = words[1:]
    if words[0] != "msplora-train":
        context = typer.Context(command, info_name=words[0])
        _, command, rest = command.resolve_command(context, rest)
    command.make_context(command.name, list(rest), parent=context)


def train(words: list[str]) -> None:
    given = words[words.index("--model") + 1] if "--model" in words else "minilm"
    toy = ["--model", "causal" if given == "smollm2" else "encoder"] if given in EMBEDDED_MODELS else []
    with quiet_environment():
        run([*words, *toy, "--epochs", "1"])


def run(words: list[str]) -> None:
    """Run one of our commands here. Its own errors are exceptions, and so fail the test."""
    assert not APPS[words[0]](args=words[1:], prog_name=words[0], standalone_mode=False)


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """Training sets variables and filters warnings for its process, which here lives on."""
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# What is not run


def check_make(words: list[str]) -> None:
    """The target is there (a folder of its name would do for make), and what it does can be told."""
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words[1]
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_pip(words: list[str]) -> None:
    """Extras are those of the package, versions those of constraints.txt; a project of the page is made known."""
    if words[-2:] == ["-e", "."]:
        about = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
        made = Path(f"{about['name']}-{about['version']}.dist-info")  # what pip makes of it
        made.mkdir()
        lines = [f"{name} = {value}" for name, value in about["entry-points"]["msplora.formats"].items()]
        (made / "entry_points.txt").write_text("\n".join(["[msplora.formats]", *lines]), encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for word in words[2:]:
        if match := re.fullmatch(r"(?:\.|msplora)\[(.+)\]", word):
            assert extras.keys() >= set(match[1].split(",")), word
        elif "==" in word:
            assert word in pinned, word


def check_parsing(words: list[str]) -> None:
    parse(words)


def check_launched(words: list[str]) -> None:
    names = {"msplora_core.cli": "msplora-train", "msplora_core.measure.cli": "msplora-measure"}
    (module,) = names.keys() & set(words)  # a launcher starts python -m module
    parse([names[module], *words[words.index(module) + 1 :]])


def check_script(words: list[str]) -> None:
    """The script is there, and has the options."""
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    for word in words[2:]:
        assert not word.startswith("--") or word in source, word


def run_script(words: list[str]) -> None:
    """A script of the page."""
    runpy.run_path(words[1])


def check_nothing(words: list[str]) -> None:
    """Another project's program."""


NOT_RUN: list[tuple[str, str, Callable[[list[str]], None]]] = [
    (r"make ", "makes virtual environments and trains for minutes", check_make),
    (r"pip install ", "fetches packages", check_pip),
    (r"(torchrun|accelerate launch) ", "starts several processes; tests/core/test_distributed.py does", check_launched),
    (r"lm_eval ", "needs models and data of the Hub", check_nothing),
    (r"msplora-\w+ .*\b(hf|s3|https)://", "reads from the network", check_parsing),
    (r"msplora-analyze .*--base", "needs a whole model before and after training", check_parsing),
    (r"msplora-train .*--resume", "goes on after a kill; tests/core/test_crash.py does", check_parsing),
    (r"msplora-train .*--anneal", "one step has no room for a cut; tests/core/test_annealing.py has", check_parsing),
    (
        r"msplora-analyze merge .*--kl",
        "needs moments of two tasks; tests/analysis/test_merge.py has",
        check_parsing,
    ),
    (r"msplora-measure added ", "needs runs of several tasks; tests/core/test_adding.py has", check_parsing),
    (r"msplora-analyze export runs/alpaca/", "of a training of full length; docs/export.md runs export", check_parsing),
    (r"python invent\.py", "runs in this process", run_script),
    (r"python (study|benchmarks|examples|notebooks)/\w+\.py", "takes minutes", check_script),
]


def check(command: Command) -> bool:
    """Whether a command is one of those that are not run; it is checked then."""
    line = " ".join(command.words)
    for pattern, _, checked in NOT_RUN:
        if re.match(pattern, line):
            checked(command.words)
            return True
    return False


# Workspaces


@pytest.fixture(scope="session")
def provided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy models and data by the names that pages use."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.core.conftest import make_roberta
    from tests.core.toys import WORDS, save_data, save_model

    folder = tmp_path_factory.mktemp("provided")
    save_model(folder / "causal", "llama")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }  # for rank 64
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60)).save_pretrained(folder / "causal")
    shutil.copytree(folder / "causal", folder / "meta-llama" / "Llama-2-7b-hf")
    save_model(folder / "encoder")
    roberta = folder / "FacebookAI" / "roberta-base"
    shutil.copytree(folder / "encoder", roberta)
    make_roberta().save_pretrained(roberta)
    save_data(folder / "data")
    shutil.copytree(folder / "data", folder / "glue")
    hub = folder / "nyu-mll" / "glue"  # a folder of this name is taken for the Hub's data set
    hub.mkdir(parents=True)
    tasks = {"cola": ["sentence"], "mrpc": ["sentence1", "sentence2"]}
    configs = []
    for task, columns in tasks.items():
        rows = [dict.fromkeys(columns, " ".join(WORDS[i % 5 : i % 5 + 4])) | {"label": i % 2} for i in range(20)]
        files = {split: f"{task}_{split}.jsonl" for split in ("train", "validation")}
        for name in files.values():
            (hub / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        configs.append({"config_name": task, "data_files": [{"split": s, "path": p} for s, p in files.items()]})
    (hub / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, provided: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with what every page may take for granted."""
    import datasets

    from msplora_analysis import formats as adapter_formats
    from msplora_analysis.show.drawing.plot import KINDS, Plot
    from msplora_core.data import loading
    from msplora_core.data.acceptability import generate

    for path in provided.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    adapter_formats.added.cache_clear()  # a page adds its own
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".datasets"))

    monkeypatch.setattr(loading, "generate", lambda split: generate(split, size=20))

    def write(plot: Plot, folder: Path, formats: Any, style: str | None = None) -> list[Path]:
        paths = numbers(plot, folder, ())
        pictures = [folder / f"{plot.stem}.{name}" for name in formats if plot.draw]
        for picture in pictures:
            picture.touch()
        return [*paths, *pictures]

    numbers = Plot.write
    monkeypatch.setattr(Plot, "write", write)
    yield tmp_path
    KINDS.pop("largest_values", None)  # a page adds it
    adapter_formats.added.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def put(assumed: dict[str, str], workspace: Path) -> None:
    for name, source in assumed.items():
        shutil.copytree(ROOT / "examples" / "runs" / source, workspace / name)


# The tests


def lines(text: str) -> list[str]:
    """Of an output: what a reader sees."""
    return [line.rstrip() for line in text.strip("\n").splitlines() if line.strip()]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.name in QUICK else [pytest.mark.slow]) for page in PAGES],
    ids=lambda page: page.name,
)
def test_every_block_runs(page: Path, workspace: Path) -> None:
    put(ASSUMED.get(page.name, {}), workspace)
    blocks = blocks_of(page)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if "base_model" in "".join(block.text for block in blocks):
        from tests.core.conftest import make_bert

        namespace["base_model"] = make_bert(layers=3)
    printed = ""
    for block in blocks:
        where = f"{page.name}, line {block.line}"
        output = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(output):
            warnings.simplefilter("ignore")
            if block.title:
                (workspace / block.title).parent.mkdir(exist_ok=True)
                (workspace / block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            elif block.language in ("bash", "console"):
                for command in commands_of(block):
                    run_command(command, where)
            elif block.language == "text" and printed:
                assert lines(printed) == lines(block.text), (
                    f"{where} shows\n{block.text}\nbut this is printed:\n{printed}"
                )
            else:
                assert block.language in ("text", "math", ""), f"{where}: nothing tests a block of {block.language}"
        printed = output.getvalue() if block.language == "python" else ""


def run_command(command: Command, where: str) -> None:
    words = command.words
    while words and re.match(r"[A-Z_]+=", words[0]):  # a variable for the command
        words = words[1:]
    if check(command._replace(words=words)):
        return
    assert words[0] in APPS, f"{where}: {words[0]} is neither a command of ours nor in NOT_RUN"
    if not command.is_run:
        parse(words)
        return
    output = io.StringIO()
    if words[1] == "watch":
        words = [*words, "--once"]
    with contextlib.redirect_stdout(output):
        (train if words[0] == "msplora-train" else run)(expanded(words))
    if command.shown is not None:
        assert lines(output.getvalue()) == lines(command.shown), f"{where}: {' '.join(words)}\n{output.getvalue()}"


def test_examples_of_the_commands_help_can_be_parsed() -> None:
    seen = 0
    for name, app in APPS.items():
        command: Any = typer.main.get_command(app)
        for one in [command, *getattr(command, "commands", {}).values()]:
            for line in (one.epilog or "").replace("\\\n", " ").splitlines():
                text = re.sub(r"\s{2,}\(.*|>.*", "", line.strip())
                if text.startswith(f"{name} "):
                    parse(shlex.split(text))
                    seen += 1
    assert seen > 20


def test_commands_within_sentences_are_there() -> None:
    seen = 0
    for page in PAGES:
        tokens = [
            child
            for token in MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))
            for child in token.children or ()
        ]
        for text in (token.content for token in tokens if token.type == "code_inline"):
            words = [word for word in text.replace("…", " ").split() if "..." not in word]
            if words[:1] == ["make"] and len(words) > 1:
                check_make(words[:2])
            elif words and words[0] in APPS and len(words) > 1:
                command: Any = typer.main.get_command(APPS[words[0]])
                if words[0] == "msplora-analyze" and not words[1].startswith("-") and words[1] != "COMMAND":
                    command = command.commands[words[1]]
                options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
                wrong = {word.strip("[]") for word in words if word.strip("[]").startswith("--")} - options
                assert not wrong, f"{page.name}: {text}"
                seen += 1
    assert seen > 20


def test_every_exception_is_used() -> None:
    commands = [
        " ".join(c.words)
        for page in PAGES
        for b in blocks_of(page)
        if b.language in ("bash", "console")
        for c in commands_of(b)
    ]
    commands = [re.sub(r"^([A-Z_]+=\S+ )+", "", command) for command in commands]
    unused = [pattern for pattern, _, _ in NOT_RUN if not any(re.match(pattern, command) for command in commands)]
    assert not unused
    assert ASSUMED.keys() <= {page.name for page in PAGES}


@pytest.mark.parametrize(
    "line",
    ["msplora-train --rnak 8 --output-dir x", "msplora-analyze spektra x --out y", "curl https://x", "make nonsense"],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        run_command(Command(line.split(), False, None), "here")
