"""Adapter methods that PEFT lacks, each as a PEFT tuner; importing this package registers them with PEFT.

``msplora`` has the shape of the folders in ``peft/tuners``, and stands on ``strict`` as LoHa and LoKr there stand on
``lycoris_utils``: both can be copied there, once PEFT's enumeration of methods has the name.
"""

import importlib

from peft.utils import PeftType

METHODS = ("msplora", "bitfit", "bottleneck", "sora")


def _add_to_peft_types(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which Python closes but which PEFT asks everywhere."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


for _method in METHODS:
    _add_to_peft_types(_method.upper())
for _method in METHODS:
    importlib.import_module(f"{__name__}.{_method}")
