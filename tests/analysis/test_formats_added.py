"""Formats of other packages, found by their entry points, from spectra to export."""

import json
import sys

import numpy as np
import pytest
from adapters import write_adapter
from safetensors.numpy import load_file, save_file

import msplora_analysis as ma
from msplora_analysis import formats

TOY = '''
"""scaling · B R A, as LoRA-XS."""

from msplora_analysis.formats.helpers.parts import expect_shape, group_parts, layer_matrix
from msplora_analysis.formats.helpers.settings import needed_number
from msplora_analysis.formats.protocol import Format
from msplora_analysis.formats.updates import Factor, Product, Sum, contents


def read(config, file, options):
    modules, unknown = group_parts(file.shapes, config, ("xs_A", "xs_R", "xs_B"))
    matrices = []
    for name, parts in modules.items():
        a, r, b = parts["xs_A"], parts["xs_R"], parts["xs_B"]
        rank, cols = expect_shape(file.shapes, a, None, None)
        rows, _ = expect_shape(file.shapes, b, None, rank)
        scaling = needed_number(config, "lora_alpha") / rank if config else 1.0
        product = Product(Factor((r, a), rank, cols, multiplied), Factor((b,), rows, rank), scaling)
        matrices.append(layer_matrix(name, Sum((product,))))
    return contents(matrices, unknown)


def multiplied(r, a):
    return r.astype(float) @ a


FORMAT = Format(
    name="LoRA-XS",
    read=read,
    peft_types=("TOY_XS",),
    lone=lambda names: any(name.endswith(".xs_R") for name in names),
    why_no_lora=lambda config, shapes, matrices: config.get("never"),
)
'''
KEY = "base_model.model.layers.{}.query"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that puts a package with an adapter format where Python finds packages."""
    formats.added.cache_clear()
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name: str, source: str) -> None:
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)  # of another test
        about = tmp_path / "site" / f"{name}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[msplora.formats]\ntoy = {name}_module:FORMAT\n")
        (about.parent / f"{name}_module.py").write_text(source)

    yield install
    formats.added.cache_clear()


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"xs_A": (4, 32), "xs_R": (4, 4), "xs_B": (24, 4)}
    return {f"{KEY.format(i)}.{part}": rng.normal(size=size) for i in range(2) for part, size in sizes.items()}


def dense(values, layer, scaling=2.0):
    a, r, b = (values[f"{KEY.format(layer)}.{part}"] for part in ("xs_A", "xs_R", "xs_B"))
    return scaling * b @ r @ a


def error(function, *args, **options):
    with pytest.raises(ma.AnalysisError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_spectra(tmp_path, installed, workers):
    installed("toy", TOY)
    for step in range(8):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        write_adapter(folder, tensors(step), {"peft_type": "TOY_XS", "lora_alpha": 8})
    spectra = ma.load_spectra(tmp_path / "run", workers=workers, cache=False)
    for (step, layer), rows in spectra.groupby(["step", "group"]):
        exact = np.linalg.svd(dense(tensors(step), layer), compute_uv=False)[:4]
        np.testing.assert_allclose(rows["sigma"], exact, rtol=1e-10)
    assert len(spectra) == 8 * 2 * 4


def test_export_and_compress(tmp_path, installed):
    installed("toy", TOY)
    config = {"peft_type": "TOY_XS", "lora_alpha": 8}
    write_adapter(tmp_path / "a", tensors(), config)
    ma.export(tmp_path / "a", tmp_path / "b")
    ma.compress(tmp_path / "a", tmp_path / "c", rank=2)
    for layer in range(2):
        exact = dense(tensors(), layer)
        u, sigma, vt = np.linalg.svd(exact)
        for out, expected in (("b", exact), ("c", u[:, :2] * sigma[:2] @ vt[:2])):
            written = load_file(tmp_path / out / "adapter_model.safetensors")
            a, b = (written[f"{KEY.format(layer)}.lora_{factor}.weight"] for factor in "AB")
            np.testing.assert_allclose(b @ a, expected, rtol=0, atol=1e-10)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    write_adapter(tmp_path / "d", tensors(), {**config, "never": "its update is not what it seems"})
    assert error(ma.export, tmp_path / "d", tmp_path / "e").endswith(
        "/d/adapter_model.safetensors: its update is not what it seems"
    )


def test_a_lone_file_is_found_in_a_folder(tmp_path, installed):
    save_file(tensors(), tmp_path / "some.safetensors")
    assert "no adapter found" in error(ma.load_spectra, tmp_path)
    installed("toy", TOY)
    formats.added.cache_clear()
    exact = np.linalg.svd(dense(tensors(), 0, scaling=1.0), compute_uv=False)[:4]
    spectra = ma.load_spectra(tmp_path, cache=False)
    np.testing.assert_allclose(spectra.loc[spectra["group"] == 0, "sigma"], exact, rtol=1e-10)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("FORMAT = 3", "int"),
        ("", "FORMAT"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two"),
    ],
)
def test_a_broken_package_is_named_where_it_might_be_needed(tmp_path, installed, source, reason):
    installed("broken", source)
    write_adapter(tmp_path / "other", tensors(), {"peft_type": "TOY_XS"})
    message = error(ma.load_spectra, tmp_path / "other")
    assert "package broken: " in message
    assert reason in message
    assert "update or uninstall it" in message
    assert len(ma.load_spectra(write_adapter(tmp_path / "ours"))) > 0


def test_what_is_added_is_among_what_is_supported(tmp_path, installed):
    installed("toy", TOY)
    message = error(ma.load_spectra, write_adapter(tmp_path / "a", config={"peft_type": "NEWEST"}))
    assert {"LORA", "MSPLORA", "PVERA", "TOY_XS"} <= set(message.partition("supported: ")[2].split(", "))
