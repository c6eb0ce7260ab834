"""What ``torch.save`` writes of a dictionary of tensors, read without running anything.

A pickle is a program. Here its operations only move values: those that ``torch.save`` writes of a state
dict are known, with the few functions that it names (``torch/_utils.py`` and ``torch/_weights_only_unpickler.py``
list them), and each of these gives a description. No function is called, and no attribute set. Whatever
else a pickle asks for is refused. Work is bounded by the number of operations; no value is hashed,
compared or printed but texts and small numbers.
"""

from __future__ import annotations

import math
import pickletools
from typing import IO, Any, NamedTuple

from msplora_analysis.files.tensors import MOST_AXES, Shape

MOST_OPERATIONS = 2**21  # some 40 a tensor
_SIZES = {  # bytes of a value
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "qint32": 4, "qint8": 1, "quint8": 1, "quint4x2": 1, "quint2x4": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "QInt32": "qint32", "QInt8": "qint8", "QUInt8": "quint8", "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4", "Untyped": "uint8",
}  # fmt: skip
_KINDS = {f"torch.{place}{name}Storage": kind for name, kind in _STORAGES.items() for place in ("", "cuda.")}
_KINDS |= {"torch.storage.UntypedStorage": "uint8"} | {f"torch.{kind}": kind for kind in _SIZES}
_STRIDED = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
_WRAPPED = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_OTHER_TENSORS = {
    "_rebuild_meta_tensor_no_storage": "without data (meta)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_wrapper_subclass": "of a class of its own",
    "_rebuild_device_tensor_from_numpy": "of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "of another device",
}
_REBUILD = {f"torch._utils.{name}" for name in (*_STRIDED, *_WRAPPED, *_OTHER_TENSORS, "_rebuild_sparse_tensor")}
_INERT = {  # values that no tensor is made of
    "torch.device", "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams", "collections.Counter", "_codecs.encode",
    "builtins.set", "builtins.complex",
}  # fmt: skip
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_KNOWN = {*_KINDS, *_REBUILD, *_INERT, *_DICTIONARIES, "torch.serialization._get_layout", "torch.Size"}
_KNOWN |= {"torch._tensor._rebuild_from_type_v2", "torch.Tensor", "torch.nn.parameter.Parameter"}
# What describes tensors in several files, and is kept by its fields; _SHARDED: how one tensor is cut.
_SHARDED = "torch.distributed.tensor._dtensor_spec."
_OF_FILES = "torch.distributed.checkpoint."
_RECORDS = {
    *(f"{_SHARDED}{name}" for name in ("DTensorSpec", "TensorMeta")),
    *(f"torch.distributed.tensor.placement_types.{name}" for name in ("Shard", "Replicate")),
    f"{_OF_FILES}filesystem._StorageInfo",
}
_RECORDS |= {
    f"{_OF_FILES}metadata.{name}"
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata")
}
# What trainers put beside tensors, such as their settings: nothing of it is made, whatever it is.
_BESIDE = (
    *("argparse.", "datetime.", "numpy.", "omegaconf.", "pathlib.", "typing.", "types.SimpleNamespace"),
    *("torch.distributed.", "torch.optim.", "torch.torch_version.", "accelerate.", "deepspeed.", "lightning."),
    *("lightning_fabric.", "megatron.", "pytorch_lightning.", "transformers."),
)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_VALUES |= {"SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}  # of later protocols
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(ValueError):
    """What in a file is not of ``torch.save``."""


class Global(NamedTuple):
    """A name that the file asks for."""

    name: str


class Inert(NamedTuple):
    """A value that no tensor is made of, by the name of its type."""

    type: str


class Record(NamedTuple):
    """An object that is known by its fields, which stand in ``fields`` or, in order, in ``args``."""

    type: str
    args: tuple[Any, ...]
    fields: dict[str, Any]


class Part(NamedTuple):
    """That a tensor is a part of a larger one of this ``shape``, cut along ``axis``; None: a copy of it."""

    shape: Shape
    axis: int | None


class Storage(NamedTuple):
    """Bytes that tensors share. ``begin``, ``size``: of these, in bytes, in the entry ``key`` of the file."""

    key: str
    kind: str
    begin: int
    size: int

    @property
    def item(self) -> int:
        """Bytes of a value."""
        return _SIZES[self.kind]


class Stored(NamedTuple):
    """A tensor. Without a storage, ``kind`` says what it is instead of dense. Offset and strides count values."""

    kind: str
    shape: Shape = ()
    storage: Storage | None = None
    offset: int = 0
    strides: tuple[int, ...] = ()
    negated: bool = False
    part: Part | None = None

    @property
    def values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def item(self) -> int:
        """Bytes of a value; 0 for a kind that is not known."""
        return _SIZES.get(self.kind, 0)

    @property
    def span(self) -> int:
        """Values from the first to the last, those between that are not its own included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def unpickle(stream: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The value of the next pickle in ``stream``: dictionaries, lists, texts, numbers, Stored, Inert.

    Args:
        stream: It is left behind the pickle.
        storages: Every storage that the pickle tells of is entered, by its key.

    Raises:
        RefusedError: It is damaged, or asks for more than tensors.
    """
    try:
        return _run(stream, {} if storages is None else storages)
    except RefusedError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:  # of pickletools, or of a missing operand
        raise RefusedError(f"it is damaged or cut off ({type(error).__name__})") from None


def _run(stream: IO[bytes], storages: dict[str, Storage]) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        taken = stack[at:]
        del stack[at:]
        return taken

    argument: Any
    for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_OPERATIONS:
            raise RefusedError(f"its names and shapes take more than {MOST_OPERATIONS} operations")
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(_last(stack, _TUPLES[name]))]
        elif name == "REDUCE":
            function, args = _last(stack, 2)
            stack[-2:] = [_called(function, args)]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
            storages.setdefault(stack[-1].key, stack[-1])
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _set(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            if type(stack[-1]) is list:
                stack[-1].extend(items)
            elif type(stack[-1]) is not Inert:
                raise RefusedError("it appends to what is no list")
        elif name == "BUILD":
            _built(stack.pop(), stack[-1])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_global(" ".join(map(_text, _last(stack, 2))))]
        elif name == "NEWOBJ":
            function, args = _last(stack, 2)
            stack[-2:] = [_called(function, args)]
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"its pickle has the operation {name}, which torch.save does not write")
    raise RefusedError("it is cut off")


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise RefusedError("it is damaged or cut off (no operands)")
    return stack[-count:]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise RefusedError("it asks for what has no name")
    return value


def _built(state: Any, target: Any) -> None:
    """Give an object its fields. Of most, such as the _metadata of a state dict, nothing is needed."""
    if type(target) is Record:
        target.fields.update(_fields(state))
    elif type(target) is not Inert and not (type(target) is type(state) is dict):
        raise RefusedError("it sets attributes of what has none")


def _fields(state: Any) -> dict[str, Any]:
    """The fields that a state gives: a dictionary, or a pair of those with and without slots."""
    parts = state if type(state) is tuple else (state,)
    if len(parts) > 2 or not all(type(part) is dict or part is None for part in parts):
        raise RefusedError("it sets attributes of what has none")
    return {key: value for part in parts if part for key, value in part.items()}


def _set(target: Any, items: list[Any]) -> None:
    if type(target) is Inert:
        return
    if type(target) is not dict or len(items) % 2:
        raise RefusedError("it sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is Record:
            target[_place_of(key)] = value
            continue
        # Texts and small numbers are hashed in bounded time; a tuple of tuples, or numbers made to collide, are not.
        if not (type(key) is str or (type(key) in (int, bool) and abs(key) < 2**31) or key is None):
            raise RefusedError(f"a dictionary has a key of type {kind_of(key)}")
        target[key] = value


def _place_of(index: Record) -> tuple[str, Shape]:
    """The name of a tensor in several files, and where a part of it begins: hashed in bounded time."""
    name, offset = index.fields.get("fqn"), index.fields.get("offset")
    offset = () if offset is None else offset
    if type(name) is not str or type(offset) is not tuple or len(offset) > MOST_AXES or not are_counts(*offset):
        raise RefusedError("the place of a tensor is malformed")
    return name, offset


def _global(argument: str) -> Global:
    name = argument.replace(" ", ".").replace("__builtin__.", "builtins.")
    if name not in _KNOWN and name not in _RECORDS and not name.startswith(_BESIDE):
        raise RefusedError(f"it asks for {name}, which is no part of a dictionary of tensors")
    return Global(name)


def _storage(persistent: Any) -> Storage:
    """``("storage", type, key, device, number of values)``; old files add None or the view that it is."""
    if type(persistent) is not tuple or len(persistent) not in (5, 6) or persistent[0] != "storage":
        raise RefusedError("it asks for something else than a storage of tensors")
    _, of, key, _, count, *more = persistent
    kind = _KINDS.get(of.name) if type(of) is Global else None
    begin: Any = 0
    if more and more[0] is not None:
        _, begin, count = more[0] if type(more[0]) is tuple and len(more[0]) == 3 else (None, None, None)
    if kind is None or type(key) is not str or not are_counts(begin, count):
        raise RefusedError("a storage is malformed")
    return Storage(key, kind, begin * _SIZES[kind], count * _SIZES[kind])


def _called(function: Any, args: Any) -> Any:
    """What a function of the known ones would give."""
    if type(function) is not Global or type(args) is not tuple:
        raise RefusedError("it calls what is no function")
    name = function.name
    short = name.rpartition(".")[2]
    if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes, of which nothing is needed
        if len(args) != 4 or type(args[0]) is not Global or args[0].name not in _REBUILD:
            raise RefusedError("a tensor of a class of its own is malformed")
        function, _, args, state = args
        return _part(state) or _called(function, args)
    if name in _RECORDS:
        return Record(name.rpartition(".")[2], args, {})
    if name.startswith(_BESIDE):
        return Inert(short)
    if name == "torch.Size":
        if len(args) != 1 or type(args[0]) not in (tuple, list) or not are_counts(*args[0]):
            raise RefusedError("a shape is malformed")
        return tuple(args[0])
    if name == "collections.defaultdict":
        return {}
    if name == "collections.OrderedDict":
        made: dict[str, Any] = {}
        pairs = args[0] if args else []
        if type(pairs) is not list or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise RefusedError("an OrderedDict is malformed")
        _set(made, [value for pair in pairs for value in pair])
        return made
    if name == "torch.serialization._get_layout" and len(args) == 1 and type(args[0]) is str:
        return Inert(args[0])
    if name in _INERT:
        return Inert(short)
    if name not in _REBUILD:
        raise RefusedError(f"it calls {name}, which torch.save never does")
    if short in _OTHER_TENSORS:
        return Stored(_OTHER_TENSORS[short])
    if short == "_rebuild_sparse_tensor":
        layout = args[0] if args and type(args[0]) is Inert else Inert("sparse")
        return Stored(layout.type.removeprefix("torch."))
    if short in _WRAPPED:
        if not args or type(args[0]) is not Stored:
            raise RefusedError("a parameter is no tensor")
        return args[0]
    return _strided(short, args)


def _part(state: Any) -> Stored | None:
    """Of a tensor that is cut among processes (DTensor), the part that this file has; None of any other."""
    fields = {} if state is None else _fields(state)
    if type(fields.get("_spec")) is not Record:
        return None
    local, spec = fields.get("_local_tensor"), fields["_spec"].fields
    about, places = spec.get("tensor_meta"), spec.get("placements")
    if type(local) is not Stored or type(about) is not Record or not about.args or type(places) is not tuple:
        raise RefusedError("a tensor that is cut among processes is malformed")
    shape = about.args[0]
    if type(shape) is not tuple or len(shape) != len(local.shape) or not are_counts(*shape):
        raise RefusedError("a tensor that is cut among processes has a malformed shape")
    axes = [place.fields.get("dim") for place in places if type(place) is Record and place.type == "Shard"]
    if (
        len(axes) > 1
        or any(type(place) is not Record for place in places)
        or not all(type(axis) is int and 0 <= axis < len(shape) for axis in axes)
    ):
        return Stored("cut among processes in more than one way")
    return local._replace(part=Part(shape, axes[0] if axes else None))


def _strided(function: str, args: tuple[Any, ...]) -> Stored:
    """``(storage, offset, shape, strides, ...)``, behind them a type with v3, and whether its values are negated."""
    if len(args) < 4 or type(args[0]) is not Storage or not all(type(axes) is tuple for axes in args[2:4]):
        raise RefusedError("a tensor is malformed")
    storage, offset, shape, strides = args[:4]
    kind = storage.kind
    if function == "_rebuild_tensor_v3":
        if len(args) < 7 or type(args[6]) is not Global or args[6].name not in _KINDS:
            raise RefusedError("a tensor is of no known type")
        kind = _KINDS[args[6].name]
    if len(shape) != len(strides) or len(shape) > MOST_AXES or not are_counts(offset, *shape, *strides):
        raise RefusedError("a tensor has a malformed shape")
    flags = args[7 if function == "_rebuild_tensor_v3" else 6 :]
    about = flags[0] if flags and type(flags[0]) is dict and function != "_rebuild_qtensor" else {}
    if about.get("conj"):
        return Stored("conjugated")
    return Stored(kind, shape, storage, offset, strides, about.get("neg") is True)


def are_counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def kind_of(value: Any) -> str:
    """The type of a value, as it was saved."""
    return "Tensor" if type(value) is Stored else value.type if type(value) is Inert else type(value).__name__
