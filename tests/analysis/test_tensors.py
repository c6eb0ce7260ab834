"""The safetensors reader against the safetensors library's writer, and against damaged files."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save, save_file
from safetensors.torch import save_file as save_torch

from msplora_analysis import AnalysisError
from msplora_analysis.files.opening import open_tensors

IN_A_FOLDER = settings(suppress_health_check=list(HealthCheck), deadline=None)


def read_all(path):
    with open_tensors(path) as file:
        return {name: np.array(file.read(name)) for name in file.shapes}


def read_or_refuse(path) -> None:
    """Any exception but an AnalysisError of one line fails the test."""
    try:
        read_all(path)
    except AnalysisError as error:
        message = str(error)
        if "\n" in message or str(path) not in message:
            raise


def error(path) -> str:
    with pytest.raises(AnalysisError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


arrays = hnp.arrays(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements={"allow_nan": True},
)


@IN_A_FOLDER
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), arrays))
def test_round_trip(tmp_path, tensors):
    path = tmp_path / "t.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except Exception:  # a name that the library itself refuses
        return
    read = read_all(path)
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_float_type_is_exact(tmp_path, suffix):
    values = torch.randn(3, 7)
    tensors = {str(kind): values.to(kind) for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    path = tmp_path / f"t.{suffix}"
    save_torch(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    for name, array in read_all(path).items():
        np.testing.assert_array_equal(array, tensors[name].double().numpy())


def test_every_bfloat16_is_widened_exactly(tmp_path):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    save_torch({"x": every}, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(read_all(tmp_path / "t.safetensors")["x"], every.float().numpy())


def test_what_was_read_stays(tmp_path):
    save_file({"a": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}, tmp_path / "t.safetensors")
    with open_tensors(tmp_path / "t.safetensors") as file:
        first = file.read("a")
        file.prefetch(["a", "b"])
        a, b = file.read("a"), file.read("b")
    for kept, value in ((first, 1), (a, 1), (b, 0)):
        np.testing.assert_array_equal(kept, np.full(4, value))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_single_whole_number_is_exact(tmp_path, suffix):
    tensors = {"alpha": torch.tensor(2**60 + 1), "rank": torch.tensor([-8], dtype=torch.int32)}
    path = tmp_path / f"t.{suffix}"
    save_torch(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    for name, array in read_all(path).items():
        np.testing.assert_array_equal(array, tensors[name].numpy())


def test_types_without_a_float_value_are_listed_but_not_read(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"ids": np.arange(3), "x": np.ones(2)}, path)
    with open_tensors(path) as file:
        assert file.shapes == {"ids": (3,), "x": (2,)}
        with pytest.raises(AnalysisError, match="tensor ids is of type I64; expected one of F64, F32, F16, BF16, F8"):
            file.read("ids")


BYTES = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((3, 1))}, metadata={"k": "v"})


@IN_A_FOLDER
@given(data=st.data())
def test_corruption_raises_nothing_but_analysis_error(tmp_path, data):
    damaged = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        # The header is where damage can do harm.
        damaged[data.draw(st.integers(0, len(damaged) - 25))] = data.draw(st.integers(0, 255))
    path = tmp_path / "t.safetensors"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    read_or_refuse(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "X", "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4)
    ),
)


@IN_A_FOLDER
@given(header=json_values | st.dictionaries(st.text(max_size=3), json_values))
def test_any_header_raises_nothing_but_analysis_error(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    read_or_refuse(tmp_path / "t.safetensors")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": entry()}, 7, "it has {size} bytes where its header describes {more}"),
        ({"a": entry()}, 9, "it has {size} bytes where its header describes {less}"),
        ({"a": entry(dtype="F31")}, 8, "tensor a is of unknown type 'F31'"),
        ({"a": entry(shape=(3,))}, 8, "tensor a of type F32 and shape [3] cannot take 8 bytes"),
        ({"a": entry(shape=(-2,))}, 8, "tensor a has shape [-2] and offsets [0, 8]"),
        ({"a": entry(shape=(True,))}, 8, "tensor a has shape [True] and offsets [0, 8]"),
        ({"a": entry(offsets=(8, 0))}, 8, "tensor a of type F32 and shape [2] cannot take -8 bytes"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "tensor b starts at byte 4, not 8"),
        ({"a": entry(), "b": entry(offsets=(9, 17))}, 17, "tensor b starts at byte 9, not 8"),
        ({"a": {"dtype": "F32"}}, 8, "the header entry of tensor a is malformed"),
        ({"a": None}, 8, "the header entry of tensor a is malformed"),
        ([], 0, "its header is not a JSON object"),
    ],
)
def test_wrong_headers_are_told(tmp_path, header, data, what):
    text = json.dumps(header).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    size = 8 + len(text) + data
    what = what.format(size=size, more=size + 1, less=size - 1)
    assert error(path) == f"{path}: not a complete safetensors file: {what}; save or copy it again"


def test_a_name_twice_is_an_error(tmp_path):
    text = json.dumps({"a": entry(), "b": entry(offsets=(8, 16))}).replace('"b"', '"a"').encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert "its header is not valid JSON: a name occurs twice" in error(path)


@pytest.mark.parametrize("size", [0, 7, 8, 40, len(BYTES) - 1])
def test_every_truncation_is_an_error(tmp_path, size):
    path = tmp_path / "t.safetensors"
    path.write_bytes(BYTES[:size])
    assert error(path).startswith(f"{path}: not a complete safetensors file: ")


def test_absurd_header_length_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "its header claims 9223372036854775808 bytes of a file of 10" in error(path)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "t.safetensors").mkdir()
    assert error(tmp_path / "t.safetensors") == f"{tmp_path}/t.safetensors: cannot be opened: Is a directory"


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_bin_that_is_not_a_dictionary_of_tensors(tmp_path, content):
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    assert error(path).startswith(f"{path}: ")


def test_bin_never_runs_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "t.bin")
    assert error(tmp_path / "t.bin").startswith(f"{tmp_path}/t.bin: not a file of PyTorch's tensors: ")
    assert not (tmp_path / "ran").exists()


def test_old_bin_layout_is_read(tmp_path):
    torch.save({"x": torch.ones(2, 3)}, tmp_path / "t.bin", _use_new_zipfile_serialization=False)
    assert read_all(tmp_path / "t.bin")["x"].shape == (2, 3)


def test_bin_of_integers(tmp_path):
    torch.save({"x": torch.ones(2, dtype=torch.int32)}, tmp_path / "t.bin")
    assert error(tmp_path / "t.bin") == (
        f"{tmp_path}/t.bin: tensor x is of type int32; expected one of float64, float32, "
        "float16, bfloat16, float8_e4m3fn, float8_e5m2"
    )
