"""Read ``.bin`` and ``.pt`` files with PyTorch, as tensors and nothing else.

PyTorch is given ``weights_only=True``, which runs no code of the file. What it would not check is
checked here before: that nothing in the file claims more memory than the file has bytes.
"""

from __future__ import annotations

import pickletools
import zipfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import Place, local_copy
from msplora_analysis.files.tensors import FloatArray, TensorFile, is_text

if TYPE_CHECKING:
    import torch

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_MOST_FETCHED = 4 * 2**30  # bytes of a remote file, which is fetched whole
_MOST_PICKLED = 8 * 2**20  # bytes of the pickle that names the tensors: some 40,000 of them
_BYTES = b"\nbytearray\n"  # the one function PyTorch allows that makes as much memory as it is asked for
_NESTED = ("state_dict", "model_state_dict", "model", "module", "adapter", "lora")


class TorchFile(TensorFile):
    """A ``.bin`` or ``.pt`` file: a dictionary of tensors, or one of a few names in a dictionary of more."""

    def __init__(self, path: Place) -> None:
        self.path = path
        if find_spec("torch") is None:
            raise AnalysisError(
                f"{path}: reading it needs PyTorch; run `pip install torch`, or save the adapter as safetensors"
            )
        self._stack = ExitStack()
        try:
            file = self._stack.enter_context(local_copy(path, _MOST_FETCHED))
            loaded = self._load(file)
            self._tensors: dict[str, torch.Tensor] = self._named(loaded)
            self._check(self._tensors)
        except BaseException:
            self._stack.close()
            raise
        self.shapes, self.metadata = {n: tuple(t.shape) for n, t in self._tensors.items()}, {}

    def __exit__(self, *_: object) -> None:
        self._tensors = {}
        self._stack.close()

    def read(self, name: str) -> FloatArray:
        import torch

        tensor = self._tensors[name].detach()
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _FLOATS and not (kind in ("int64", "int32") and tensor.numel() == 1):  # alpha, say
            raise AnalysisError(
                f"{self.path}: tensor {name} is of type {kind}; expected float64, float32, float16 or bfloat16"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            what = "without data (meta)" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")
            raise AnalysisError(f"{self.path}: tensor {name} is {what}; expected a dense tensor")
        array: FloatArray = (tensor.float() if kind == "bfloat16" else tensor).resolve_neg().numpy()
        return array

    def _load(self, file: Path) -> Any:
        import torch

        try:
            mapped = zipfile.is_zipfile(file)  # only the zip layout (PyTorch >= 1.6) can be mapped
            with open(file, "rb") as opened:
                (self._check_zip if mapped else self._check_legacy)(opened)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except AnalysisError:
            raise
        except Exception as error:  # pickle, zip and torch each raise their own kinds
            raise AnalysisError(
                f"{self.path}: PyTorch cannot open it: {_reason(error)}; save or copy it again"
            ) from None

    def _check_zip(self, file: BinaryIO) -> None:
        pickled = 0
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise self._error(f"its entry {entry.filename} is compressed, which PyTorch never does")
                if entry.filename.endswith(".pkl"):
                    pickled += entry.file_size
                    if pickled > _MOST_PICKLED:
                        raise self._error(f"its names and shapes take {pickled} bytes")
                    if _BYTES in archive.read(entry):
                        raise self._error("it asks for a bytearray")

    def _check_legacy(self, file: BinaryIO) -> None:
        """A file without zip: five pickles, and then the data of the tensors."""
        for _ in range(5):
            for operation, argument, position in pickletools.genops(file):
                if (position or 0) > _MOST_PICKLED:
                    raise self._error(f"its names and shapes take more than {_MOST_PICKLED} bytes")
                if operation.name == "GLOBAL" and "bytearray" in str(argument):
                    raise self._error("it asks for a bytearray")

    def _named(self, loaded: Any) -> dict[str, Any]:
        """The dictionary of tensors that the file is, or that it holds under a name that is usual."""
        import torch

        if isinstance(loaded, dict):
            inner = [loaded[name] for name in _NESTED if isinstance(loaded.get(name), dict) and loaded[name]]
            for tensors in (loaded, *inner):
                if all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
                    return tensors
            name, other = next((n, t) for n, t in loaded.items() if not isinstance(n, str) or not torch.is_tensor(t))
            raise AnalysisError(
                f"{self.path}: expected a dictionary of named tensors; {name!r} is of type {type(other).__name__}"
            )
        raise AnalysisError(f"{self.path}: expected a dictionary of named tensors, got {type(loaded).__name__}")

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise AnalysisError for a name that is no text, and a tensor with more values than it has memory."""
        import torch

        for name, tensor in tensors.items():
            if not is_text(name):
                raise self._error(f"the name of tensor {name} is not valid Unicode")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                continue  # a type that ``read`` refuses
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise AnalysisError(
                    f"{self.path}: tensor {name} of shape {list(tensor.shape)} is an expanded view of fewer values; "
                    "save it contiguous"
                )

    def _error(self, what: str) -> AnalysisError:
        return AnalysisError(f"{self.path}: not a file of PyTorch's tensors: {what}; save or copy it again")


def _reason(error: Exception) -> str:
    """What is wrong, without PyTorch's advice on how to run the code of a file all the same."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return text.partition(" was not an allowed global")[0] or type(error).__name__
