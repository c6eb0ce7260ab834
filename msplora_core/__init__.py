"""Train MSPLoRA (Multi-Scale Pyramid LoRA, arXiv 2503.21838) as a native PEFT method.

from msplora_core import MSPLoraConfig
model = peft.get_peft_model(base, MSPLoraConfig(r=8, target_modules=["query", "value"]))

and measure what a trained adapter is worth to its task:

from msplora_core import record_moments
record_moments(model, batches).save("adapter/moments.safetensors")
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from msplora_core.version import __version__

if TYPE_CHECKING:
    from msplora_core.measure.recording import record_moments
    from msplora_core.tuners.msplora import MSPLoraConfig, MSPLoraModel

__all__ = ["MSPLoraConfig", "MSPLoraModel", "__version__", "record_moments"]

_HEAVY = {
    "MSPLoraConfig": "msplora_core.tuners.msplora",
    "MSPLoraModel": "msplora_core.tuners.msplora",
    "record_moments": "msplora_core.measure.recording",
}
"""Where public names are that must not be imported before somebody asks for them."""


class _WhenPeftIsImported:
    """Registers our methods with PEFT once that is loaded: it takes seconds, and the command line must not wait.

    PEFT has no entry point for methods, and wrapt's hook costs 0.1 s at every start.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # whoever asks need not import it: transformers only asks whether it is there
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module
            loader.exec_module = lambda peft: (load(peft), importlib.import_module(_TUNERS))
        return spec


_TUNERS = "msplora_core.tuners"
if "peft" in sys.modules:
    importlib.import_module(_TUNERS)
else:
    sys.meta_path.insert(0, _WhenPeftIsImported())


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(importlib.import_module(_HEAVY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
