"""Adapters as other programs read them: written, read back, and loaded by those programs where they install."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from test_export import adapted, error, loaded, save, updates

import msplora_analysis as ma

peft = pytest.importorskip("peft")
from msplora_core import MSPLoraConfig  # noqa: E402

torch.set_num_threads(1)

HEADS, KEYS, WIDTH = 4, 2, 32  # of the tiny Llama


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def mixed(**options):
    """An adapter whose scale no single number says: rsLoRA, two ranks, two alphas."""
    return peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 7,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"o_proj": 3},
            "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
            **options,
        }
    )


def export(adapter, out, to, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ma.export(adapter, out, to=to, **options)


def sigma(path):
    """Singular values of all modules, without their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spectra = ma.load_spectra(path, cache=False)
    return np.sort(spectra["sigma"].to_numpy())


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_language_models(tmp_path, base, to):
    if to == "gguf":
        pytest.importorskip("gguf")
    model = adapted(llama(), mixed())
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", to, base=base)
    found = sigma(tmp_path / "b")
    assert found[found > 0] == pytest.approx(sigma(tmp_path / "a"), rel=1e-6)

    # Back again, tensor by tensor.
    export(tmp_path / "b", tmp_path / "c", "peft", base=base)
    export(tmp_path / "a", tmp_path / "d", "peft")
    there, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "cd")
    assert there.keys() == here.keys()
    for name, values in here.items():
        own = tuple(slice(size) for size in values.shape)
        assert np.array_equal(there[name][own], values), name
        assert there[name].shape == values.shape or (to == "mlx" and "k_proj" in name)
        there[name][own] = 0
        assert not there[name].any()
    found, expected = updates(loaded(llama(), tmp_path / "c")), updates(model)
    for name, delta in expected.items():
        assert found[name] == pytest.approx(delta, rel=1e-5, abs=1e-6)


def test_gguf_as_its_own_package_reads_it(tmp_path, base):
    gguf = pytest.importorskip("gguf")
    model = adapted(llama(), mixed())
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "b" / "adapter.gguf")
    about = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert about == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert reader.fields["adapter.lora.alpha"].contents() == 0  # ranks differ: the scale is 1

    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    delta = updates(model)
    size = WIDTH // HEADS
    for kind, name, heads in (("attn_q", "q_proj", HEADS), ("attn_k", "k_proj", KEYS)):
        found = tensors[f"blk.1.{kind}.weight.lora_b"].astype(float) @ tensors[f"blk.1.{kind}.weight.lora_a"]
        expected = delta[f"model.layers.1.self_attn.{name}"]
        # llama.cpp rotates rows 2 i and 2 i + 1 of a head together, transformers i and i + size / 2.
        for head in range(heads):
            for i in range(size // 2):
                for half in (0, 1):
                    row, own = head * size + 2 * i + half, head * size + i + half * (size // 2)
                    assert found[row] == pytest.approx(expected[own], rel=1e-5, abs=1e-6)
    found = tensors["blk.0.ffn_down.weight.lora_b"].astype(float) @ tensors["blk.0.ffn_down.weight.lora_a"]
    assert found == pytest.approx(delta["model.layers.0.mlp.down_proj"], rel=1e-5, abs=1e-6)


def test_gguf_embeddings_and_one_rank(tmp_path, base):
    gguf = pytest.importorskip("gguf")
    save(adapted(llama(), peft.LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"])), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "gguf", base=base, dtype="float16")
    reader = gguf.GGUFReader(tmp_path / "b" / "adapter.gguf")
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes["token_embd.weight.lora_a"] == (40, 3)
    assert shapes["token_embd.weight.lora_b"] == (WIDTH, 3)
    assert shapes["output.weight.lora_a"] == (3, WIDTH)
    assert reader.fields["adapter.lora.alpha"].contents() == 3
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}
    llama(tied=True).save_pretrained(tmp_path / "tied")
    assert "one tensor" in error(ma.export, tmp_path / "a", tmp_path / "c", to="gguf", base=tmp_path / "tied")
    assert "embed_tokens: MLX-LM applies" in error(ma.export, tmp_path / "a", tmp_path / "c", to="mlx")
    assert not (tmp_path / "c").exists()


def test_what_a_reader_has_no_place_for(tmp_path):
    save(adapted(llama(), mixed(bias="lora_only", modules_to_save=["lm_head"])), tmp_path / "a")
    message = error(ma.export, tmp_path / "a", tmp_path / "b", to="mlx")
    assert "lm_head.weight would be lost" in message
    assert "ignore_unknown=True" in message
    with pytest.warns(UserWarning, match=r"lm_head\.weight left out, which was trained"):
        ma.export(tmp_path / "a", tmp_path / "b", to="mlx", ignore_unknown=True)
    save(adapted(llama(), mixed()).double(), tmp_path / "wide")
    with pytest.warns(UserWarning, match="rounded to float32"):
        ma.export(tmp_path / "wide", tmp_path / "c", to="mlx")
    assert "dtype=float64: an adapter of MLX-LM" in error(
        ma.export, tmp_path / "wide", tmp_path / "d", to="mlx", dtype="float64"
    )


@pytest.mark.parametrize(
    ("to", "base", "message"),
    [
        ("onnx", None, "to=onnx: expected one of diffusers, gguf, kohya, mlx, peft"),
        ("gguf", None, "give the folder of the model as base="),
        ("gguf", {}, "without architectures in its config.json"),
        ("gguf", {"architectures": ["BertModel"]}, "of the classes ['BertModel']"),
        ("gguf", {"architectures": ["LlamaForCausalLM"]}, "num_hidden_layers of its config.json is None"),
        ("kohya", None, "which model of a pipeline has the module model.layers.0.mlp.down_proj is not known"),
        ("diffusers", None, "the model as base=; for a language model alone there are to=peft, to=mlx and to=gguf"),
        ("kohya", {"architectures": ["LlamaForCausalLM"]}, "config.json (LlamaForCausalLM); for a language model"),
    ],
)
def test_refused(tmp_path, to, base, message):
    if to == "gguf":
        pytest.importorskip("gguf")
    save(adapted(llama(), mixed()), tmp_path / "a")
    path = None
    if base is not None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(base))
    assert message in error(ma.export, tmp_path / "a", tmp_path / "b", to=to, base=path)
    assert not (tmp_path / "b").exists()


def test_mlx_folder(tmp_path):
    save(adapted(llama(), mixed()), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "mlx")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    keys = ["mlp.down_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj"]
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    tensors = load_file(tmp_path / "b" / "adapters.safetensors")
    # MLX-LM wants one rank: that of k_proj, 2, is filled up.
    assert tensors["model.layers.0.self_attn.k_proj.lora_a"].shape == (WIDTH, 4)
    assert tensors["model.layers.0.self_attn.k_proj.lora_b"].shape == (4, WIDTH // HEADS * KEYS)


def test_mlx_lm_computes_the_same(tmp_path, base):
    mlx = pytest.importorskip("mlx.core")
    loading = pytest.importorskip("mlx_lm.utils")
    from mlx_lm.tuner.utils import load_adapters

    model = adapted(llama(), mixed(layers_to_transform=[0]))
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "mlx")
    tokens = torch.tensor([[1, 5, 9, 2, 7]])
    theirs = load_adapters(loading.load_model(base)[0], str(tmp_path / "b"))(mlx.array(tokens.numpy()))
    with torch.no_grad():
        assert np.array(theirs) == pytest.approx(model(tokens).logits.numpy(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["mlx", "gguf", "diffusers", "kohya"])
def test_half_precision_there_and_back(tmp_path, base, to, dtype):
    """Where alpha / r is a power of two, every bit is that of the plain LoRA for PEFT."""
    if to == "gguf":
        pytest.importorskip("gguf")
    language = to in ("mlx", "gguf")
    if language:  # its global and mid products are in every module
        model = adapted(llama(), MSPLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"]))
    else:
        model = adapted(unet(), peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "proj_in", "conv1"]))
    save(model.to(dtype), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", to, base=base if language else None)
    export(tmp_path / "b", tmp_path / "c", "peft", base=base if language else None)
    export(tmp_path / "a", tmp_path / "d", "peft")
    there, here = (load_torch_file(tmp_path / name / "adapter_model.safetensors") for name in "cd")
    assert there.keys() == here.keys()
    back = torch.float32 if (to, dtype) == ("gguf", torch.bfloat16) else dtype  # read as float32, which holds it
    for name, values in here.items():
        assert (there[name].dtype, values.dtype) == (back, dtype)
        assert torch.equal(there[name].to(dtype), values), name


# Diffusion pipelines


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(**sizes, **blocks, cross_attention_dim=12, attention_head_dim=4).eval()


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    with torch.no_grad():
        return model(x, 3, text).sample.numpy()


OF_UNET = {"target_modules": ["to_q", "to_k", "to_out.0", "proj_in", "conv1"], "rank_pattern": {"to_k": 2}}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusion(tmp_path, to):
    """PEFT's adapter of a U-Net as diffusers itself loads it, and back as PEFT loads it."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    base = unet()
    base.save_pretrained(tmp_path / "base")
    # Of kohya's files diffusers 0.42 takes the alpha of a module in an attention for that of all, where they differ.
    ranks = OF_UNET if to == "diffusers" else OF_UNET | {"rank_pattern": {}}
    model = adapted(base, mixed(alpha_pattern={"proj_in": 3}, **ranks))
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.mul_(0.1 if "lora_" in name else 1)  # so that rounding stays small, too
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", to)
    assert sigma(tmp_path / "b") == pytest.approx(sigma(tmp_path / "a"), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas, metadata = Loader.lora_state_dict(
            tmp_path / "b",
            unet_config=base.config,
            return_lora_metadata=True,
            weight_name={"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}[to],
        )
        other = unet()
        Loader.load_lora_into_unet(state, network_alphas=alphas, unet=other, metadata=metadata)
    expected = outputs(model.base_model.model)
    assert np.abs(expected - outputs(base)).max() > 0.01
    assert outputs(other) == pytest.approx(expected, abs=1e-5)

    export(tmp_path / "b", tmp_path / "c", "peft", base=tmp_path / "base")
    assert outputs(loaded(unet(), tmp_path / "c").base_model.model) == pytest.approx(expected, abs=1e-5)


def test_kohya_by_the_rules_of_comfyui(tmp_path):
    """Of a module ComfyUI adds alpha / rank * up @ down, flattened, in the shape of the weight; else a scale of 1."""
    model = adapted(unet(), mixed(alpha_pattern={"proj_in": 3}, **OF_UNET))
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "kohya")
    tensors, expected = load_file(tmp_path / "b" / "lora.safetensors"), updates(model)
    for name, delta in expected.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = (tensors.pop(f"{key}.lora_{way}.weight").astype(float) for way in ("up", "down"))
        found = tensors.pop(f"{key}.alpha") / len(down) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))
        assert found.reshape(delta.shape) == pytest.approx(delta, rel=1e-5, abs=1e-5)
    assert not tensors
    assert any(delta.ndim == 4 for delta in expected.values())


def test_underscores(tmp_path):
    """kohya's names, by the names of the base, by known ones, and refused."""
    pytest.importorskip("diffusers")
    save(adapted(unet(), peft.LoraConfig(**OF_UNET)), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "kohya")
    with pytest.warns(UserWarning, match="underscores of its module names were read as dots"):
        ma.export(tmp_path / "b", tmp_path / "known")  # all its components are diffusers' own
    names = sorted(ma.export(tmp_path / "a", tmp_path / "d")["name"])
    (tmp_path / "names.txt").write_text("\n".join(names))
    export(tmp_path / "b", tmp_path / "listed", "peft", base=tmp_path / "names.txt")
    for folder in ("known", "listed"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"] == names
    first = next(name for name in names if "attn1.to" in name)
    (tmp_path / "names.txt").write_text("\n".join([*names, first.replace("attn1.to", "attn1_to")]))
    message = error(ma.export, tmp_path / "b", tmp_path / "e", base=tmp_path / "names.txt")
    assert f" is {first} or " in message
    (tmp_path / "names.txt").write_text("\n".join(names[1:]))
    assert "fits no module of base=" in error(ma.export, tmp_path / "b", tmp_path / "e", base=tmp_path / "names.txt")


def test_models_of_a_pipeline(tmp_path):
    """U-Net and both text encoders of one file, there and back; PEFT's folder is of one."""
    rng = np.random.default_rng(0)
    names = ["unet.mid_block.attentions.0.proj_in"]
    names += [f"text_encoder{n}.text_model.encoder.layers.3.self_attn.q_proj" for n in ("", "_2")]
    tensors = {
        f"{name}.lora_{f}.weight": rng.normal(size=size) for name in names for f, size in (("A", (2, 6)), ("B", (5, 2)))
    }
    (tmp_path / "a").mkdir()
    save_file({name: values.astype("f4") for name, values in tensors.items()}, tmp_path / "a" / "some.safetensors")
    export(tmp_path / "a", tmp_path / "b", "kohya")
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "b" / "lora.safetensors")}
    assert keys == {
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_3_self_attn_q_proj",
    }
    export(tmp_path / "b", tmp_path / "c", "diffusers")
    back = load_file(tmp_path / "c" / "pytorch_lora_weights.safetensors")
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        assert np.array_equal(back[name], values.astype("f4"))
    assert "several models" in error(ma.export, tmp_path / "b", tmp_path / "d")


def test_gguf_is_optional(tmp_path, monkeypatch):
    save(adapted(llama(), mixed()), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "config.json").write_text("{}")
    message = error(ma.export, tmp_path / "a", tmp_path / "b", to="gguf", base=tmp_path / "config.json")
    assert message.endswith("pip install 'msplora[gguf]'")


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_base_without_the_modules(tmp_path, base, to):
    save(adapted(unet(), peft.LoraConfig(**OF_UNET)), tmp_path / "a")
    message = error(ma.export, tmp_path / "a", tmp_path / "b", to=to, base=base)
    assert "down_blocks" in message
    assert f"no model of base={base} has this module" in message


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_language_model_in_a_pipeline(tmp_path, base, to):
    """Of a Llama that encodes the text, the pipeline's folder tells the name, both ways."""
    save(adapted(llama(), mixed()), tmp_path / "a")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text('{"text_encoder": ["transformers", "LlamaForCausalLM"]}')
    (pipeline / "text_encoder").symlink_to(base)
    export(tmp_path / "a", tmp_path / "b", to, base=pipeline)
    export(tmp_path / "b", tmp_path / "c", "peft", base=pipeline)
    export(tmp_path / "a", tmp_path / "d", "peft")
    there, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "cd")
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_trained_biases_are_no_weights_of_the_base(tmp_path, to):
    """PEFT saves those of adapted modules as base_layer.bias."""
    save(adapted(unet(), peft.LoraConfig(bias="lora_only", **OF_UNET)), tmp_path / "a")
    message = error(ma.export, tmp_path / "a", tmp_path / "b", to=to)
    assert ".base_layer.bias and " in message
    assert "would be lost" in message


def test_a_model_that_peft_makes_deeper(tmp_path, base):
    save(adapted(llama(), mixed(layer_replication=[[0, 2], [1, 2]])), tmp_path / "a")
    assert "layer_replication" in error(ma.export, tmp_path / "a", tmp_path / "b", to="mlx", base=base)
    assert len(ma.export(tmp_path / "a", tmp_path / "b")) == 12


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("lora_unet_transformer_blocks_3_attn_to_q", "transformer.transformer_blocks.3.attn.to_q"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_unet_input_blocks_4_1_proj_in", None),
        ("lora_unet_strange_thing", None),
    ],
)
def test_known_names(tmp_path, key, module):
    tensors = {f"{key}.lora_down.weight": np.ones((2, 6), "f4"), f"{key}.lora_up.weight": np.ones((5, 2), "f4")}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "some.safetensors")
    if module:
        export(tmp_path / "a", tmp_path / "b", "diffusers")
        found = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
        assert sorted(found) == [f"{module}.lora_{factor}.weight" for factor in "AB"]
        return
    assert "the dots of the module's name are not in the file" in error(ma.export, tmp_path / "a", tmp_path / "b")
    (tmp_path / "names.txt").write_text("down_blocks.0.proj_in")
    message = error(ma.export, tmp_path / "a", tmp_path / "b", base=tmp_path / "names.txt")
    assert ("own code" in message) == ("input_blocks" in key)


@pytest.mark.parametrize("ranks", [{}, {"to_k": 2}])
def test_check_says_what_diffusers_does(tmp_path, ranks):
    """Whether ``check`` has a word on kohya's alphas is whether diffusers gives its modules another scale than 1."""
    diffusers = pytest.importorskip("diffusers")
    if not diffusers.__version__.startswith("0.42."):
        pytest.skip("what is said was measured with 0.42")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    from msplora_analysis.adapters.discovery import discover
    from msplora_analysis.ask.readers import check
    from msplora_analysis.options import Options

    save(adapted(unet(), peft.LoraConfig(**OF_UNET | {"r": 4, "rank_pattern": ranks})), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b", "kohya")
    (adapter,) = discover(tmp_path / "b")
    said = "scale" in {fault.id for fault in check(adapter, "diffusers", Options())}
    state, alphas = Loader.lora_state_dict(tmp_path / "b", unet_config=unet().config, weight_name="lora.safetensors")
    model = unet()
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    scales = [module.scaling["default_0"] for module in model.modules() if hasattr(module, "get_delta_weight")]
    assert said == any(scale != 1 for scale in scales) == bool(ranks)
