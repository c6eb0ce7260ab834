"""What a format says of itself: which files are its own, what is in them, and whether plain LoRA can say the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from msplora_analysis.files.tensors import TensorFile
from msplora_analysis.formats.updates import Config, Contents, Matrix, Shapes
from msplora_analysis.options import Options


@dataclass(frozen=True, kw_only=True)
class Format:
    """An adapter format. A module of this folder, or of another package, has one as ``FORMAT``.

    Attributes:
        name: What it is called; formats are asked in the order of ``priority``, then of the names.
        read: The matrices of a file of this format, from the config, names, shapes and metadata. Raises AnalysisError
            without the file's name, which the caller adds.
        peft_types: Values of ``peft_type`` in adapter_config.json that are this format.
        lone: Whether tensors of these names are this format in a file without adapter_config.json. Such files are
            found in folders by it.
        recognises: Whether a file is of this format, where neither ``peft_types`` nor ``lone`` can tell it. The config
            is empty where there is none.
        why_no_lora: Why no plain LoRA equals an adapter: one reason for all, or a function that gives it, None for an
            adapter that has one. By default every sum of products has one.
        config_files: Of a file of weights by its whole name, the files beside it that configure it in place of
            adapter_config.json: JSON, or YAML with settings a line each. The config is their contents by their names.
        tells: Whether the updates have what a tensor says that is none of their factors, such as an alpha.
        names_of_llama_cpp: Whether modules have llama.cpp's names, which are not those of the model's own code.
        takes_base: Whether an adapter of a config is read with the model before training, where one is given.
        routed: Whether a router mixes the matrices ``<module>.0``, ``<module>.1``, ... anew for every input.
        shares_layers: Whether layers have the same factors by design, so that their updates may be equal.
        reads_values: Whether ``read`` also looks at values, so that no two files are known to have the same matrices.
        priority: Formats of a higher one are asked first.
    """

    name: str
    read: Callable[[Config, TensorFile, Options], Contents]
    peft_types: tuple[str, ...] = ()
    lone: Callable[[Collection[str]], bool] | None = None
    recognises: Callable[[Config, TensorFile], bool] | None = None
    why_no_lora: str | Callable[[Config, Shapes, Sequence[Matrix]], str | None] | None = None
    config_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tells: Callable[[str], bool] = lambda name: False
    names_of_llama_cpp: bool = False
    takes_base: Callable[[Config], bool] = lambda config: False
    routed: bool = False
    shares_layers: bool = False
    reads_values: bool = False
    priority: int = 0

    def matches(self, config: Config, file: TensorFile) -> bool:
        """Whether a file is of this format."""
        if self.recognises:
            return self.recognises(config, file)
        if self.lone and not config:
            return self.lone(file.shapes)
        return config.get("peft_type") in self.peft_types

    def not_as_lora(self, config: Config, shapes: Shapes, matrices: Sequence[Matrix]) -> str | None:
        """Why no plain LoRA equals an adapter of these matrices; None if one does."""
        reason = self.why_no_lora
        return reason(config, shapes, matrices) if callable(reason) else reason
