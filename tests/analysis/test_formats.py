"""Formats against what PEFT itself computes, and MSPLoRA against dense sums."""

import numpy as np
import pandas as pd
import pytest
import torch
from adapters import assert_promised, dense, lora_config, lora_tensors, msplora_config, msplora_tensors, write_adapter

from msplora_analysis import AnalysisError, load_spectra, load_tables
from msplora_analysis.formats.names import module_of, stack_and_layer


def sigma_of(spectra: pd.DataFrame, **keys) -> np.ndarray:
    rows = spectra[(spectra[list(keys)] == pd.Series(keys)).all(axis=1)]
    assert rows["k"].tolist() == list(range(1, len(rows) + 1)), keys
    return rows["sigma"].to_numpy()


def error(folder, **options) -> str:
    with pytest.raises(AnalysisError) as caught:
        load_spectra(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/adapter_model.safetensors: ")


# Names


@pytest.mark.parametrize(
    ("name", "stack", "layer", "module"),
    [
        ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer", 3, "query"),
        ("wav2vec2.encoder.layers.11.k_proj", "wav2vec2.encoder.layers", 11, "k_proj"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block", 0, "q"),
        ("unet.blocks.1.attn.to_out.0", "unet.blocks", 1, "to_out"),
        ("pooler.dense", "pooler.dense", None, "dense"),
        ("0", "", 0, "0"),
        ("2.fc1", "", 2, "fc1"),
    ],
)
def test_names(name, stack, layer, module):
    assert stack_and_layer(name) == (stack, layer)
    assert module_of(name) == module


# LoRA: PEFT writes, we read


def bert(**changes):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=11, num_attention_heads=2, intermediate_size=40
    )
    return BertForSequenceClassification(config)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.second = torch.nn.Conv1d(8, 6, 5)


PEFT_CASES = {
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 4}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True, "r": 4, "lora_alpha": 3}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 4,
            "rank_pattern": {
                "q_proj": 2,
                r"^model\.layers\.1\.self_attn\.v_proj": 3,
                "proj": 7,
                "layers.1.mlp.down_proj": 5,
            },
            "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "down_proj": 1.5, "q_proj": 3},
            "use_rslora": True,
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "modules_to_save": (bert, {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}),
    "bias": (bert, {"target_modules": ["query"], "bias": "all"}),
    "lora_bias": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "token_cls": (bert, {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "trainable_tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "convolution": (Convolutions, {"target_modules": ["first", "second"], "r": 4}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_peft_writes(tmp_path, case):
    from peft import LoraConfig, get_peft_model

    build, options = PEFT_CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(**options))
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            for key, factor in module.named_parameters():
                if "lora_" in key and "default" in key:
                    torch.nn.init.normal_(factor)
            delta = module.get_delta_weight("default").detach().double().flatten(1).numpy()
            expected[name.removeprefix("base_model.model.")] = np.linalg.svd(delta, compute_uv=False)
    assert expected
    model.save_pretrained(tmp_path / "a")

    spectra, metrics = load_tables(tmp_path / "a")
    assert set(spectra["name"]) == set(expected)
    assert set(spectra["scale"]) == {"layer"}
    for name, exact in expected.items():
        sigma = sigma_of(spectra, name=name)
        length = min(len(sigma), len(exact))
        # PEFT multiplies in float32, which adds its own rounding.
        np.testing.assert_allclose(sigma[:length], exact[:length], rtol=1e-5, atol=1e-6 * exact[0])
        assert (exact[length:] < 1e-5 * exact[0]).all()
        _, layer = stack_and_layer(name)
        row = metrics[metrics["name"] == name].iloc[0]
        assert row["rank"] == len(sigma)
        assert row["module"] == module_of(name)
        assert (row["group"] if layer is not None else None) == layer
    # Layer 10 comes after layer 9.
    layers = [int(group) for group in metrics["group"].dropna()]
    assert layers == sorted(layers)


@pytest.mark.filterwarnings("ignore")
def test_bin_of_peft_reads_as_its_safetensors(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", safe_serialization=False)
    assert (tmp_path / "b" / "adapter_model.bin").exists()
    a, b = (load_spectra(tmp_path / name).drop(columns="run") for name in "ab")
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("name", ["peft_lora_toy", "peft_rslora_toy", "minilm_cola_lora_epoch20"])
def test_reference_adapters(reference, name):
    spectra = load_spectra(reference / name)
    expected = pd.read_csv(reference / name / "expected.csv")
    assert len(spectra) == len(expected)
    for module, rows in expected.groupby("name"):
        assert_promised(sigma_of(spectra, name=module), rows.sort_values("k")["sigma"].to_numpy())


def test_adapter_name_in_keys(tmp_path):
    plain = lora_tensors("layer.0.query")
    named = {key.replace(".weight", ".my_adapter.weight"): values for key, values in plain.items()}
    a = load_spectra(write_adapter(tmp_path / "a", plain)).drop(columns="run")
    b = load_spectra(write_adapter(tmp_path / "b", named)).drop(columns="run")
    pd.testing.assert_frame_equal(a, b)


def test_heads_and_embeddings_beside_the_factors_are_left_out(tmp_path):
    extra = {
        "base_model.model.classifier.weight": np.ones((2, 3)),
        "base_model.model.classifier.modules_to_save.default.bias": np.ones(2),
        "base_model.model.score.weight": np.ones((2, 3)),
        "base_model.model.model.embed_tokens.base_layer.weight": np.ones((2, 3)),
        "base_model.model.lm_head.weight": np.ones((2, 3)),
    }
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.q") | extra)
    assert set(load_spectra(folder)["name"]) == {"layer.0.q"}


@pytest.mark.parametrize(
    "name",
    [
        "classifier.lora_C.weight",  # a factor of another kind, even in a head
        "classifier.lora_A_0.weight",
        "layer.0.q.lora_B.bias",
        "layer.0.q.bias",
        "embed_tokens.token_adapter.trainable_tokens_delta",
        "layer.0.lora_A.weight.extra",
    ],
)
def test_what_the_config_does_not_explain_is_unknown(tmp_path, name):
    tensors = lora_tensors("layer.0.q") | {f"base_model.model.{name}": np.ones((2, 2))}
    folder = write_adapter(tmp_path / "a", tensors, lora_config(modules_to_save=["classifier"]))
    assert error(folder).startswith(f"unknown tensors (1): base_model.model.{name}; pass ignore_unknown=True ")


def test_unknown_tensors_are_an_error_or_a_warning(tmp_path):
    names = [f"base_model.model.layer.{i}.adapter.down.weight" for i in (10, 2, 3, 4)]
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.q") | {name: np.ones((2, 2)) for name in names})
    listed = ", ".join([names[1], names[2], names[3]])
    assert error(folder) == (f"unknown tensors (4): {listed}, ...; pass ignore_unknown=True to leave them out")
    with pytest.warns(UserWarning, match=r"unknown tensors \(4\): .*, \.\.\. are left out"):
        spectra = load_spectra(folder, ignore_unknown=True)
    assert set(spectra["name"]) == {"layer.0.q"}


def test_one_warning_for_many_files(tmp_path):
    for step in (1, 2, 3):
        write_adapter(tmp_path / f"run/checkpoint-{step}", lora_tensors("layer.0.q") | {"what.weight": np.ones(2)})
    with pytest.warns(
        UserWarning, match=r"\(and 2 more files\): unknown tensors \(1\): what.weight are left out"
    ) as caught:
        load_spectra(tmp_path, ignore_unknown=True)
    assert len(caught) == 1


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_alone_is_an_error(tmp_path, factor):
    tensors = lora_tensors("layer.0.q", "layer.1.q")
    del tensors[f"base_model.model.layer.1.q.lora_{'BA'[factor == 'B']}.weight"]
    assert error(write_adapter(tmp_path / "a", tensors)) == (
        f"tensor base_model.model.layer.1.q.lora_{factor}.weight has no factor {'BA'[factor == 'B']} beside it; "
        "save the adapter again"
    )


def test_rank_that_is_not_the_configs(tmp_path):
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.q", rank=3))
    assert error(folder) == (
        "tensor base_model.model.layer.0.q.lora_A.weight has rank 3, adapter_config.json says 2; "
        "is it the config of another adapter?"
    )


def test_factors_that_cannot_be_multiplied(tmp_path):
    tensors = lora_tensors("layer.0.q")
    tensors["base_model.model.layer.0.q.lora_B.weight"] = np.ones((5, 3), np.float32)
    assert error(write_adapter(tmp_path / "a", tensors)) == (
        "tensors base_model.model.layer.0.q.lora_A.weight and base_model.model.layer.0.q.lora_B.weight have shapes "
        "[2, 6] and [5, 3], which cannot be multiplied as B A; save the adapter again"
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 6), ()])
def test_empty_factors(tmp_path, shape):
    tensors = lora_tensors("layer.0.q")
    tensors["base_model.model.layer.0.q.lora_A.weight"] = np.ones(shape, np.float32)
    assert error(write_adapter(tmp_path / "a", tensors)) == (
        f"tensor base_model.model.layer.0.q.lora_A.weight has shape {list(shape)}; expected a matrix that is not "
        "empty (was it saved without gathering its shards?)"
    )


def test_two_adapters_in_one_file(tmp_path):
    tensors = lora_tensors("layer.0.q")
    tensors |= {key.replace(".weight", ".other.weight"): values for key, values in tensors.items()}
    assert "are the same factor A; save one adapter per file" in error(write_adapter(tmp_path / "a", tensors))


def test_no_factors_at_all(tmp_path):
    config = lora_config(modules_to_save=["classifier"])
    folder = write_adapter(tmp_path / "a", {"base_model.model.classifier.weight": np.ones((2, 3))}, config)
    assert error(folder) == "no low-rank factors in the file; was the adapter saved before it was added?"
    folder = write_adapter(tmp_path / "b", {"what.weight": np.ones((2, 3))})
    with pytest.warns(UserWarning, match="what.weight are left out"):
        assert error(folder, ignore_unknown=True) == "no low-rank factors in this or any other file"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora_config(lora_alpha="16"), "adapter_config.json: lora_alpha must be a number, got '16'"),
        (lora_config(rank_pattern=[1]), "adapter_config.json: rank_pattern must be an object, got [1]"),
        (lora_config(rank_pattern={"q": "4"}), "adapter_config.json: q must be a number, got '4'"),
        (
            lora_config(alpha_pattern={"(q": 4}),
            "adapter_config.json: the pattern '(q' is not a regular expression",
        ),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, config, message):
    assert error(write_adapter(tmp_path / "a", lora_tensors("layer.0.q"), config)) == message


def test_a_method_that_is_not_known(tmp_path):
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.q"), {"peft_type": "NEWEST"})
    assert error(folder).startswith("adapter_config.json: peft_type 'NEWEST' is not supported; supported: ")


# MSPLoRA


@pytest.mark.parametrize(
    ("layers", "firsts", "mid_of"),
    [
        (range(6), [0, 2, 4], [0, 0, 1, 1, 2, 2]),
        (range(7), [0, 3, 5], [0, 0, 0, 1, 1, 2, 2]),
        (range(5, 12), [5, 8, 10], [0, 0, 0, 1, 1, 2, 2]),
    ],
    ids=["6 layers", "7 layers", "layers 5 to 11"],
)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [{"global": 5, "mid": 3, "layer": 2}, None])
def test_msplora_scales_and_totals(tmp_path, layers, firsts, mid_of, rslora, ranks):
    layers = list(layers)
    actual_ranks = ranks or {"global": 8, "mid": 4, "layer": 2}
    tensors = msplora_tensors(layers, firsts, actual_ranks, modules=("query", "value"))
    tensors["base_model.model.classifier.weight"] = np.ones((2, 3))
    config = msplora_config(ranks=ranks, use_rslora=rslora, task_type="SEQ_CLS")
    spectra, metrics = load_tables(write_adapter(tmp_path / "run", tensors, config))

    counts = metrics.groupby("scale").size()
    assert dict(counts) == {"global": 2, "mid": 6, "layer": 2 * len(layers), "total": 2 * len(layers)}
    assert list(dict.fromkeys(metrics["scale"])) == ["global", "mid", "layer", "total"]
    for module in ("query", "value"):
        parts = {}
        units = {"global": layers[:1], "mid": firsts, "layer": layers}
        for scale, owners in units.items():
            for group, layer in enumerate(owners):
                name = f"encoder.layer.{layer}.self.{module}"
                update = dense(tensors, f"{name}.msplora_{scale}", 16, rslora)
                parts[scale, layer] = update
                group = layer if scale == "layer" else group
                sigma = sigma_of(spectra, scale=scale, group=group, module=module, name=name)
                assert_promised(sigma, np.linalg.svd(update, compute_uv=False)[: actual_ranks[scale]])
        for layer, mid in zip(layers, mid_of, strict=True):
            total = parts["global", layers[0]] + parts["mid", firsts[mid]] + parts["layer", layer]
            sigma = sigma_of(spectra, scale="total", group=layer, module=module)
            assert len(sigma) == sum(actual_ranks.values())
            assert_promised(sigma, np.linalg.svd(total, compute_uv=False)[: len(sigma)])


def test_msplora_stacks_and_shapes_are_pyramids_of_their_own(tmp_path):
    ranks = {"global": 5, "mid": 3, "layer": 2}
    tensors = (
        msplora_tensors([0, 1, 2], [0, 1, 2], ranks, stack="encoder.layer")
        | msplora_tensors([0, 1], [0, 1], ranks, stack="wav2vec2.decoder.block", seed=1)
        | msplora_tensors([3, 4, 5, 6], [3, 5, 6], ranks, stack="encoder.layer", rows=9, seed=2)
    )
    metrics = load_tables(write_adapter(tmp_path / "run", tensors, msplora_config())).metrics
    shared = metrics[metrics["scale"] == "global"]
    assert shared["name"].tolist() == [
        "encoder.layer.0.self.query", "encoder.layer.3.self.query", "wav2vec2.decoder.block.0.self.query"
    ]  # fmt: skip
    assert shared["group"].tolist() == [0, 0, 0]
    mids = metrics[(metrics["scale"] == "mid") & (metrics["rows"] == 9)]
    assert mids["group"].tolist() == [0, 1, 2]
    assert (metrics["scale"] == "total").sum() == 9


def test_msplora_with_two_scales_or_one(tmp_path):
    ranks = {"global": 4, "layer": 2}
    tensors = msplora_tensors([0, 1, 2], [], ranks)
    spectra = load_spectra(write_adapter(tmp_path / "two", tensors, msplora_config(ranks=ranks)))
    assert set(spectra["scale"]) == {"global", "layer", "total"}
    name = "encoder.layer.{}.self.query.msplora_{}"
    update = dense(tensors, name.format(0, "global"), 16) + dense(tensors, name.format(2, "layer"), 16)
    assert_promised(sigma_of(spectra, scale="total", group=2), np.linalg.svd(update, compute_uv=False)[:6])

    ranks = {"layer": 2}
    tensors = msplora_tensors([0, 1, 2], [], ranks)
    spectra = load_spectra(write_adapter(tmp_path / "one", tensors, msplora_config(ranks=ranks)))
    assert set(spectra["scale"]) == {"layer"}

    ranks = {"global": 4, "mid": 2}  # which layers they act in is not on disk
    tensors = msplora_tensors([0, 1, 2], [0, 2], ranks)
    spectra = load_spectra(write_adapter(tmp_path / "shared", tensors, msplora_config(ranks=ranks)))
    assert set(spectra["scale"]) == {"global", "mid"}


def test_msplora_before_training_is_all_zero(tmp_path):
    tensors = msplora_tensors([0, 1, 2], [0, 1, 2], {"global": 5, "mid": 3, "layer": 2})
    tensors = {name: values * (not name.endswith("B")) for name, values in tensors.items()}
    spectra, metrics = load_tables(write_adapter(tmp_path / "run" / "checkpoint-0", tensors, msplora_config(), epoch=0))
    assert (spectra["sigma"] == 0).all()
    assert metrics[["step", "epoch"]].drop_duplicates().values.tolist() == [[0, 0]]
    assert metrics[["stable_rank", "effective_rank", "participation_ratio", "m_eff_1", "m_eff_4"]].isna().all(axis=None)
    assert (metrics[["sigma_1", "frobenius", "nuclear"]] == 0).all(axis=None)


RANKS = {"global": 5, "mid": 3, "layer": 2}


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "encoder.layer.0.self.query.msplora_global",
            "the 6 layers that share with encoder.layer.0.self.query need 1 global pairs, the file has 0; "
            "save the adapter again",
        ),
        (
            "encoder.layer.2.self.query.msplora_mid",
            "the 6 layers that share with encoder.layer.0.self.query need 3 mid pairs, the file has 2; "
            "save the adapter again",
        ),
        (
            "encoder.layer.2.self.query.msplora_layer.A",
            "tensor base_model.model.encoder.layer.2.self.query.msplora_layer.B has no factor A beside it; "
            "save the adapter again",
        ),
        (
            "msplora_layer",
            "tensor base_model.model.encoder.layer.0.self.query.msplora_global.A has no layer part of its module "
            "in the file",
        ),
    ],
)
def test_msplora_tensors_that_were_lost_are_told(tmp_path, lost, message):
    tensors = msplora_tensors(range(6), [0, 2, 4], RANKS)
    kept = {name: values for name, values in tensors.items() if lost not in name}
    assert len(kept) < len(tensors)
    assert error(write_adapter(tmp_path / "a", kept, msplora_config())) == message


def test_msplora_shared_pair_that_starts_too_late(tmp_path):
    tensors = msplora_tensors(range(1, 7), [1, 3, 5], RANKS)
    tensors |= {k: v for k, v in msplora_tensors([0], [], RANKS).items() if "msplora_layer" in k}
    assert error(write_adapter(tmp_path / "a", tensors, msplora_config())) == (
        "the first layers that share with encoder.layer.0.self.query have no global pair in the file; "
        "save the adapter again"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ranks": {"global": 5, "mid": 3, "layer": 4}},
            "tensor base_model.model.encoder.layer.0.self.query.msplora_layer.A has rank 2, adapter_config.json says "
            "4 for layer; is it the config of another adapter?",
        ),
        ({"ranks": {"global": 5, "top": 3}}, "adapter_config.json: ranks has 'top'; expected global, mid or layer"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha must be a number, got None"),
    ],
)
def test_msplora_configs_that_cannot_be_used(tmp_path, changes, message):
    tensors = msplora_tensors(range(6), [0, 2, 4], RANKS)
    assert error(write_adapter(tmp_path / "a", tensors, msplora_config(**changes))) == message
