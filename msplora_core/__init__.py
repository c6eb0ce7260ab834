"""Train MSPLoRA (Multi-Scale Pyramid LoRA, arXiv 2503.21838) as a native PEFT method.

from msplora_core import MSPLoraConfig
model = peft.get_peft_model(base, MSPLoraConfig(r=8, target_modules=["query", "value"]))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from msplora_core.version import __version__

if TYPE_CHECKING:
    from msplora_core.tuners.msplora import MSPLoraConfig, MSPLoraModel

__all__ = ["MSPLoraConfig", "MSPLoraModel", "__version__"]


# PEFT takes seconds to import, and `msplora-train --help` must not wait for it: the method is
# registered now if PEFT is loaded, else as soon as it is, which takes a finder of modules without wrapt.
@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    importlib.import_module("msplora_core.tuners.msplora")


def __getattr__(name: str) -> Any:
    if name in ("MSPLoraConfig", "MSPLoraModel"):
        return getattr(importlib.import_module("msplora_core.tuners.msplora"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
