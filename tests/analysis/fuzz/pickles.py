"""Files of PyTorch: archives, older files, distributed checkpoints."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.values import mutate_bytes


def spoil_torch(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A file of PyTorch, zip or older: its bytes, or the operations of its pickle."""
    import torch

    file = next((run / "checkpoint-7").glob("*.safetensors"))
    values: Any = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    if rng.random() < 0.3:
        values = {"state_dict": values, "epoch": 1, "optimizer": {"lr": [0.1, (2, "x")]}}
    zipped = rng.random() < 0.6
    buffer = io.BytesIO()
    torch.save(values, buffer, _use_new_zipfile_serialization=zipped)
    content = buffer.getvalue()
    if zipped and rng.random() < 0.7:
        content = _other_pickle(rng, content)
    else:
        content = mutate_bytes(rng, content, rng.choice([2000, None]))
    file.unlink()
    new = file.with_suffix(".bin" if file.stem == "adapter_model" else ".pt")
    new.write_bytes(content)
    return new


def spoil_parts(rng: random.Random, run: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A distributed checkpoint of PyTorch: its list of tensors, or their parts."""
    import torch
    import torch.distributed.checkpoint as dcp

    file = next((run / "checkpoint-7").glob("*.safetensors"))
    file.unlink()
    values = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": values, "step": 7}, checkpoint_id=file.parent, no_dist=True)
    spoiled = file.parent / rng.choice([".metadata", ".metadata", "__0_0.distcp"])
    spoiled.write_bytes(mutate_bytes(rng, spoiled.read_bytes(), rng.choice([2000, None])))
    return run


OPCODES = [bytes([code]) for code in range(256)]
OPERATIONS = [bytes([code]) for code in b"()]}useaRbQt\x85\x86\x8702N\x88\x81."]
OPERATIONS += [b"K\x02", b"J\xff\xff\xff\x7f", b"M\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"q\x00", b"h\x00"]
OPERATIONS += [b"h\x01", b"h\x05", b"r\xff\xff\xff\xff", b"j\x00\x00\x00\x00", b"X\x01\x00\x00\x00a"]
OPERATIONS += [b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8]
OPERATIONS += [b"cos\nsystem\n", b"ctorch\nTensor\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]
OPERATIONS += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n"]
OPERATIONS += [b"ctorch._tensor\n_rebuild_from_type_v2\n"]


def _other_pickle(rng: random.Random, content: bytes) -> bytes:
    """A zip archive of PyTorch with other operations in its pickle, or other entries."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    name = next(one for one in entries if one.endswith("data.pkl"))
    if rng.random() < 0.8:
        pickled = bytearray(entries[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(pickled) + 1)
            kind = rng.random()
            operation = rng.choice(OPERATIONS if rng.random() < 0.7 else OPCODES)
            if kind < 0.4:
                pickled[at:at] = operation
            elif kind < 0.8:
                pickled[at : at + len(operation)] = operation
            else:
                del pickled[at : at + rng.choice([1, 2, 8])]
        entries[name] = bytes(pickled)
    else:
        old = rng.choice(list(entries))
        new = rng.choice(
            [old.upper(), old.replace("data", "DATA"), "../" + old, old + "x", "x/data.pkl", "\x1b[1m", old]
        )
        entries[new] = entries.pop(old) if rng.random() < 0.5 else rng.choice(list(entries.values()))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    return made.getvalue() if rng.random() < 0.8 else mutate_bytes(rng, made.getvalue())
