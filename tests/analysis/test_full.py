"""Whole models against their base: files, shards and names as transformers and PyTorch write them."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import assert_promised
from safetensors.numpy import save_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.adapters.magnitude import magnitude_change
from msplora_analysis.compute.linalg.spectra import adapter_spectra
from msplora_analysis.files.opening import PairedFile, ShardedFile, open_checkpoint
from msplora_analysis.formats import full
from msplora_analysis.options import Options

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SHARDED = {"max_shard_size": "20KB"}


def bert(kind="BertForSequenceClassification", **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **shape, **changes)
    return getattr(transformers, kind)(config)


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tuned(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def load(path: Path, base: Path, unknown=()):
    with PairedFile(open_checkpoint(path), base) as file:
        assert full.FORMAT.matches({}, file)
        matrices, names, notes = full.read({}, file, Options(base=str(base)))
        assert names == list(unknown)
        sigma = [found.sigma for found in adapter_spectra(file, matrices)]
    assert all(matrix.scale == "layer" for matrix in matrices)
    return {matrix.name: (matrix, values) for matrix, values in zip(matrices, sigma, strict=True)}, notes


def error(path: Path, base: Path) -> str:
    with pytest.raises(AnalysisError) as caught:
        load(path, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_differences(found, after: torch.nn.Module, before: torch.nn.Module, prefix="") -> None:
    """The matrices are the differences of all weights of ``before``, whose names lack ``prefix``."""
    weights = {name: p for name, p in before.named_parameters() if p.dim() > 1}
    assert found.keys() == {prefix + name.removesuffix(".weight") for name in weights}
    for name, weight in weights.items():
        dense = after.get_parameter(prefix + name).detach().double() - weight.detach().double()
        matrix, sigma = found[prefix + name.removesuffix(".weight")]
        assert (matrix.update.rows, matrix.update.cols) == (len(weight), weight[0].numel())
        assert_promised(sigma, np.linalg.svd(dense.numpy().reshape(len(weight), -1), compute_uv=False))


@pytest.mark.parametrize("base_options", [{}, SHARDED], ids=["base in one file", "base sharded"])
@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "sharded"])
@pytest.mark.parametrize("make", [bert, llama])
def test_transformers_models(tmp_path, make, options, base_options):
    before = make()
    after = tuned(before)
    before.save_pretrained(tmp_path / "base", **base_options)
    after.save_pretrained(tmp_path / "tuned", **options)
    assert ((tmp_path / "tuned" / "model.safetensors.index.json").exists()) == bool(options)
    found, notes = load(tmp_path / "tuned", tmp_path / "base")
    assert_differences(found, after, before)
    assert notes == []
    name = "bert.encoder.layer.1.attention.self.query" if make is bert else "model.layers.1.self_attn.q_proj"
    matrix = found[name][0]
    assert (matrix.group, matrix.module) == (1, name.rpartition(".")[2])


def test_pytorch_shards(tmp_path):
    before = llama()
    after = tuned(before)
    for folder, model in (("base", before), ("tuned", after)):
        (tmp_path / folder).mkdir()
        weight_map = {}
        for i, (name, tensor) in enumerate(model.state_dict().items()):
            shard = f"pytorch_model-{i % 3}.bin"
            weight_map[name] = shard
            path = tmp_path / folder / shard
            torch.save((torch.load(path) if path.exists() else {}) | {name: tensor}, path)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (tmp_path / folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found, _ = load(tmp_path / "tuned", tmp_path / "base" / "pytorch_model.bin.index.json")
    assert_differences(found, after, before)


def test_single_pytorch_file(tmp_path):
    before = llama()
    after = tuned(before)
    torch.save(before.state_dict(), tmp_path / "base.pt")
    (tmp_path / "tuned").mkdir()
    torch.save(after.state_dict(), tmp_path / "tuned" / "pytorch_model.bin")
    found, _ = load(tmp_path / "tuned", tmp_path / "base.pt")
    assert_differences(found, after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    before = llama().to(dtype)
    after = tuned(before)
    before.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned", **SHARDED)
    found, _ = load(tmp_path / "tuned", tmp_path / "base")
    assert_differences(found, after, before)


def test_frozen_weights_are_zero(tmp_path):
    before = llama()
    before.save_pretrained(tmp_path / "base")
    found, _ = load(tmp_path / "base", tmp_path / "base")
    assert all((sigma == 0).all() for _, sigma in found.values())


# Names


def test_base_without_the_prefix_of_its_body(tmp_path):
    before = bert("BertModel", num_labels=2)
    after = bert()
    after.bert = tuned(before)
    before.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned", **SHARDED)
    found, notes = load(tmp_path / "tuned", tmp_path / "base")
    assert_differences(found, after, before, prefix="bert.")
    assert notes == ["not in the base, or of another shape there, and left out: classifier.weight"]


def test_checkpoint_without_the_prefix(tmp_path):
    before = llama()
    after = tuned(before.model)
    before.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned")
    found, notes = load(tmp_path / "tuned", tmp_path / "base")
    assert_differences(found, after, before.model)
    assert notes == ["weights of the base that the checkpoint does not have, left out (1): lm_head.weight"]


def test_another_head_than_the_base(tmp_path):
    before = bert("BertForMaskedLM")
    after = bert()
    before.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned")
    found, notes = load(tmp_path / "tuned", tmp_path / "base", unknown=["bert.pooler.dense.weight"])
    assert "bert.encoder.layer.0.output.dense" in found
    assert [note.partition(":")[0] for note in notes] == [
        "not in the base, or of another shape there, and left out",
        "weights of the base that the checkpoint does not have, left out (1)",
    ]


def test_classifiers_of_two_tasks(tmp_path):
    bert(num_labels=2).save_pretrained(tmp_path / "base")
    bert(num_labels=3).save_pretrained(tmp_path / "tuned")
    found, notes = load(tmp_path / "tuned", tmp_path / "base")
    assert "classifier" not in found
    assert notes[0] == "not in the base, or of another shape there, and left out: classifier.weight"


def write(folder: Path, **tensors) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(len(folder.name))
    arrays = {
        name: rng.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else value
        for name, value in tensors.items()
    }
    save_file(arrays, folder / "model.safetensors")
    return folder


def test_two_prefixes_that_fit(tmp_path):
    tuned = write(tmp_path / "tuned", **{"layers.0.q.weight": (3, 4)})
    base = write(tmp_path / "base", **{"encoder.layers.0.q.weight": (3, 4), "decoder.layers.0.q.weight": (3, 4)})
    message = "the checkpoint's names fit the base's by more than one prefix: decoder. or encoder."
    assert error(tuned, base) == message


def test_another_model(tmp_path):
    tuned = write(tmp_path / "tuned", **{"layers.0.q.weight": (3, 4)})
    base = write(tmp_path / "base", **{"h.0.c_attn.weight": (3, 4)})
    assert error(tuned, base) == (
        "no weight of the checkpoint (layers.0.q.weight) is in the base (h.0.c_attn.weight); is it another model?"
    )


# Shapes


@pytest.mark.parametrize("size", [48, 53])
def test_resized_embeddings(tmp_path, size):
    before = llama(tie_word_embeddings=True)
    before.save_pretrained(tmp_path / "base")
    after = tuned(before)
    after.resize_token_embeddings(size, mean_resizing=False)
    after.save_pretrained(tmp_path / "tuned")
    found, notes = load(tmp_path / "tuned", tmp_path / "base")
    count = min(size, 50)
    assert notes == [f"model.embed_tokens.weight has {size} rows, in the base 50: the first {count} are compared"]
    after, before = (model.model.embed_tokens.weight.detach().double().numpy()[:count] for model in (after, before))
    assert_promised(found["model.embed_tokens"][1], np.linalg.svd(after - before, compute_uv=False))


def test_other_shapes(tmp_path):
    tuned = write(tmp_path / "tuned", **{"layers.0.q.weight": (3, 4), "embed.weight": (5, 4)})
    base = write(tmp_path / "base", **{"layers.0.q.weight": (3, 2), "embed.weight": (5, 4)})
    assert error(tuned, base) == ("tensor layers.0.q.weight has shape [3, 4], in the base [3, 2]; is it another model?")


def test_what_is_a_matrix(tmp_path):
    shapes = {
        "conv.weight": (6, 3, 2, 2),
        "conv1d.weight": (6, 1, 4),
        "pointwise.weight": (6, 5, 1, 1),
        "position_embeddings": (1, 7, 4),
        "cls_token": (1, 1, 4),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "h.0.attn.bias": (1, 1, 8, 8),
        "temperature": (),
        "experts.gate_up_proj": (2, 3, 4),
        "embeddings.position_ids": np.arange(16)[None],
    }
    tuned, base = (write(tmp_path / folder, **shapes) for folder in ("tuned", "of base"))
    found, _ = load(tuned, base, unknown=["experts.gate_up_proj"])
    assert {name: (m.update.rows, m.update.cols) for name, (m, _) in found.items()} == {
        "conv": (6, 12),
        "conv1d": (6, 4),
        "pointwise": (6, 5),
        "position_embeddings": (7, 4),
    }


def test_a_checkpoint_that_was_merged_in_4_bits(tmp_path):
    """Blocks of 64 values share a scale and have 16 levels: half of the norm of this difference is that rounding."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 128)).astype(np.float32)
    blocks = weight.reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 7.5
    rounded = ((np.round(blocks / scales - 0.5) + 0.5) * scales).reshape(weight.shape)
    save_file({"l.0.q.weight": weight}, tmp_path / "base.safetensors")
    for name, tuned, noted in (("four", rounded, True), ("all", weight + 0.01, False), ("zero", 0 * weight, False)):
        save_file({"l.0.q.weight": tuned}, tmp_path / f"{name}.safetensors")
        _, notes = load(tmp_path / f"{name}.safetensors", tmp_path / "base.safetensors")
        assert any("merged in 4 bits" in note for note in notes) == noted


@pytest.mark.parametrize("beside", ["weight.absmax", "qweight", "weight_scale_inv"])
def test_quantised_weights_are_not_compared(tmp_path, beside):
    weights = {"l.q.weight": np.ones((4, 4), np.float32)}
    save_file(weights, tmp_path / "a.safetensors")
    save_file({**weights, f"l.q.{beside}": np.ones(4, np.float32)}, tmp_path / "b.safetensors")
    for tuned, base, which in (("a", "b", "base"), ("b", "a", "checkpoint")):
        with pytest.raises(AnalysisError, match=rf"the {which} is quantised \(it has l.q.{beside}\)"):
            load(tmp_path / f"{tuned}.safetensors", tmp_path / f"{base}.safetensors")


def test_not_finite(tmp_path):
    bad = np.ones((3, 4), dtype=np.float32)
    bad[1, 2] = np.nan
    tuned = write(tmp_path / "tuned", **{"q.weight": (3, 4)})
    base = write(tmp_path / "base", **{"q.weight": bad})
    assert "tensor base:q.weight holds NaN or Inf" in error(tuned, base)


# Files


@pytest.fixture
def shards(tmp_path):
    llama().save_pretrained(tmp_path / "model", **SHARDED)
    return tmp_path / "model"


def test_shards_are_one_file(shards):
    model = llama()
    with open_checkpoint(shards) as file:
        assert isinstance(file, ShardedFile)
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in reversed(file.shapes):
            np.testing.assert_array_equal(file.read(name), model.state_dict()[name].numpy())


def spoil_index(change):
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: next(folder.glob("*-00002-*")).unlink(), "its shard model-00002-of-"),
        (spoil_index(lambda names: names.update(extra=next(iter(names.values())))), "tensor extra is not in its shard"),
        (
            spoil_index(lambda names: names.update(extra="../model.safetensors")),
            "weight_map names ../model.safetensors, no file beside it",
        ),
        (spoil_index(lambda names: names.update(extra=1)), "weight_map.extra must be a text"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "expected a JSON object, got list"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "not valid JSON: "),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no model in this folder; expected one of"),
        (shutil.rmtree, "no such file or folder; expected a model's weights, or their folder"),
    ],
)
def test_files_that_cannot_be_used(shards, spoil, message):
    spoil(shards)
    with pytest.raises(AnalysisError) as caught:
        open_checkpoint(shards)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(shards))


# DoRA


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 6)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.embedding = torch.nn.Embedding(11, 7)
        self.conv1d = transformers.pytorch_utils.Conv1D(9, 4)


@pytest.mark.parametrize(
    ("module", "options"),
    [("linear", {}), ("conv", {}), ("embedding", {"embedding": True}), ("conv1d", {"fan_in_fan_out": True})],
)
def test_magnitudes_of_dora(module, options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = Layers().double()
    weight = layers.get_parameter(f"{module}.weight").detach().numpy().copy()
    config = peft.LoraConfig(
        r=2, target_modules=[module], use_dora=True, fan_in_fan_out=options.get("fan_in_fan_out", False)
    )
    saved = peft.get_peft_model_state_dict(peft.get_peft_model(layers, config))
    (name, magnitude), *_ = [(key, value.numpy()) for key, value in saved.items() if "magnitude" in key]
    untouched = magnitude_change(magnitude, weight, name=name, **options)
    assert untouched == pytest.approx((0, 0), abs=1e-6)
    factors = np.ones(magnitude.size)
    factors[1:3] = 0.5, 1.2
    changed = magnitude_change(magnitude * factors.reshape(magnitude.shape), weight, name=name, **options)
    assert changed == pytest.approx((0.7 / magnitude.size, 0.5), abs=1e-6)


def test_magnitudes_that_do_not_fit():
    with pytest.raises(AnalysisError, match="tensor m has 3 magnitudes, the base's weight 4 outputs; is it another"):
        magnitude_change(np.ones(3), np.ones((4, 3)), name="m")


def test_magnitudes_of_zero_rows_are_left_out():
    weight = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert magnitude_change([1.0, 6.0], weight, name="m") == pytest.approx((0.2, 0.2))
    assert np.isnan(magnitude_change([1.0], weight[:1], name="m")).all()


def test_dora_tells_how_far_the_magnitudes_moved(tmp_path):
    peft = pytest.importorskip("peft")
    base = bert("BertModel")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query"], use_dora=True)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5 if "layer.1" in name else 1.1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"by 30.00% in the mean, at most 50.00% \(in encoder.layer.1.attention"):
        spectra = ma.load_spectra(tmp_path / "adapter", base=str(tmp_path / "base"))
    assert spectra["name"].nunique() == 2


def test_the_command_reads_full_checkpoints_of_a_run(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    for step in (10, 20):
        torch.manual_seed(step)
        tuned(base).save_pretrained(tmp_path / "run" / f"checkpoint-{step}", **SHARDED)
    metrics = ma.load_metrics(tmp_path / "run", base=str(tmp_path / "base"))
    assert metrics.groupby("step").size().tolist() == [17, 17]
    assert metrics["effective_rank"].notna().all()
    assert (metrics["rank"] == metrics[["rows", "cols"]].min(axis=1)).all()


def test_a_device_that_is_not_there(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    options = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "tables"), "--device", "nowhere"]
    result = CliRunner().invoke(cli.make_app(), ["spectra", str(tmp_path / "base"), *options])
    assert isinstance(result.exception, AnalysisError)
    assert "device=nowhere" in str(result.exception)


def test_only_the_largest_of_many_values_leave_the_rest_empty(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    changed = tuned(base)
    changed.save_pretrained(tmp_path / "tuned")
    with pytest.warns(UserWarning, match="only the largest singular values"):
        spectra, metrics = ma.load_tables(tmp_path / "tuned", base=str(tmp_path / "base"), top_k=3)
    name = "bert.encoder.layer.0.attention.self.query"
    difference = (
        changed.get_submodule(name).weight.detach().double() - base.get_submodule(name).weight.detach().double()
    )
    exact = np.linalg.svd(difference.numpy(), compute_uv=False)
    np.testing.assert_allclose(spectra[spectra["name"] == name]["sigma"], exact[:3], rtol=1e-5)
    row = metrics[metrics["name"] == name].iloc[0]
    assert (row["rank"], row["rows"]) == (24, 24)
    assert row["frobenius"] == pytest.approx(np.linalg.norm(exact))
    assert row["stable_rank"] == pytest.approx((exact**2).sum() / exact[0] ** 2)
    assert row[["effective_rank", "nuclear", "participation_ratio", "m_eff_1"]].isna().all()
