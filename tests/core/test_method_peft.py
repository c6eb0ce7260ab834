"""What PEFT, transformers and FSDP ask of our methods beside training: files, loaders, batches, refusals."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertForQuestionAnswering

from msplora_core import MSPLoraConfig, names
from msplora_core.tuners.bitfit import BitFitConfig
from msplora_core.tuners.bottleneck import BottleneckConfig
from msplora_core.tuners.msplora.config import SCALES

from .conftest import make_bert, make_llama, make_t5, run_model

QUERY_VALUE = ["query", "value"]
METHODS = [MSPLoraConfig, BitFitConfig, BottleneckConfig]


def adapt(model: torch.nn.Module, method: Any = MSPLoraConfig, **options: Any) -> Any:
    """A model with an adapter that is not zero."""
    torch.manual_seed(1)
    return get_peft_model(model, method(init_weights=False, **options)).eval()


# --- A member of PEFT's enumeration ---


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_a_member_of_pefts_enumeration(method: Any) -> None:
    config = method()
    name = config.peft_type.value
    assert config.peft_type is getattr(PeftType, name) is PeftType(name)
    assert config.peft_type in list(PeftType)
    assert {name: 1}[config.peft_type] == 1  # and plain strings, as of a file, find it
    assert json.dumps(config.peft_type) == f'"{name}"'
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.peft_type is config.peft_type
    assert adapt(make_bert(layers=2), method).get_model_status().peft_types == {"default": name}


def test_names_and_method_agree_on_scales_and_ranks() -> None:
    assert SCALES == names.SCALES
    assert MSPLoraConfig(r=8).scale_ranks() == names.halved_ranks(8)


# --- Files ---


@pytest.mark.parametrize(
    ("options", "saving", "beside"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "lm_head.weight"),
        ({"modules_to_save": ["embed_tokens"]}, {}, "embed_tokens.weight"),
        ({}, {"save_embedding_layers": True}, "embed_tokens.weight"),
    ],
    ids=["head", "embedding", "save_embedding_layers"],
)
def test_what_peft_saves_beside_an_adapter_is_loaded(options: Any, saving: Any, beside: str, tmp_path: Path) -> None:
    base = make_llama(layers=2)
    base.resize_token_embeddings(70)
    untouched = copy.deepcopy(base)
    model = adapt(base, target_modules=["q_proj"], **options)
    model.save_pretrained(tmp_path, **saving)
    assert any(key.endswith(beside) for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = peft.PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(run_model(again), run_model(model))


def test_biases_beside_an_adapter_are_loaded(tmp_path: Path) -> None:
    model = adapt(make_bert(layers=2), target_modules=QUERY_VALUE, task_type="SEQ_CLS", bias="all")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_bert(layers=2), tmp_path)
    assert torch.equal(run_model(again), run_model(model))


class LikeOurs(torch.nn.Module):
    """A base model with a module that is called like a part of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
        self.msplora_head = torch.nn.Linear(8, 2)


@pytest.mark.parametrize("modules_to_save", [None, ["msplora_head"]])
def test_a_base_module_may_be_called_like_a_part_of_ours(modules_to_save: Any, tmp_path: Path) -> None:
    model = adapt(LikeOurs(), target_modules=["0", "1"], modules_to_save=modules_to_save)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("msplora_head" in key for key in saved) == (2 if modules_to_save else 0)
    again = peft.PeftModel.from_pretrained(LikeOurs(), tmp_path)
    expected, state = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in state if "msplora" in key and "default" in key)


def test_the_readme_says_how_to_load(tmp_path: Path) -> None:
    model = adapt(make_bert(layers=2), target_modules=QUERY_VALUE)
    for _ in range(2):  # once, however often it is saved
        model.save_pretrained(tmp_path)
        readme = (tmp_path / "README.md").read_text()
        assert readme.count("\n## How to load this MSPLoRA adapter\n") == readme.count("import msplora_core") == 1
    adapt(make_bert(layers=2), BitFitConfig).save_pretrained(tmp_path / "other")
    assert "BitFit" in (tmp_path / "other" / "README.md").read_text()


# --- Loaders and refusals of others ---


def test_transformers_loads_and_deletes_an_adapter(tmp_path: Path) -> None:
    make_llama(layers=4).save_pretrained(tmp_path / "base")
    model = adapt(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    expected = run_model(model)
    model.save_pretrained(tmp_path / "adapter")

    for loader in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        assert torch.equal(run_model(loader.from_pretrained(tmp_path / "adapter").eval()), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = run_model(plain)
    told = plain.load_adapter(tmp_path / "adapter", "one")
    assert not told.missing_keys  # shared pairs are no missing tensors
    assert not told.unexpected_keys
    assert torch.equal(run_model(plain), expected)
    plain.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    plain.delete_adapter("one")
    assert torch.equal(run_model(plain), before)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MSPLORA"):
        hotswap_adapter(model, tmp_path / "adapter", "default")


@pytest.mark.parametrize("method", METHODS)
def test_mixed_models_and_weighted_sums_are_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=f"'{method().peft_type.value}' is not compatible with the `PeftMixedModel`"):
        peft.PeftMixedModel(make_bert(layers=2), method())
    model = adapt(make_bert(layers=2), method)
    with pytest.raises(NotImplementedError, match=r"set_adapter\(\[\.\.\.\]\).*convert_to_lora"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# --- Batches of several adapters ---


@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_a_batch_has_its_adapter(method: Any) -> None:
    model = adapt(make_bert(layers=3), method)
    model.add_adapter("second", method(init_weights=False))
    tokens = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(input_ids=tokens).logits
    with model.disable_adapter():
        expected["__base__"] = model(input_ids=tokens).logits
    of_rows = ["second", "__base__", "default", "second"]
    mixed = model(input_ids=tokens, adapter_names=of_rows).logits
    for row, name in enumerate(of_rows):
        torch.testing.assert_close(mixed[row], expected[name][row])
    assert torch.equal(model(input_ids=tokens).logits, expected["second"])  # nothing stays behind
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
        model(input_ids=tokens, adapter_names=["third"] * 4)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=tokens, adapter_names=["second"])


def test_beam_search_of_an_encoder_and_decoder_with_several_adapters() -> None:
    model = adapt(make_t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model.add_adapter("second", MSPLoraConfig(init_weights=False, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    mixed = model.generate(input_ids=tokens, adapter_names=["default", "second"], **options)
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=tokens[row : row + 1], **options)[0]
        assert torch.equal(mixed[row, : len(alone)], alone)


def test_bitfit_leaves_the_heads_of_all_tasks_to_peft() -> None:
    base = BertForQuestionAnswering(make_bert(layers=2).config)
    model = get_peft_model(base, BitFitConfig(task_type="QUESTION_ANS"))
    assert type(model.base_model.model.qa_outputs) is ModulesToSaveWrapper


# --- Injection, names, dtypes ---


def test_a_state_dict_may_name_more_modules_than_the_config() -> None:
    reference = adapt(make_bert(layers=3), target_modules=QUERY_VALUE)
    tensors = {
        key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(reference).items()
    }
    config = MSPLoraConfig(target_modules=["query"])
    for model in (make_bert(layers=3), torch.compile(make_bert(layers=3), backend="eager")):
        with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
            peft.inject_adapter_in_model(config, model, state_dict=tensors)
        set_peft_model_state_dict(model, tensors)
        assert torch.equal(run_model(model.eval()), run_model(reference))


def test_a_state_dict_without_the_layer_scale_cannot_name_the_modules() -> None:
    config = MSPLoraConfig(ranks={"global": 4, "mid": 2}, target_modules=QUERY_VALUE)
    reference = get_peft_model(make_bert(), config)
    tensors = get_peft_model_state_dict(reference)
    with pytest.raises(ValueError, match="without the scale 'layer', a state dict does not name every module"):
        peft.inject_adapter_in_model(config, make_bert(), state_dict=tensors)


def test_all_linear_leaves_out_what_has_no_number_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out .*numbered layer: bert\.pooler\.dense"):
        model = adapt(make_bert(layers=2), target_modules="all-linear", task_type="SEQ_CLS")
    assert len(model.targeted_module_names) == 2 * 6


def test_the_update_has_the_dtype_of_the_factors() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        base = make_bert(layers=2).to(dtype)
        model = get_peft_model(base, MSPLoraConfig(target_modules=["query"]), autocast_adapter_dtype=False)
        layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
        assert layer.get_delta_weight("default").dtype == dtype


def test_inputs_are_not_cast_where_peft_is_told_so() -> None:
    model = adapt(make_bert(layers=2).to(torch.bfloat16), target_modules=["query"])  # factors are float32
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@pytest.mark.parametrize("method", METHODS)
def test_layers_say_what_they_are(method: Any) -> None:
    model = adapt(make_bert(layers=2), method)
    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    assert repr(layer).startswith(f"{method().peft_type.value.lower()}.{type(layer.get_base_layer()).__name__}(")
    if isinstance(layer.get_base_layer(), torch.nn.Linear):
        assert (layer.in_features, layer.out_features) == layer.get_base_layer().weight.shape[::-1]


def test_adapters_become_loras() -> None:
    model = adapt(make_bert(layers=3), target_modules=QUERY_VALUE)
    config, tensors = peft.convert_to_lora(model, rank=14)
    lora = get_peft_model(make_bert(layers=3), LoraConfig(**{**config.to_dict(), "peft_version": None}))
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(run_model(lora.eval()), run_model(model), rtol=1e-4, atol=1e-5)


# --- In processes of their own ---

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_sharded_training_is_training_on_one_device() -> None:
    """FSDP1 and FSDP2 with gloo; with GPUs the same script also checks DeepSpeed and bitsandbytes."""
    command = [sys.executable, "tests/gpu/run.py", "--parts", "fsdp", "--seconds", "800"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(checks) >= 12
    assert all(check["holds"] for check in checks), done.stdout
    assert done.returncode == 0


def test_to_ask_whether_peft_is_there_is_not_to_import_it() -> None:
    """transformers asks so before anybody imports PEFT; the method is registered all the same."""
    asks = "import importlib.util, msplora_core; importlib.util.find_spec('peft'); import peft"
    code = f"{asks}; assert 'MSPLORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


IN_PEFT = """
import sys, peft, torch
from peft.tuners.msplora import MSPLoraConfig
base = lambda: torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
model = peft.get_peft_model(base(), MSPLoraConfig(target_modules=["0", "1", "2"], init_weights=False))
model.save_pretrained("adapter")
again = peft.PeftModel.from_pretrained(base(), "adapter")
saved, loaded = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(again)
assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
assert "msplora_core" not in sys.modules
"""


@pytest.mark.slow
def test_the_folder_is_one_of_pefts(tmp_path: Path) -> None:
    """Copied into PEFT, with the name in its enumeration, the method works without this package."""
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "peft")
    ours = REPOSITORY / "msplora_core" / "tuners"
    shutil.copytree(ours / "msplora", tmp_path / "peft" / "tuners" / "msplora")
    shutil.copy(ours / "strict.py", tmp_path / "peft" / "tuners")
    enumeration = tmp_path / "peft" / "utils" / "peft_types.py"
    enumeration.write_text(enumeration.read_text().replace("    LORA =", '    MSPLORA = "MSPLORA"\n    LORA =', 1))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", IN_PEFT], cwd=tmp_path, env=environment, check=True)
