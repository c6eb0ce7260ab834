"""The section that `card` writes into an adapter's README.md."""

import numpy as np
import pytest
from adapters import lora_config, lora_tensors, write_adapter
from typer.testing import CliRunner

from msplora_analysis import AnalysisError
from msplora_analysis.cli import app
from msplora_analysis.options import Execution, Options
from msplora_analysis.show.card import FIGURE, write_card


def write(folder) -> str:
    write_card(folder, Options(), Execution(cache=False))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_dense_update(tmp_path):
    tensors = lora_tensors("layer.0.query", rank=4)
    text = write(write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8)))
    a, b = (next(t for name, t in tensors.items() if f"lora_{side}" in name).astype(np.float64) for side in "AB")
    sigma = np.linalg.svd(2 * b @ a, compute_uv=False)[:4]
    shares = sigma / sigma.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    needed = 1 + np.searchsorted(np.cumsum(sigma**2) / (sigma**2).sum(), 0.99)
    assert f"| layer | query | 1 | 4 | {np.linalg.norm(sigma):.3g} | {rank:.3g} | {needed} |" in text
    assert (tmp_path / "a" / FIGURE).read_bytes().startswith(b"\x89PNG")


def test_the_rest_of_the_file_stays_and_a_second_call_replaces_the_section(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\nWords – kept.\n", encoding="utf-8")
    first = write(folder)
    assert first.startswith("---\nlicense: mit\n---\n# Mine\nWords – kept.\n")
    (folder / "README.md").write_text(first + "After.\n", encoding="utf-8")
    assert write(folder) == first + "After.\n"


def test_names_of_strangers_are_no_markup(tmp_path):
    text = write(write_adapter(tmp_path / "a", lora_tensors("layer.0.<b>|[x](y)")))
    assert "<b>" not in text
    assert r"&lt;b&gt;\|\[x\](y)" in text


def test_what_cannot_have_a_card(tmp_path):
    for step in (1, 2):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(AnalysisError, match=r"2 adapters; give one, such as .*checkpoint-2"):
        write(tmp_path / "run")
    folder = write_adapter(tmp_path / "a")
    (folder / "README.md").write_bytes(b"\xff")
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert "README.md: not UTF-8" in str(result.exception)
    assert not (folder / FIGURE).exists()
