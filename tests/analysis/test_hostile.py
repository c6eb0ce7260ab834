"""Files that are broken or made to do harm: one clear line in bounded time and memory; nothing is run or written."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import lora_config, lora_tensors, write_adapter
from fuzz import KINDS, fuzz

from msplora_analysis import AnalysisError, load_tables
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.cli import app
from msplora_analysis.errors import printable
from msplora_analysis.files.addresses import read_json
from msplora_analysis.files.opening import open_tensors

torch.set_num_threads(1)
NO_TENSORS = "not a file of PyTorch's tensors"
NAME = "base_model.model.layer.0.query.lora_A.weight"


def error(call, *args) -> str:
    with pytest.raises(AnalysisError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


def load_error(path: Path) -> str:
    message = error(load_tables, path)
    assert str(path) in message
    return message


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as file:
        return {name: np.array(file.read(name)) for name in file.shapes}


def write_header(path: Path, header: bytes, data: int = 0) -> Path:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + data)
    return path


@contextmanager
def at_most(seconds: float, mebibytes: int):
    """CPU time, which other programs do not stretch, and memory beyond what the tests took so far."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes * 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutations_of_every_kind(tmp_path, kind):
    outcomes = fuzz(12, tmp_path, seed=1, kinds=[kind])
    assert {outcome for _, _, outcome in outcomes} <= {"done", "error"}
    assert outcomes.total() == 12


# --- safetensors ---


def test_gigabytes_of_header_in_a_sparse_file(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**32)
    with at_most(5, 64):
        assert error(open_tensors, path) == f"{path}: its header has {2**31} bytes; expected at most {2**25}"


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"0,", b'"a",'])
def test_header_of_many_small_values_takes_bounded_memory(tmp_path, piece):
    header = b'{"a":[' + piece * (2**22 // len(piece)) + b"0]}"
    with at_most(20, 200):
        assert "tensor a is malformed" in error(open_tensors, write_header(tmp_path / "x.safetensors", header))


def entry(shape, offsets=(0, 0), dtype="F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{offsets[0]},{offsets[1]}]}}'


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (f'{{"a":{entry([0, 2**62])}}}', "tensor a has shape [0, 4611686018427387904], which is too large"),
        (f'{{"a":{entry([0] * 65)}}}', "which is too large"),
        (f'{{"a":{entry([10**30])}}}', "tensor a has shape [10000"),
        (f'{{"a":{entry([1.0])}}}', "tensor a has shape [1.0] and offsets [0, 0]"),
        (f'{{"a":{entry("{}")}}}', "tensor a has shape {} and offsets [0, 0]"),
        (f'{{"a":{entry([1], ("0", "true"))}}}', "tensor a has shape [1] and offsets [0, True]"),
        (f'{{"a":{entry([1], (0, "9" * 5000))}}}', "its header is not valid JSON: Exceeds the limit"),
        (f'{{"a":{entry("[" * 10000 + "]" * 10000)}}}', "its header is not valid JSON: maximum recursion depth"),
        (f'{{"\\ud800":{entry([0])}}}', "the name of tensor \\ud800 is not valid Unicode"),
        (f'{{"a":{entry([0])},"a":{entry([0])}}}', "its header is not valid JSON: a name occurs twice"),
        ("NaN", "its header is not a JSON object"),
        ('{"a\n":0}', "its header is not valid JSON"),
        ('{"a\\u001b[31m\\n":0}', "the header entry of tensor a\\x1b[31m\\n is malformed"),
        ('{"__metadata__":{"a":1}}', "its __metadata__ is not an object of strings"),
    ],
)
def test_headers(tmp_path, header, what):
    path = write_header(tmp_path / "x.safetensors", header.encode())
    message = error(open_tensors, path)
    assert message.startswith(f"{path}: not a complete safetensors file: ")
    assert what in message


def test_header_that_is_not_utf8(tmp_path):
    path = write_header(tmp_path / "x.safetensors", b'{"\xff":0}')
    assert "its header is not valid JSON: 'utf-8' codec can't decode" in error(open_tensors, path)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (2, 6, 1, 1, 1), (2,), ()])
def test_factors_of_odd_shapes(tmp_path, shape):
    odd = {**lora_tensors("layer.0.query"), NAME: np.ones(shape, np.float32)}
    folder = write_adapter(tmp_path / "a", odd)
    if len(shape) == 5:  # further axes belong to the input
        assert load_tables(folder).metrics["cols"].tolist() == [6]
    else:
        assert NAME in load_error(folder)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\nb", "a\0b", "\x1b[31mred\x1b[0m", "[bold]a[/bold][/x]", "\u202egpj"]
)
def test_names_are_names_and_nothing_else(tmp_path, name, capfd):
    write_adapter(tmp_path / "runs" / "a", lora_tensors(f"layer.0.{name}"))
    try:
        write_adapter(tmp_path / "runs" / name.replace("/", "_").replace("\0", "_"))
    except OSError:
        pytest.skip("the file system takes no such name")
    if "\n" in name:  # no format has such a name
        assert "unknown tensors" in load_error(tmp_path / "runs" / "a")
        return
    tables = load_tables(tmp_path / "runs")
    assert printable(f"layer.0.{name}") in set(tables.metrics["name"])
    assert all(run.isprintable() for run in tables.metrics["run"])
    before = set(tmp_path.rglob("*"))
    app(["spectra", str(tmp_path / "runs"), "--out", str(tmp_path / "o")], standalone_mode=False)
    shown = "".join(capfd.readouterr())
    assert "\x1b[31m" not in shown
    assert {path for path in set(tmp_path.rglob("*")) - before if not path.is_relative_to(tmp_path / "o")} == set()


def test_printable():
    assert printable("a b é 名 \\") == "a b é 名 \\"
    assert printable("a\r\n\x1b[1m\x9b\u2028\u202e\udce9") == "a\\r\\n\\x1b[1m\\x9b\\u2028\\u202e\\udce9"
    assert len(str(AnalysisError("x" * 10**6))) < 2000


# --- adapter_config.json, trainer_state.json ---

JUNK = [None, True, -1, 0, 1.5, 10**400, float("nan"), "x", "\ud800", [], [[]], {}, {"": 1}, {"(": 1}, {"a": {}}]


@pytest.mark.parametrize("value", JUNK, ids=repr)
def test_config_of_wrong_types(tmp_path, value):
    keys = ("r", "lora_alpha", "bias", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "peft_type")
    for key in (*keys, "lora_bias", "target_modules", "layers_to_transform", "trainable_token_indices"):
        folder = write_adapter(tmp_path / key, config=lora_config(**{key: value}))
        message = None
        try:
            load_tables(folder)
        except AnalysisError as caught:
            message = str(caught)
        assert message is None or (str(folder) in message and message.isprintable())


def test_config_that_is_huge(tmp_path):
    folder = write_adapter(tmp_path / "a")
    with open(folder / "adapter_config.json", "wb") as file:
        file.truncate(2**40)
    expected = f"{folder}/adapter_config.json: it has {2**40} bytes; expected at most {2**25}"
    assert load_error(folder) == expected


def test_json_of_many_small_values_takes_bounded_memory(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[" + b"[]," * (2**22 // 3) + b"0]")
    with at_most(20, 200):
        assert "expected a JSON object, got list" in error(read_json, tmp_path / "x.json")


# --- what is no file ---


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "x.safetensors", "x.bin"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"d-{name}").symlink_to("/dev/zero")
    assert error(discover, tmp_path / name).endswith("neither a regular file nor a folder; copy its content to a file")
    assert "neither a regular file nor a folder" in error(discover, tmp_path / f"d-{name}")
    assert "it is not a regular file" in error(open_tensors, tmp_path / name)
    assert "no adapter found" in error(discover, tmp_path)


def test_config_that_is_a_pipe(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    assert "no adapter_config.json beside it" in error(discover, folder)


def test_nul_in_a_path():
    assert error(discover, "a\0b.safetensors").endswith("a\\x00b.safetensors: no such file or folder")


@pytest.mark.parametrize("denied", ["adapter_model.safetensors", "adapter_config.json", "."])
def test_permission(tmp_path, denied):
    folder = write_adapter(tmp_path / "a")
    (folder / denied).chmod(0)
    code = f"from msplora_analysis import load_tables; load_tables({str(folder)!r})"
    try:
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "AnalysisError" in done.stderr
        assert "Permission denied" in done.stderr
    finally:
        (folder / denied).chmod(0o700)


def test_links_out_of_the_folder_count_once(tmp_path):
    outside = write_adapter(tmp_path / "outside")
    run = write_adapter(tmp_path / "runs" / "a")
    for name in ("b", "c"):
        (tmp_path / "runs" / name).symlink_to(outside)
    (run / "up").symlink_to("../..")
    assert [a.run for a in discover(tmp_path / "runs")] == ["a", "a/up/outside"]


# --- .bin and .pt ---


def save(path: Path, value, **options) -> Path:
    torch.save(value, path, **options)
    return path


FACTORS = {name: torch.from_numpy(values) for name, values in lora_tensors("layer.0.query").items()}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "key", "state_dict", "config"])
def test_pickles_run_nothing(tmp_path, zipped, place):
    bomb = Bomb(tmp_path / "ran")
    value = {"value": {"x": bomb}, "key": {("a",): bomb}, "state_dict": {"state_dict": bomb}}.get(place)
    path = save(tmp_path / "x.bin", value or {**FACTORS, "config": bomb}, _use_new_zipfile_serialization=zipped)
    expected = f"{path}: {NO_TENSORS}: it asks for io.open, which is no part of a dictionary of tensors; save or copy"
    assert load_error(path).startswith(expected)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [pickle.dumps(FACTORS), pickle.dumps(10**5000), b"PK\5\6" + bytes(18), bytes(100)])
def test_other_pickles_and_zips(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    assert load_error(path).startswith(f"{path}: {NO_TENSORS}: ")


def test_bytearray_of_any_size(tmp_path):
    for zipped in (True, False):
        path = save(tmp_path / "x.bin", {"x": bytearray(1)}, _use_new_zipfile_serialization=zipped)
        assert "it asks for builtins.bytearray" in load_error(path)


def test_compressed_entries_are_refused(tmp_path):
    save(tmp_path / "y.bin", {"x": torch.zeros(2**20)})
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(tmp_path / "y.bin") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**14
    assert "is compressed, which PyTorch never does" in load_error(path)


def test_pickle_of_many_small_values(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02(" + b"]" * 2**24 + b".")
    with at_most(5, 100):
        assert "its names and shapes take 16777220 bytes; expected at most" in load_error(path)
    path.write_bytes(b"\x80\x02(" + b"]" * 2**16 + b".")
    assert NO_TENSORS in load_error(path)


def test_claims_beyond_the_file(tmp_path):
    whole = save(tmp_path / "x.bin", FACTORS).read_bytes()
    for stop in range(0, len(whole), 97):
        (tmp_path / "x.bin").write_bytes(whole[:stop])
        assert NO_TENSORS in load_error(tmp_path / "x.bin")
    huge = torch.zeros(4)
    path = save(tmp_path / "x.bin", {"x": huge})
    data = path.read_bytes()
    assert data.count(b"K\x04") >= 2
    (tmp_path / "x.bin").write_bytes(data.replace(b"K\x04", b"M\xff\xff"[:2]))
    assert str(path) in load_error(path)


def test_views_that_expand(tmp_path):
    path = save(tmp_path / "x.bin", {NAME: torch.ones(1, 1).expand(10**6, 10**6)})
    expected = f"{path}: tensor {NAME} of shape [1000000, 1000000] is an expanded view of fewer values; save it"
    assert load_error(path).startswith(expected)


def test_views_are_read_as_they_are(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    kept = {"turned": whole.T, "part": whole[1:3, ::2], "tied": whole, "negative": torch._neg_view(whole)}
    path = save(tmp_path / "x.pt", {**kept, "trained": torch.nn.Parameter(whole)})
    for name, values in tensors(path).items():
        np.testing.assert_array_equal(values, kept.get(name, whole).numpy() if name != "negative" else -whole.numpy())


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_dictionaries_in_a_dictionary(tmp_path, key):
    value = {key: OrderedDict(FACTORS), "epoch": 3, "optimizer": {"lr": 0.1}, "config": "x"}
    assert tensors(save(tmp_path / "x.pt", value)).keys() == FACTORS.keys()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"x": 1}, "expected a dictionary of named tensors; 'x' is of type int"),
        ({1: torch.ones(1)}, "expected a dictionary of named tensors; 1 is of type Tensor"),
        ({**FACTORS, "r": 2}, "expected a dictionary of named tensors; 'r' is of type int"),
        ({"model": {"a": {"x": torch.ones(1)}}}, "expected a dictionary of named tensors; 'model' is of type dict"),
        ([torch.ones(1)], "expected a dictionary of named tensors, got list"),
        (torch.ones(1), "expected a dictionary of named tensors, got Tensor"),
        ({"\ud800": torch.ones(1)}, "the name of tensor \\ud800 is not valid Unicode"),
        ({"x": torch.ones(2, 2).to_sparse()}, "tensor x is sparse_coo; expected a dense tensor"),
        ({"x": torch.ones(2, 2, device="meta")}, "tensor x is without data (meta); expected a dense tensor"),
        (
            {"x": torch.ones(2, dtype=torch.complex64)},
            "tensor x is of type complex64; expected one of",
        ),
        ({"x": torch.ones(2).to(torch.float8_e8m0fnu)}, "tensor x is of type float8_e8m0fnu; expected one of"),
    ],
)
def test_values_of_other_kinds(tmp_path, value, what):
    path = tmp_path / "x.bin"
    try:
        torch.save(value, path)
    except UnicodeEncodeError:
        pytest.skip("PyTorch does not write it")
    message = error(tensors, path)
    assert message.startswith(f"{path}: ")
    assert what in message


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_are_sparse_or_quantised(tmp_path):
    for name, value in {
        "is sparse_csr": torch.ones(2, 2).to_sparse_csr(),
        "is of type qint8": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    }.items():
        assert f"tensor x {name}; expected" in error(tensors, save(tmp_path / "x.bin", {"x": value}))


def test_tar_of_the_oldest_layout(tmp_path):
    path = tmp_path / "x.bin"
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert load_error(path).startswith(f"{path}: {NO_TENSORS}: ")


@pytest.mark.parametrize("size", range(0, 1000, 83))
def test_legacy_file_that_is_cut_off(tmp_path, size):
    path = save(tmp_path / "x.bin", FACTORS, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    assert NO_TENSORS in load_error(path)


def test_legacy_storage_that_claims_a_terabyte(tmp_path):
    path = save(tmp_path / "x.bin", {"x": torch.zeros(77777)}, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    number = pickle.dumps(77777, 2)[2:-1]
    assert data.count(number) >= 2
    path.write_bytes(data.replace(number, pickle.dumps(2**38, 2)[2:-1]))
    with at_most(20, 200):
        assert str(path) in load_error(path)


def zipped(path: Path, pickled: bytes, name: str = "x/data.pkl", data: bytes = bytes(16)) -> Path:
    """A file of PyTorch's layout around a pickle written by hand, with one storage, "0"."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, pickled)
        file.writestr("x/data/0", data)
        file.writestr("x/version", b"3\n")
    return path


STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"  # 4 float32
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def named(value: bytes) -> bytes:
    """The pickle of {"x": value}."""
    return b"\x80\x02}U\x01x" + value + b"s."


def view(offset: bytes = b"K\x00", shape: bytes = b"K\x02", stride: bytes = b"K\x01") -> bytes:
    return REBUILD + b"(" + STORAGE + offset + shape + b"\x85" + stride + b"\x85\x89}tR"


def test_the_pickles_written_here_are_read(tmp_path):
    path = zipped(tmp_path / "x.bin", named(view()), data=np.arange(4, dtype="<f4").tobytes())
    np.testing.assert_array_equal(tensors(path)["x"], torch.load(path)["x"].numpy())
    np.testing.assert_array_equal(tensors(path)["x"], [0, 1])


@pytest.mark.parametrize(
    ("pickled", "what"),
    [
        (named(view(offset=b"K\x03")), "tensor x reads beyond its data"),
        (named(view(offset=b"J\xff\xff\xff\xff")), "a tensor has a malformed shape"),
        (named(view(stride=b"M\xff\xff")), "tensor x reads beyond its data"),
        (named(view(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7f")), "a tensor has a malformed shape"),
        (named(view(shape=b"K\x05", stride=b"K\x00")), "is an expanded view of fewer values"),
        (named(view().replace(b"K\x04", b"K\x05", 1).replace(b"K\x02", b"K\x05", 1)), "reads beyond its data"),
        (named(view().replace(b"U\x010", b"U\x011")), "the data of tensor x is missing"),
        (named(b"ctorch\nTensor\nK\x02K\x06\x86R"), "it calls torch.Tensor"),
        (named(b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R"), "it calls torch.FloatStorage"),
        (named(b"ctorch\nTensor\n)\x81"), "it calls torch.Tensor"),
        (named(view() + b"}U\x05dtypeK\x01sb"), "it sets attributes"),
        (named(b"K\x01K\x02a"), "it appends to what is no list"),
        (b"\x80\x02}" + b"(" * 3 + b"K\x01\x85K\x02u.", "a key of type tuple"),
        (b"\x80\x02}\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x1f\x00K\x02s.", "a key of type int"),
        (b"\x80\x02]2.", "the operation DUP"),
        (b"\x80\x04\x95.", "damaged or cut off"),
        (b"R.", "damaged or cut off"),
        (b"h\x00.", "damaged or cut off"),
        (b"(", "damaged or cut off"),
    ],
)
def test_pickles_that_ask_for_more_than_tensors(tmp_path, pickled, what):
    message = error(open_tensors, zipped(tmp_path / "x.bin", pickled))
    assert message.startswith(str(tmp_path / "x.bin"))
    assert what in message


def test_an_entry_that_no_file_is_long_enough_for(tmp_path):
    path = zipped(tmp_path / "x.bin", named(view()))
    content = path.read_bytes()
    at = content.index(b"PK\1\2")  # in the list of entries; the place of an entry too large for 32 bits is beside it
    wide = struct.pack("<HHQ", 1, 8, 2**63 + 1)
    header = bytearray(content[at : at + 46])
    header[30:32], header[42:46] = struct.pack("<H", len(wide)), b"\xff" * 4
    end = at + 46 + header[28]
    changed = content[:at] + bytes(header) + content[at + 46 : end] + wide + content[end:]
    size = int.from_bytes(changed[-10:-6], "little") + len(wide)
    path.write_bytes(changed[:-10] + size.to_bytes(4, "little") + changed[-6:])
    assert "its list of entries is damaged" in error(open_tensors, path)


def test_keys_that_hash_for_ever(tmp_path):
    nested = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))
    with at_most(5, 100):
        assert "a key of type tuple" in error(open_tensors, zipped(tmp_path / "x.bin", b"\x80\x02}" + nested + b"Ns."))


def test_a_name_in_capitals_is_no_way_around(tmp_path):
    save(tmp_path / "y.bin", FACTORS)
    with zipfile.ZipFile(tmp_path / "y.bin") as old, zipfile.ZipFile(tmp_path / "x.bin", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename.replace("data.pkl", "DATA.PKL"), old.read(item))
    assert "it has no data.pkl" in load_error(tmp_path / "x.bin")
    path = zipped(tmp_path / "x.bin", named(view()))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("X/Data.pkl", b"")
    assert "an entry occurs twice" in error(open_tensors, path)


def test_attributes_of_tensors_and_dictionaries_are_left_alone(tmp_path):
    tensor, state = torch.ones(2, 2), OrderedDict(FACTORS)
    tensor.shape_ = tensor.numpy = "planted"
    state.get = state.values = "planted"
    for zipped in (True, False):
        path = save(tmp_path / "x.pt", {"x": tensor}, _use_new_zipfile_serialization=zipped)
        np.testing.assert_array_equal(tensors(path)["x"], np.ones((2, 2)))
        assert tensors(save(tmp_path / "x.pt", state, _use_new_zipfile_serialization=zipped)).keys() == FACTORS.keys()


def test_many_tensors_of_the_same_bytes(tmp_path):
    many = {f"x{i}": torch.zeros(1).expand(1) for i in range(10)} | dict.fromkeys(
        map(str, range(900)), torch.ones(9999)
    )
    assert "share few bytes" in error(open_tensors, save(tmp_path / "x.bin", many))


def test_json_object_may_be_anything(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"a": [{}] * 1000}))
    assert "adapter_config.json has no peft_type" in load_error(folder)
