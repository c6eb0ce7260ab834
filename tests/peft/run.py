"""Run PEFT's own tests on MSPLoRA, BitFit and bottleneck adapters, with LoRA as control (``make test-peft``).

The tests are those of the installed PEFT, from its source distribution; nothing of them is in this repository.
Random models of the same architectures stand for the Hub's tiny ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("custom", "decoder", "encoder_decoder", "feature_extraction")
TESTS = [f"test_{name}_models.py" for name in FILES] + [
    "test_seq_classifier.py", "test_token_classification_qa.py", "test_config.py", "test_low_level_api.py",
    "test_initialization.py", "test_lora_conversion.py", "test_other.py",
]  # fmt: skip

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 1024,
}
ROTARY = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
SEQUENCE = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 64}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPT", "ForCausalLM", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 1024},
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJ", "ForCausalLM", {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "vocab_size": 1024},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "ForCausalLM", ROTARY),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", "ForCausalLM", ROTARY),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3Text:Gemma3", "ForCausalLM", ROTARY),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5", "ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 1024,
         "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "Bart", "ForConditionalGeneration", SEQUENCE | HEADS,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", "Model", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta", "Model", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta", "Model", SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2", "Model", SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert", "ForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "Roberta", "ForSequenceClassification", SIZES,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "Llama", "ForSequenceClassification", ROTARY | {"pad_token_id": 0},
    ),
}  # fmt: skip


def fetch(folder: Path) -> Path:
    """The folder with the tests of the installed PEFT; fetched once."""
    tests, name = folder / "tests", f"peft-{version('peft')}"
    if not tests.exists():
        download = ["download", "--quiet", "--no-deps", "--no-binary", "peft", f"peft=={version('peft')}"]
        subprocess.run([sys.executable, "-m", "pip", *download, "--dest", str(folder)], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (folder / name / "tests" / "__init__.py").touch()
        (folder / name / "tests").rename(tests)
        shutil.rmtree(folder / name)
    return tests


def make_models(folder: Path) -> None:
    """A cache of the Hub with random models under the names that the tests ask for."""
    import torch
    import transformers

    for name, (kind, head, options) in MODELS.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        if not (repository / "refs" / "main").exists():
            torch.manual_seed(0)
            config, _, architecture = kind.partition(":")
            model = getattr(transformers, f"{architecture or kind}{head}")(
                getattr(transformers, f"{config}Config")(**options)
            )
            model.save_pretrained(repository / "snapshots" / "0")
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text("0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".peft"), help="where the tests and models are kept")
    parser.add_argument("--files", nargs="*", default=TESTS, help="files of PEFT's tests, such as test_config.py")
    parser.add_argument("--processes", type=int, default=2)
    options, pytest_arguments = parser.parse_known_args()
    folder = options.folder.resolve() / version("peft")
    folder.mkdir(parents=True, exist_ok=True)
    tests = fetch(folder)
    make_models(folder / "hub")
    environment = {
        "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "suite", "--rootdir", str(folder), "-c", os.devnull, "-q"]
    command += ["--numprocesses", str(options.processes), "-W", "ignore", "-p", "no:cacheprovider", *pytest_arguments]
    command += [str(tests / name) for name in options.files]
    return subprocess.run(command, cwd=folder, env=os.environ | environment).returncode


if __name__ == "__main__":
    sys.exit(main())
