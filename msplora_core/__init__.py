"""Train MSPLoRA (Multi-Scale Pyramid LoRA, arXiv 2503.21838) as a native PEFT method.

from msplora_core import MSPLoraConfig
model = peft.get_peft_model(base, MSPLoraConfig(r=8, target_modules=["query", "value"]))
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from msplora_core.version import __version__

if TYPE_CHECKING:
    from msplora_core.tuners.msplora import MSPLoraConfig, MSPLoraModel

__all__ = ["MSPLoraConfig", "MSPLoraModel", "__version__"]


class _WhenPeftIsImported:
    """Registers MSPLoRA with PEFT once PEFT is loaded: it takes seconds to import, and the command line must not wait.

    PEFT has no entry point for methods, and wrapt's hook costs 0.1 s at every start.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda peft: (load(peft), importlib.import_module(_TUNER))  # type: ignore
        return spec


_TUNER = "msplora_core.tuners.msplora"
if "peft" in sys.modules:
    importlib.import_module(_TUNER)
else:
    sys.meta_path.insert(0, _WhenPeftIsImported())


def __getattr__(name: str) -> Any:
    if name in ("MSPLoraConfig", "MSPLoraModel"):
        return getattr(importlib.import_module(_TUNER), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
