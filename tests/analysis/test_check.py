"""What readers do with adapters: known threads as fixtures, scales against PEFT's own and by hand."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from adapters import lora_config as bare_config
from adapters import lora_tensors, write_adapter
from safetensors.numpy import save_file
from typer.testing import CliRunner

import msplora_analysis as ma
from msplora_analysis import AnalysisError, cli
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.ask.readers import check, readers, verdicts
from msplora_analysis.options import Options


def lora_config(**changes):
    return bare_config(target_modules="all-linear", **changes)


NAMES = [f"layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "k_proj")]


def ranked(ranks, **options):
    """Factors of these ranks, by module."""
    tensors = {}
    for name, rank in ranks.items():
        tensors |= lora_tensors(name, rank=rank, **options)
    return tensors


def found(path, reader=None):
    (adapter,) = discover(path)
    return check(adapter, reader, Options())


def by_id(path, reader):
    return {finding.id: finding for finding in found(path, reader)}


def outcome(path):
    return {reader.name: verdict for reader, verdict in verdicts(found(path))}


def peft(tmp_path, ranks=None, **config):
    tensors = ranked(ranks or dict.fromkeys(NAMES, 4))
    return write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8) | config)


def test_a_plain_adapter(tmp_path):
    path = peft(tmp_path)
    assert outcome(path) == {
        "peft": "reads it",
        "vllm": "reads it",
        "sglang": "reads it",
        "tgi": "reads it",
        "llama.cpp": "reads it",
        "mlx": "after export",
        "diffusers": "after export",
        "comfyui": "after export",
    }
    assert found(path, "vllm") == []
    (layout,) = found(path, "mlx")
    assert layout.evidence == "it is a folder of PEFT; MLX-LM reads a folder of MLX-LM"
    assert layout.remedy == f"msplora-analyze export {path} --out DIR --to mlx"


def test_rslora(tmp_path):
    """vllm#6909, TensorRT-LLM#1669, exllamav2#619, peft#3449: alpha / sqrt(r) = 4 is taken for alpha / r = 2."""
    path = peft(tmp_path, use_rslora=True)
    assert "scale" not in by_id(path, "vllm")
    for reader in ("sglang", "llama.cpp"):
        scale = by_id(path, reader)["scale"]
        assert scale.evidence == "4 of 4 modules: layers.0.k_proj was trained with 4 and gets 2 (0.5 x)"
    general = by_id(path, "vllm")["rslora"]
    assert (general.reader, general.severity) == ("", "info")
    for thread in ("vllm-project/vllm/pull/6909", "TensorRT-LLM/pull/1669", "exllamav2/pull/619"):
        assert thread in general.source
    merge = by_id(path, "peft")["merge"]
    assert merge.source == "github.com/huggingface/peft/pull/3449"
    assert "2 x" in merge.evidence


def test_patterns(tmp_path):
    """Readers with one alpha and one rank for all: trained with 8 / 2 = 4 and 3 / 4."""
    ranks = {name: 2 if "k_proj" in name else 4 for name in NAMES}
    path = peft(tmp_path, ranks, rank_pattern={"k_proj": 2}, alpha_pattern={"1.q_proj": 3})
    for reader in ("vllm", "tgi", "sglang"):
        assert by_id(path, reader)["scale"].evidence.startswith(
            "3 of 4 modules: layers.0.k_proj was trained with 4 and gets 2"
        )
    # llama.cpp divides by each module's own rank: only alpha_pattern is lost.
    assert (
        "1 of 4 modules: layers.1.q_proj was trained with 0.75 and gets 2" in by_id(path, "llama.cpp")["scale"].evidence
    )
    assert "ranks" not in by_id(path, "tgi")
    assert found(path, "peft") == []


def test_scales_are_those_of_peft(tmp_path):
    lora = pytest.importorskip("peft")
    from test_export import Blocks, adapted, save

    from msplora_analysis.ask.readers.facts import facts_of

    model = adapted(
        Blocks(),
        lora.LoraConfig(
            r=4,
            use_rslora=True,
            rank_pattern={"1.query": 2},
            alpha_pattern={"value": 5},
            target_modules=["query", "value"],
        ),
    )
    save(model, tmp_path / "a")
    (adapter,) = discover(tmp_path / "a")
    named = dict(model.base_model.model.named_modules())
    modules = facts_of(adapter, Options()).modules
    assert len(modules) == 4
    for module in modules:
        assert module.scale == pytest.approx(named[module.name].scaling["default"])
        assert module.rank == named[module.name].r["default"]


def test_declared_and_saved_ranks(tmp_path):
    """Soup#803: a trainer that loses rank_pattern, and a configuration that has it."""
    path = peft(tmp_path, rank_pattern={"q_proj": 2})
    rank = by_id(path, "peft")["rank"]
    assert rank.evidence == "2 of 4 modules: layers.0.q_proj is declared 2, and its lora_A has 4"
    assert "Soup/issues/803" in rank.source
    assert set(outcome(path).values()) == {"refuses it"}  # nor does export know which is right


def test_mixed_ranks_without_alpha(tmp_path):
    """diffusers#14409: ranks 64 and 16, the lower first, and no alpha: 0.25 x."""
    tensors = ranked({"transformer.a.proj": 4, "transformer.b.proj": 16}, rows=24, cols=24)
    tensors = {name.removeprefix("base_model.model."): values for name, values in tensors.items()}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    scale = by_id(tmp_path, "diffusers")["scale"]
    assert "with 4, transformer.b.proj of rank 16 gets 0.25 x" in scale.evidence
    assert scale.source == "github.com/huggingface/diffusers/pull/14409"
    assert "scale" not in by_id(tmp_path, "comfyui")  # it takes 1 for each
    assert by_id(tmp_path, "comfyui")["alpha"].evidence == "its scale is taken as 1"


def kohya(path, alphas):
    tensors = {}
    for name, (rank, alpha) in alphas.items():
        key = f"lora_unet_{name}"
        tensors[f"{key}.lora_down.weight"] = np.ones((rank, 16), np.float32)
        tensors[f"{key}.lora_up.weight"] = np.ones((16, rank), np.float32)
        tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


def test_kohya_alphas(tmp_path):
    names = ("down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "down_blocks_1_attentions_0_proj_in")
    same = kohya(tmp_path / "same.safetensors", dict.fromkeys(names, (4, 2.0)))
    assert {outcome(same)[reader] for reader in ("diffusers", "comfyui")} == {"reads it"}
    mixed = kohya(tmp_path / "mixed.safetensors", {names[0]: (4, 2.0), names[1]: (8, 8.0)})
    assert "alphas 2, 8; 1 modules such as unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in (
        by_id(mixed, "diffusers")["scale"].evidence
    )
    assert "scale" not in by_id(mixed, "comfyui")


def test_metadata_that_comfyui_does_not_read(tmp_path):
    tensors = {f"unet.{name.removeprefix('base_model.model.')}": v for name, v in ranked({"x.to_q": 4}).items()}
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", about)
    assert "was trained with 2 and gets 1 (0.5 x)" in by_id(tmp_path, "comfyui")["scale"].evidence
    assert found(tmp_path, "diffusers") == []


@pytest.mark.parametrize(
    ("config", "extra", "refusing", "what"),
    [
        ({"use_dora": True}, "layers.0.q_proj.lora_magnitude_vector", {"vllm": "dora", "sglang": "dora"}, "use_dora"),
        (
            {"modules_to_save": ["score"]},
            "score.weight",
            {"vllm": "whole", "llama.cpp": "keys", "tgi": "rest"},
            "score",
        ),
        (
            {"bias": "lora_only"},
            "layers.0.q_proj.bias",
            {"vllm": "bias", "llama.cpp": "keys", "sglang": "rest"},
            "bias",
        ),
    ],
)
def test_what_is_beside_the_factors(tmp_path, config, extra, refusing, what):
    tensors = ranked(dict.fromkeys(NAMES, 4)) | {f"base_model.model.{extra}": np.ones(8, np.float32)}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8) | config)
    for reader, name in refusing.items():
        fault = by_id(path, reader)[name]
        assert fault.severity == "error"
        assert what in fault.evidence
    assert found(path, "peft") == []


def test_ranks_of_vllm(tmp_path):
    path = write_adapter(
        tmp_path / "a", ranked({"layers.0.q_proj": 24}, rows=600, cols=600), lora_config(r=24, lora_alpha=24)
    )
    assert by_id(path, "vllm")["rank"].remedy == "vllm serve ... --max-lora-rank 32"
    path = write_adapter(
        tmp_path / "b", ranked({"layers.0.q_proj": 520}, rows=600, cols=600), lora_config(r=520, lora_alpha=9)
    )
    assert by_id(path, "vllm")["rank"].remedy == f"msplora-analyze compress {path} --out DIR --rank 512"


def test_layers_of_tgi(tmp_path):
    ranks = {"layers.0.q_proj": 4, "layers.1.q_proj": 2, "layers.1.v_proj": 4}
    path = peft(tmp_path, ranks, rank_pattern={"1.q_proj": 2})
    faults = by_id(path, "tgi")
    assert faults["ranks"].evidence == "q_proj: ranks [2, 4]"
    assert faults["layers"].evidence.startswith("v_proj: in 1 of 2+ layers")


def test_nothing_learned(tmp_path):
    tensors = {name: values * ("lora_A" in name) for name, values in ranked(dict.fromkeys(NAMES, 4)).items()}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8))
    assert by_id(path, "peft")["zero"].severity == "error"
    tensors |= ranked({NAMES[0]: 4})
    path = write_adapter(tmp_path / "b", tensors, lora_config(r=4, lora_alpha=8))
    some = by_id(path, "peft")["zero"]
    assert some.severity == "warning"
    assert "3 of 4 modules" in some.evidence


def test_start_that_is_not_zero(tmp_path):
    path = peft(tmp_path, init_lora_weights="pissa")
    for reader in ("vllm", "sglang", "tgi", "llama.cpp"):
        start = by_id(path, reader)["start"]
        assert start.severity == "error"
        assert "path_initial_model_for_weight_conversion" in start.remedy
    assert found(path, "peft") == []  # it splits the model again, to the same B A
    assert by_id(peft(tmp_path, init_lora_weights="pissa_niter_4"), "peft")["start"].effect == "wrong"  # to another


@pytest.mark.parametrize(("init", "same"), [("pissa", True), ("olora", True), ("pissa_niter_4", False)])
def test_how_peft_splits_again(tmp_path, init, same):
    lora = pytest.importorskip("peft")
    import copy

    import torch
    from test_export import Blocks, save

    torch.manual_seed(0)
    base, x = Blocks(), torch.ones(1, 12)
    config = lora.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"], init_lora_weights=init)
    model = lora.get_peft_model(copy.deepcopy(base), config)
    save(model, tmp_path / "a")
    torch.manual_seed(1)
    again = lora.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert torch.allclose(model(x), again(x), atol=1e-5) == same


def test_mlx(tmp_path):
    config = {"lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    tensors = {
        "model.layers.0.q_proj.lora_a": np.ones((8, 2), "f4"),
        "model.layers.0.q_proj.lora_b": np.ones((2, 8), "f4"),
    }
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert by_id(folder, "mlx")["rank"].evidence == "model.layers.0.q_proj has rank 2, lora_parameters says 4"


# The command


def run(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["msplora-analyze", "check", *map(str, args)])
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capsys.readouterr()


def test_command(tmp_path, capsys, monkeypatch):
    path = peft(tmp_path, modules_to_save=["score"])
    status, out, err = run(capsys, monkeypatch, path)
    assert (status, err) == (0, "")  # no reader was named
    assert ["vLLM", "refuses", "it", "1", "0"] in [line.split() for line in out.splitlines()]
    assert "error vLLM: modules trained whole" in out
    assert run(capsys, monkeypatch, path, "--for", "peft")[0] == 0
    assert run(capsys, monkeypatch, path, "--for", "vllm")[0] == 1

    status, out, err = run(capsys, monkeypatch, path, "--for", "vllm", "--json", "--sarif", tmp_path / "x.sarif")
    found = json.loads(out)
    assert (status, found["readers"]) == (1, {"vllm": "refuses it"})
    assert [finding["id"] for finding in found["findings"]] == ["whole"]
    status, out, err = run(capsys, monkeypatch, path, "--for", "word")
    assert (status, out) == (2, "")
    assert "'word' is not one of comfyui, diffusers, llama.cpp, mlx" in " ".join(err.split())
    assert run(capsys, monkeypatch, tmp_path / "nothing")[0] == 1


def test_names_that_would_harm_a_terminal_or_a_shell(tmp_path, capsys, monkeypatch):
    ranks = {f"layers.{i}.{kind}": 2 for i, kind in enumerate(["x\x1b[31m", "y\u202ez"])}
    path = write_adapter(tmp_path / "a; rm x", ranked(ranks), lora_config())
    for arguments in ((), ("--json", "--sarif", tmp_path / "x.sarif")):
        out = run(capsys, monkeypatch, path, *arguments)[1]
        assert out.replace("\n", "").isprintable()
        assert "u202e" in out
    assert (tmp_path / "x.sarif").read_text().replace("\n", "").isprintable()
    assert all("; rm" not in one.remedy or f"'{path}'" in one.remedy for one in found(path))


def test_sarif(tmp_path, capsys, monkeypatch):
    """The fields that SARIF 2.1.0 requires, § 3.13 to 3.49 of the OASIS standard."""
    path = peft(tmp_path, use_rslora=True, use_dora=True)
    monkeypatch.chdir(tmp_path)
    run(capsys, monkeypatch, path, "--sarif", tmp_path / "x.sarif")
    log = json.loads((tmp_path / "x.sarif").read_text())
    assert log["version"] == "2.1.0"
    (one,) = log["runs"]
    rules = [rule["id"] for rule in one["tool"]["driver"]["rules"]]
    assert one["tool"]["driver"]["name"]
    assert len(rules) == len(set(rules))
    assert {"any/rslora", "llama.cpp/scale", "vllm/dora"} <= set(rules)
    assert "mlx/layout" not in rules  # nobody asked for it
    for result in one["results"]:
        assert result["ruleId"] in rules
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert place == {"uri": "a/adapter_model.safetensors"}


def test_every_reader_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "readers.md").read_text(encoding="utf-8")
    for reader in readers().values():
        assert f"| {reader.title} |" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "eight"}, "lora_alpha must be a number"),
        ({"r": 0}, "r must be a positive whole number"),
        ({"modules_to_save": 3}, "modules_to_save must be a list of names, got 3"),
        ({"rank_pattern": {"x": 0}}, "rank_pattern of x must be a positive whole number, got 0"),
    ],
)
def test_unreadable(tmp_path, config, message):
    tensors = ranked({"x": 4}) | {"base_model.model.score.weight": np.ones((2, 3), np.float32)}
    path = write_adapter(tmp_path / "a", tensors, lora_config(**config))
    with pytest.raises(AnalysisError, match=message):
        found(path)


def test_keys_that_nothing_explains(tmp_path):
    tensors = ranked({"x": 4}) | {"base_model.model.x.gate": np.ones(3, np.float32)}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4))
    assert by_id(path, "peft")["keys"].evidence == "base_model.model.x.gate"


@pytest.mark.parametrize(
    ("config", "effect", "evidence"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, None, ""),
        ({"target_modules": ["q_proj"]}, "in part", "leaves out 2 of 4 modules: layers.0.k_proj, layers.1.k_proj"),
        (
            {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
            "in part",
            "layers.0.k_proj, layers.0.q",
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.q_proj"]},
            "in part",
            "1 of 4 modules: layers.0.q",
        ),
        ({"target_modules": []}, "refuses it", "4 of 4 modules"),
        ({"target_modules": None}, "in part", "takes its own of the model's type"),
    ],
)
def test_modules_that_peft_would_not_adapt(tmp_path, config, effect, evidence):
    """Which these are, PEFT itself says."""
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    from peft import LoraConfig

    path = peft(tmp_path, **config)
    fault = by_id(path, "peft").get("targets")
    assert (fault and fault.effect) == effect
    assert evidence in (fault.evidence if fault else "")
    if config["target_modules"]:
        known = LoraConfig(**config)
        missed = [name for name in NAMES if not tuners.check_target_module_exists(known, name)]
        assert bool(missed) == (fault is not None)
        assert not missed or f"leaves out {len(missed)} of 4 modules" in fault.evidence


def test_no_target_modules(tmp_path):
    path = write_adapter(tmp_path / "a", ranked(dict.fromkeys(NAMES, 4)), bare_config(r=4, lora_alpha=8))
    for reader in ("vllm", "sglang"):
        assert by_id(path, reader)["targets"].remedy == f"msplora-analyze export {path} --out DIR"
    ma.export(path, tmp_path / "b")
    assert "targets" not in by_id(tmp_path / "b", "vllm")


@pytest.mark.parametrize(
    ("config", "name", "readers", "thread"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layers", ("vllm", "sglang", "tgi", "llama.cpp"), "PEFT"),
        ({"alora_invocation_tokens": [1]}, "alora", ("vllm", "sglang", "tgi"), "vllm/pull/19710"),
        ({"use_rslora": True}, "scale", ("sglang", "llama.cpp"), ""),
    ],
)
def test_what_only_peft_does(tmp_path, config, name, readers, thread):
    path = peft(tmp_path, **config)
    for reader in ("vllm", "sglang", "tgi", "llama.cpp"):
        assert (name in by_id(path, reader)) == (reader in readers)
    assert thread in by_id(path, readers[0])[name].source
    assert outcome(path)["peft"] == "reads it"


def test_an_alpha_of_zero(tmp_path):
    """llama.cpp takes it for a scale of 1 (get_scale in src/llama-adapter.h), where PEFT's is 0."""
    path = peft(tmp_path, lora_alpha=0)
    assert by_id(path, "llama.cpp")["scale"].evidence.endswith("was trained with 0 and gets 1 (inf x)")
    assert by_id(path, "peft")["zero"].severity == "error"


def test_embeddings_of_tgi(tmp_path):
    key = "base_model.model.embed_tokens.lora_embedding_"
    tensors = ranked({NAMES[0]: 4}) | {f"{key}A": np.ones((4, 9), "f4"), f"{key}B": np.ones((5, 4), "f4")}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8))
    assert by_id(path, "tgi")["embeddings"].evidence == "embed_tokens"
    assert "embeddings are adapted" in by_id(path, "mlx")["layout"].evidence


def test_biases_of_adapted_modules_are_not_the_base_models(tmp_path):
    tensors = ranked(dict.fromkeys(NAMES, 4)) | {f"base_model.model.{NAMES[0]}.base_layer.bias": np.ones(5, "f4")}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8, bias="lora_only"))
    for reader, name in (("llama.cpp", "keys"), ("sglang", "rest"), ("tgi", "rest")):
        assert "base_layer.bias" in by_id(path, reader)[name].evidence


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ({}, ()),
        ({"use_rslora": True, "rank_pattern": {}}, ()),
        ({"use_dora": True}, [f"{name}.lora_magnitude_vector" for name in NAMES]),
        ({"init_lora_weights": "pissa"}, ()),
        ({"modules_to_save": ["score"]}, ["score.weight"]),
        ({"lora_bias": True}, [f"{name}.lora_B.bias" for name in NAMES]),
        ({}, ["x.gate"]),
    ],
)
def test_commands_that_are_advised_work(tmp_path, config, extra):
    """For every reader; where export refuses an adapter, another way is named."""
    tensors = ranked(dict.fromkeys(NAMES, 4)) | {f"base_model.model.{name}": np.ones(5, "f4") for name in extra}
    path = write_adapter(tmp_path / "a", tensors, lora_config(r=4, lora_alpha=8) | config)
    (tmp_path / "base").mkdir()
    save_file({f"unet.{name}": np.ones(1, "f4") for name in NAMES}, tmp_path / "base" / "model.safetensors")
    commands = {one.remedy for one in found(path) if "msplora-analyze" in one.remedy and "--base" not in one.remedy}
    assert commands or config or extra
    for number, command in enumerate(sorted(commands)):
        words = shlex.split(command[command.index("msplora-analyze") :].replace("DIR", str(tmp_path / f"out{number}")))
        if "mlx" not in words:  # which has no modules of these names
            result = CliRunner().invoke(cli.make_app(), words[1:])
            assert (result.exit_code, result.exception) == (0, None), command


def test_experts(tmp_path):
    """PEFT puts the factors of all experts into one tensor: no rank that was not declared."""
    path = write_adapter(
        tmp_path / "a",
        ranked({"mlp.experts": 16}, rows=20, cols=20),
        lora_config(r=4, target_parameters=["mlp.experts.up"], use_rslora=True),
    )
    assert "rank" not in by_id(path, "peft")
    assert by_id(path, "vllm")["experts"].source == "github.com/vllm-project/vllm/issues/55545"


def test_in_python_it_is_a_table_that_says_what_comes_of_the_adapter(tmp_path):
    path = peft(tmp_path, use_rslora=True)
    table = ma.check(path)
    assert table.outcomes["llama.cpp"] == "wrong"
    assert table.outcomes["peft"] == "reads it"
    wrong = table[(table["reader"] == "llama.cpp") & (table["severity"] == "error")]
    assert wrong["id"].tolist() == ["scale"]
    assert "0.5 x" in wrong["evidence"].item()
    assert f"export {path} --out DIR --to gguf" in wrong["remedy"].item()
    html = table._repr_html_()
    assert "another scale" in html
    assert "older versions of several readers" in html
    assert "dataframe" in table[["reader", "title"]]._repr_html_()  # what pandas shows
    assert ma.check(path, "peft").outcomes == {"peft": "reads it"}
    assert ma.check(str(path), "peft")["severity"].tolist() == ["info", "info"]
    with pytest.raises(AnalysisError, match=r"reader=llama: expected one of .*llama\.cpp"):
        ma.check(path, "llama")
