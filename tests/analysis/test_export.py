"""Exported and compressed adapters, as plain PEFT loads them: PEFT's delta weights are the truth."""

import copy
import itertools
import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from adapters import lora_config, lora_tensors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.compute.choose import allocate

peft = pytest.importorskip("peft")
from msplora_core import MSPLoraConfig  # noqa: E402

torch.set_num_threads(1)

PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12, bias=False)
        self.value = nn.Linear(12, 8)

    def forward(self, x):
        return self.query(x) + self.value(x).repeat(1, 2)[:, :12]


class Blocks(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Others(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.words = nn.Embedding(30, 10)
        self.one = nn.Conv1d(8, 12, 3, groups=groups)
        self.two = nn.Conv2d(8, 12, (3, 2))
        self.attention = nn.MultiheadAttention(10, 2)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=24, n_layer=1, n_head=2))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
    return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes)).eval()


def adapted(base, config):
    """A copy of ``base`` with an adapter of random values."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lambda_d" not in name:
            nn.init.normal_(parameter)
    return model.eval()


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded(base, folder):
    """Plain PEFT's model of an adapter, which must find every tensor it expects, and none that it does not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert not [one for one in caught if "keys" in str(one.message)], [str(one.message) for one in caught]
    assert model.peft_config["default"].peft_type == "LORA"
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # With bias="all", PEFT saves those of heads three times, under names that it does not load.
    names = {name for name in expected if ".modules_to_save." not in name and ".original_module." not in name}
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert names == set(file.keys())
    return model.eval()


def updates(model):
    """PEFT's delta weight of every adapted module, in float64."""
    model = copy.deepcopy(model).double()
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_same(actual, expected, tolerance):
    assert expected
    assert sorted(actual) == sorted(expected)
    for name, delta in expected.items():
        assert np.linalg.norm(actual[name] - delta) <= tolerance * np.linalg.norm(delta), name
        assert np.linalg.norm(delta) > 0


def error(function, *args, **options):
    with pytest.raises(AnalysisError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


QUERY_VALUE = {"target_modules": ["query", "value"]}
METHODS = {
    "lora": (Blocks, peft.LoraConfig(r=3, lora_alpha=7, **QUERY_VALUE)),
    "patterns": (
        Blocks,
        peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"1.query": 2}, alpha_pattern={"value": 5}, **QUERY_VALUE),
    ),
    "msplora": (lambda: Blocks(7), MSPLoraConfig(r=4, lora_alpha=10, **QUERY_VALUE)),
    "msplora of one scale": (Blocks, MSPLoraConfig(ranks={"layer": 3}, **QUERY_VALUE)),
    "adalora": (Blocks, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **QUERY_VALUE)),
    "vera": (Blocks, peft.VeraConfig(r=5, **QUERY_VALUE)),
    "vblora": (Blocks, peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **QUERY_VALUE)),
    "delora": (Blocks, peft.DeloraConfig(r=3, **QUERY_VALUE)),
    "gralora": (Blocks, peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, **QUERY_VALUE)),
    "embedding and convolutions": (Others, peft.LoraConfig(r=3, target_modules=["words", "one", "two"])),
    "Conv1D": (gpt2, peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path, method):
    make, config = METHODS[method]
    base = make()
    model = adapted(base, config)
    expected = updates(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = ma.export(save(model, tmp_path / "a"), tmp_path / "b")
        ma.compress(tmp_path / "a", tmp_path / "c", energy=1.0)
        cut = ma.compress(tmp_path / "a", tmp_path / "d", rank=2)
    assert_same(updates(loaded(base, tmp_path / "b")), expected, 1e-6)
    assert_same(updates(loaded(base, tmp_path / "c")), expected, 1e-6)
    assert sorted(table["name"]) == sorted(expected)
    # Embeddings and Conv1D have PEFT's delta transposed, convolutions unfolded: the same singular values.
    exact = {name: np.linalg.svd(delta.reshape(delta.shape[0], -1))[1] for name, delta in expected.items()}
    for name, delta in updates(loaded(base, tmp_path / "d")).items():
        (row,) = cut[cut["name"] == name].to_dict("records")
        lost = np.linalg.norm(delta - expected[name]) / np.linalg.norm(expected[name])
        best = np.linalg.norm(exact[name][2:]) / np.linalg.norm(exact[name])
        assert lost == pytest.approx(best, abs=1e-6)
        assert row["error"] == pytest.approx(best, abs=1e-7)
        assert row["energy"] == pytest.approx(1 - best**2)
        assert row["norm"] == pytest.approx(np.linalg.norm(exact[name]), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_outputs_head_and_biases(tmp_path, dtype, tolerance):
    base = bert().to(dtype)
    model = adapted(base, MSPLoraConfig(r=4, bias="all", task_type="SEQ_CLS", **QUERY_VALUE)).to(dtype)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = model(tokens).logits
        save(model, tmp_path / "a")
        for function, options in ((ma.export, {}), (ma.compress, {"energy": 1.0})):
            out = tmp_path / function.__name__
            function(tmp_path / "a", out, **options)
            plain = loaded(base, out)
            actual = plain.to(dtype)(tokens).logits
            assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
            config = plain.peft_config["default"]
            assert set(config.modules_to_save) == {"classifier", "score"}
            assert config.task_type == "SEQ_CLS"
            head = plain.base_model.model.classifier.modules_to_save["default"].weight
            assert torch.equal(head, model.base_model.model.classifier.modules_to_save["default"].weight)


def test_biases_of_modules_that_are_left_out(tmp_path):
    base = bert()
    model = save(adapted(base, peft.LoraConfig(r=2, bias="all", task_type="SEQ_CLS", **QUERY_VALUE)), tmp_path / "a")
    table = ma.compress(model, tmp_path / "b", budget=100)
    assert sorted(table["rank"])[0] == 0
    found = loaded(base, tmp_path / "b").state_dict()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, rank in zip(table["name"], table["rank"], strict=True):
        actual = found[f"{PREFIX}{name}.base_layer.bias" if rank else f"{PREFIX}{name}.bias"]
        assert np.array_equal(actual, tensors[f"{PREFIX}{name}.base_layer.bias"])


def test_modules_that_adalora_pruned(tmp_path):
    save(adapted(Blocks(), METHODS["adalora"][1]), tmp_path / "a")
    path, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    tensors = load_file(path)
    name = f"{PREFIX}layers.0.query"
    for part, cut in (("lora_A", np.s_[:0]), ("lora_E", np.s_[:0]), ("lora_B", np.s_[:, :0])):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][cut]
    save_file(tensors, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {f"{name}.lora_E": [False] * 3}}))
    with pytest.warns(UserWarning, match="pruned 1 modules"):
        ma.export(tmp_path / "a", tmp_path / "b")
    assert sorted(updates(loaded(Blocks(), tmp_path / "b"))) == ["layers.0.value", "layers.1.query", "layers.1.value"]


def test_each_module_gets_its_own_rank(tmp_path):
    """PEFT takes the keys of rank_pattern as patterns: layer 1 must not take the rank of 11, nor "." match any."""
    base = nn.ModuleDict({"layers": Blocks(13).layers, "other": Blocks(2), "layersX11": Block()})
    rng = np.random.default_rng(0)
    tensors = {}
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    for i, name in enumerate(names):
        a, b = rng.standard_normal((6, 12)), rng.standard_normal((base.get_submodule(name).out_features, 6))
        b[:, i % 6 + 1 :] = 0  # rank 1 to 6
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    write_adapter(tmp_path / "a", tensors, lora_config(r=6, lora_alpha=6, target_modules=["query", "value"]))
    table = ma.compress(tmp_path / "a", tmp_path / "b", energy=1.0).set_index("name")
    assert {name: table.loc[name, "rank"] for name in names} == {name: i % 6 + 1 for i, name in enumerate(names)}
    expected = updates(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a"))
    assert_same(updates(loaded(base, tmp_path / "b")), expected, 1e-6)


def test_what_is_kept_at_each_choice(tmp_path):
    rng = np.random.default_rng(1)
    tensors = lora_tensors("layers.0.query", "layers.1.query", rank=4, rows=8, cols=12)
    # Orthogonal factors: the singular values are known.
    wanted = {"layers.0.query": [4.0, 3.0, 2.0, 1.0], "layers.1.query": [0.5, 0.1, 0.0, 0.0]}
    for name, sigma in wanted.items():
        a, b = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (12, 8))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.T.astype(np.float32, order="C")
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (b * sigma / 2).astype(np.float32)
    write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8))

    def ranks(**choice):
        table = ma.compress(tmp_path / "a", tmp_path / "b", overwrite=True, **choice)
        assert table["parameters"].tolist() == [20 * rank for rank in table["rank"]]
        config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert config["target_modules"] == [n for n, r in zip(table["name"], table["rank"], strict=True) if r]
        return table["rank"].tolist()

    assert ranks(rank=3) == [3, 2]
    assert ranks(rank=9) == [4, 2]
    assert ranks(energy=0.5) == [1, 1]
    assert ranks(energy=0.84) == [3, 1]
    assert ranks(energy=0.97) == [4, 2]
    assert ranks(budget=10**9) == [4, 2]
    assert ranks(budget=119) == [4, 1]
    assert ranks(budget=99) == [4, 0]
    assert ranks(budget=20) == [1, 0]
    table = ma.compress(tmp_path / "a", tmp_path / "b", budget=79, overwrite=True)
    assert table["error"].tolist() == pytest.approx([1 / 30**0.5, 1.0], rel=1e-6)
    assert table["energy"].tolist() == pytest.approx([29 / 30, 0.0], abs=1e-6)
    model = loaded(Blocks2Query(), tmp_path / "b")
    assert list(updates(model)) == ["layers.0.query"]


class Blocks2Query(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(12, 8)}) for _ in range(2))


GAINS = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda gains: np.sort(np.array(gains, float))[::-1])


def spent_and_gained(gains, costs, ranks):
    taken = zip(gains, costs, ranks, strict=True)
    return tuple(map(sum, zip(*((rank * cost, values[:rank].sum()) for values, cost, rank in taken), strict=True)))


def largest_gain(gains, costs, budget):
    every = itertools.product(*(range(len(values) + 1) for values in gains))
    options = (spent_and_gained(gains, costs, ranks) for ranks in every)
    return max(gained for spent, gained in options if spent <= budget)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(GAINS, st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 60))
def test_an_allocation_is_within_one_direction_of_the_best(modules, budget):
    gains, costs = zip(*modules, strict=True)
    ranks = allocate(gains, costs, budget)
    spent, gained = spent_and_gained(gains, costs, ranks)
    assert spent <= budget
    left_out = [(g[rank] / cost, g[rank]) for (g, cost), rank in zip(modules, ranks, strict=True) if rank < len(g)]
    _, first_passed_over = max(left_out, default=(0, 0))
    assert gained >= largest_gain(gains, costs, budget) - first_passed_over


@settings(max_examples=50, deadline=None)
@given(st.lists(GAINS, min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 60))
def test_no_allocation_is_better_where_all_modules_cost_the_same(gains, cost, budget):
    costs = [cost] * len(gains)
    spent, gained = spent_and_gained(gains, costs, allocate(gains, costs, budget))
    assert spent <= budget
    assert gained == largest_gain(gains, costs, budget)


def test_spectra_survive(tmp_path):
    save(adapted(Blocks(6), MSPLoraConfig(r=4, **QUERY_VALUE)), tmp_path / "a")
    before = ma.load_spectra(tmp_path / "a").query("scale == 'total'")
    ma.compress(tmp_path / "a", tmp_path / "b", rank=3)
    after = ma.load_spectra(tmp_path / "b")
    kept = before[before["k"] <= 3].set_index(["name", "k"])["sigma"]
    assert len(after) == len(kept) == 36
    assert after.set_index(["name", "k"])["sigma"].to_dict() == pytest.approx(kept.to_dict(), rel=1e-6)


def dtypes(folder):
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
@pytest.mark.parametrize(("alpha", "is_exact"), [(8, True), (7, False)])
def test_half_precision_is_kept_where_it_is_exact(tmp_path, dtype, kind, alpha, is_exact):
    from safetensors.torch import save_file as save_torch_file

    tensors = {name: torch.tensor(values).to(dtype) for name, values in lora_tensors("layers.0.query").items()}
    tensors[f"{PREFIX}classifier.weight"] = torch.randn(2, 3).to(dtype)
    write_adapter(tmp_path / "a", {}, lora_config(lora_alpha=alpha))
    save_torch_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    ma.export(tmp_path / "a", tmp_path / "b")
    found = dtypes(tmp_path / "b")
    assert found.pop(f"{PREFIX}classifier.weight") == kind
    assert set(found.values()) == {kind if is_exact else "F32"}
    sigma = ma.load_spectra(tmp_path / "a")["sigma"]
    assert ma.load_spectra(tmp_path / "b")["sigma"].tolist() == pytest.approx(sigma.tolist(), rel=1e-6)
    ma.compress(tmp_path / "a", tmp_path / "c", rank=1)
    ma.compress(tmp_path / "a", tmp_path / "d", rank=1, dtype="bfloat16")
    assert {"F32", kind} == set(dtypes(tmp_path / "c").values())
    assert {"BF16", kind} == set(dtypes(tmp_path / "d").values())
    close = ma.load_spectra(tmp_path / "d")["sigma"].item()
    assert close == pytest.approx(sigma[0], rel=2**-7)
    assert close != pytest.approx(sigma[0], rel=1e-5)


def test_values_that_a_type_cannot_hold(tmp_path):
    tensors = {name: 1e6 * values for name, values in lora_tensors("layers.0.query").items()}
    write_adapter(tmp_path / "a", tensors)
    assert "exceed float16; give dtype=float32" in error(ma.export, tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()
    assert "expected one of bfloat16" in error(ma.export, tmp_path / "a", tmp_path / "b", dtype="int8")


def test_released_msplora(tmp_path, reference):
    """The code released with the paper repeats shared pairs under every layer; its own spectra are the truth."""
    with pytest.warns(UserWarning, match="released MSPLoRA code"):
        ma.export(reference / "original_msplora_6layers", tmp_path / "a")
    with pytest.warns(UserWarning, match="released MSPLoRA code"):
        before = ma.load_spectra(reference / "original_msplora_6layers").query("scale == 'total'")
    after = ma.load_spectra(tmp_path / "a").set_index(["name", "k"])["sigma"]
    assert after.to_dict() == pytest.approx(before.set_index(["name", "k"])["sigma"].to_dict(), rel=1e-6)


# What is refused


def refused(method):
    """A model and the configuration of an adapter that no plain LoRA equals."""
    linear = {
        "DoRA": peft.LoraConfig(use_dora=True, **QUERY_VALUE),
        "has a bias": peft.LoraConfig(lora_bias=True, **QUERY_VALUE),
        "path_initial_model_for_weight_conversion": peft.LoraConfig(r=2, init_lora_weights="pissa", **QUERY_VALUE),
        "LOHA has no form": peft.LoHaConfig(**QUERY_VALUE),
        "LOKR has no form": peft.LoKrConfig(**QUERY_VALUE),
        "no layer scale": MSPLoraConfig(ranks={"global": 2, "mid": 2}, **QUERY_VALUE),
        "inside another": peft.LoraConfig(target_modules=["attention"]),
        "in groups": peft.LoraConfig(r=4, target_modules=["one"]),
    }
    if method == "inside another":
        return Others(), linear[method]
    return (Others(2) if method == "in groups" else Blocks()), linear[method]


@pytest.mark.parametrize(
    "method",
    [
        *("DoRA", "has a bias", "path_initial_model_for_weight_conversion", "LOHA has no form", "LOKR has no form"),
        *("no layer scale", "inside another", "in groups"),
    ],
)
def test_refused(tmp_path, method):
    save(adapted(*refused(method)), tmp_path / "a")
    for function, options in ((ma.export, {}), (ma.compress, {"rank": 1})):
        message = error(function, tmp_path / "a", tmp_path / "b", **options)
        assert message.startswith(f"{tmp_path}/a/adapter_model.safetensors: ")
        assert method in message
    assert os.listdir(tmp_path) == ["a"]


def plain_file(path, tensors):
    path.parent.mkdir()
    save_file(tensors, path)
    return path


def test_files_without_config(tmp_path):
    pairs = lora_tensors("unet.layers.0.query", "unet.layers.1.query", rows=8, cols=12)
    tensors = {name.removeprefix(PREFIX): values for name, values in pairs.items()}
    path = plain_file(tmp_path / "a" / "pytorch_lora_weights.safetensors", tensors)
    with pytest.warns(UserWarning, match="pipeline's unet"), pytest.warns(UserWarning, match="no alpha"):
        ma.export(path, tmp_path / "b")
    found = updates(loaded(Blocks2Query(), tmp_path / "b"))
    for i in range(2):
        a, b = (tensors[f"unet.layers.{i}.query.lora_{factor}.weight"] for factor in "AB")
        assert found[f"layers.{i}.query"] == pytest.approx(b.astype(float) @ a, abs=1e-6)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (("unet.layers", "lora_unet_layers_0"), "the dots of the module's name are not in the file"),
        (("unet.layers.1", "text_encoder.layers.1"), "several models (text_encoder, unet)"),
    ],
)
def test_files_without_config_refused(tmp_path, rename, message):
    pairs = lora_tensors("unet.layers.0.query", "unet.layers.1.query")
    tensors = {name.removeprefix(PREFIX).replace(*rename): values for name, values in pairs.items()}
    if "lora_unet" in rename[1]:
        tensors = {f"lora_unet_layers_0_query.{name.partition('query.')[2]}": v for name, v in tensors.items()}
    path = plain_file(tmp_path / "a" / "some.safetensors", tensors)
    assert message in error(ma.export, path, tmp_path / "b")


def test_nothing_is_lost(tmp_path):
    tensors = lora_tensors("layers.0.query")
    beside = {
        f"{PREFIX}classifier.modules_to_save.weight": np.ones((2, 3), np.float32),
        f"{PREFIX}classifier.original_module.weight": np.zeros((2, 3), np.float32),
    }
    write_adapter(tmp_path / "a", tensors | beside, lora_config(task_type="SEQ_CLS", revision="v2", lora_dropout=0.1))
    ma.export(tmp_path / "a", tmp_path / "b")
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert found[f"{PREFIX}classifier.weight"].tolist() == np.ones((2, 3)).tolist()
    assert len(found) == 3
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["task_type"], config["revision"], config["lora_dropout"]) == ("SEQ_CLS", "v2", 0.1)

    write_adapter(tmp_path / "c", tensors, lora_config(task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="no head is saved"):
        ma.export(tmp_path / "c", tmp_path / "d")
    write_adapter(tmp_path / "e", tensors | {f"{PREFIX}strange": np.ones(3, np.float32)})
    assert "unknown tensors (1)" in error(ma.export, tmp_path / "e", tmp_path / "f")
    with pytest.warns(UserWarning, match="strange are left out"):
        ma.export(tmp_path / "e", tmp_path / "f", ignore_unknown=True)
    write_adapter(tmp_path / "h", {name: np.full_like(v, np.nan) for name, v in tensors.items()})
    assert "holds NaN or Inf" in error(ma.export, tmp_path / "h", tmp_path / "i")
    write_adapter(tmp_path / "j", {name: v * ("lora_A" in name) for name, v in tensors.items()})
    assert "nothing would be left" in error(ma.compress, tmp_path / "j", tmp_path / "i", rank=1)
    assert not (tmp_path / "i").exists()


# Folders and choices


def test_folders(tmp_path):
    write_adapter(tmp_path / "run" / "checkpoint-1")
    newest = write_adapter(tmp_path / "run" / "checkpoint-2", lora_tensors("layers.2.query"))
    with pytest.warns(UserWarning, match=f"2 checkpoints, of which the last is taken: {newest}"):
        assert ma.export(tmp_path / "run", tmp_path / "last")["name"].tolist() == ["layers.2.query"]
    write_adapter(tmp_path / "run" / "other" / "checkpoint-1")
    assert "3 adapters of 2 runs; give one of them, such as" in error(ma.export, tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "run" / "other")
    write_adapter(tmp_path / "run", lora_tensors("layers.3.query"))  # the final adapter, beside its checkpoints
    assert ma.export(tmp_path / "run", tmp_path / "out")["name"].tolist() == ["layers.3.query"]
    written = sorted(os.listdir(tmp_path / "out"))
    assert written == ["adapter_config.json", "adapter_model.safetensors", "ranks.csv"]

    assert "is not empty; give another, or overwrite=True" in error(ma.export, newest, tmp_path / "out")
    assert ma.export(newest, tmp_path / "out", overwrite=True)["name"].tolist() == ["layers.2.query"]
    assert "the folder of the adapter itself" in error(ma.export, newest, newest, overwrite=True)
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert "it holds thesis.tex" in error(ma.export, newest, tmp_path / "out", overwrite=True)
    assert "not a folder" in error(ma.export, newest, tmp_path / "out" / "thesis.tex")
    assert sorted(os.listdir(tmp_path / "out")) == [*written, "thesis.tex"]
    assert sorted(os.listdir(tmp_path)) == ["last", "out", "run"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "give one of energy=, rank=, budget= and kl="),
        ({"rank": 1, "budget": 3}, "give one of"),
        ({"energy": 0.0}, "energy=0: expected a share"),
        ({"energy": 1.5}, "energy=1.5: expected a share"),
        ({"energy": float("nan")}, "energy=nan: expected a share"),
        ({"rank": 0}, "rank=0: expected a whole number"),
        ({"budget": 5}, "nothing would be left of it: give a larger budget="),
    ],
)
def test_choices(tmp_path, choice, message):
    write_adapter(tmp_path / "a")
    assert message in error(ma.compress, tmp_path / "a", tmp_path / "b", **choice)
    assert os.listdir(tmp_path) == ["a"]


def run(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["msplora-analyze", *map(str, args)])
    monkeypatch.setattr("warnings.showwarning", None)  # main sets it: put it back afterwards
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capsys.readouterr()


def test_commands(tmp_path, capsys, monkeypatch):
    save(adapted(Blocks(4), MSPLoraConfig(r=4, **QUERY_VALUE)), tmp_path / "a")
    status, out, err = run(capsys, monkeypatch, "export", tmp_path / "a", "--out", tmp_path / "b")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == ["query", "4", "7", "672"]
    assert "parameters: 616 in the file, 1,232 as a plain LoRA (float32)" in out
    assert out.splitlines()[-1] == str(tmp_path / "b")

    status, out, err = run(capsys, monkeypatch, "compress", tmp_path / "a", "--out", tmp_path / "c", "--budget", 130)
    table = ma.compress(tmp_path / "a", tmp_path / "d", budget=130)
    assert (status, err) == (0, "")
    words = next(line.split() for line in out.splitlines() if line.startswith("all"))
    assert words[1:6] == [
        "8",
        "7",
        "0-1" if table["rank"].max() == 1 else "0-2",
        "1,232",
        str(table["parameters"].sum()),
    ]
    lost = ((table["norm"] * table["error"]) ** 2).sum() / (table["norm"] ** 2).sum()
    assert words[6:] == [f"{1 - lost:.2%}", f"{lost**0.5:.3g}"]
    assert f"left out, as rank 0 is kept of them ({(table['rank'] == 0).sum()})" in out

    assert run(capsys, monkeypatch, "compress", tmp_path / "a", "--out", tmp_path / "e")[0] == 2
    status, out, err = run(capsys, monkeypatch, "export", tmp_path / "nothing", "--out", tmp_path / "e")
    assert (status, out) == (1, "")
    assert err == f"error: {tmp_path}/nothing: no such file or folder\n"
