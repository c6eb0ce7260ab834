"""Adapters at addresses: memory://, a web server that counts what it serves, and a mocked Hugging Face Hub."""

import http.server
import json
import pickle
import re
import shutil
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import pandas as pd
import pytest
import torch
from adapters import lora_config, lora_tensors, write_adapter
from safetensors.numpy import save_file

from msplora_analysis import AnalysisError, load_tables
from msplora_analysis.adapters.discovery import discover
from msplora_analysis.files.opening import open_tensors
from msplora_analysis.files.remote import LIMITS, Remote

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two checkpoints and a final adapter."""
    for epoch in (1, 2):
        tensors = lora_tensors("layer.0.query", "layer.1.query", seed=epoch)
        write_adapter(tmp_path / "runs" / "cola" / f"checkpoint-{epoch * 10}", tensors, epoch=epoch)
    return write_adapter(tmp_path / "runs" / "cola", epoch=2)


@pytest.fixture
def memory(run) -> str:
    fs = fsspec.filesystem("memory")
    for file in run.parent.rglob("*.*"):
        fs.pipe(f"/bucket/{file.relative_to(run.parent)}", file.read_bytes())
    yield "memory://bucket"
    fs.store.clear()


class Server(http.server.SimpleHTTPRequestHandler):
    """A static server that knows ranges, as every object store does; ``served`` counts the bytes of each file."""

    served: dict[str, int]
    ranges = True

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if "secret" in self.path:
            return self.send_error(401)
        if not path.is_file():
            return super().do_GET() if body else super().do_HEAD()
        size = path.stat().st_size
        start, stop = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.ranges:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if body:
            with open(path, "rb") as file:
                file.seek(start)
                try:
                    self.wfile.write(file.read(stop - start))
                except OSError:  # the reader has seen enough
                    return
            self.served[path.name] = self.served.get(path.name, 0) + stop - start

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Server], folder: Path):
    """The address of a server of a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def web(tmp_path):
    """A server of tmp_path: its address, and its handler."""
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Server,), {"served": {}})
    with serving(handler, tmp_path) as address:
        yield address, handler


def error(call, *args) -> str:
    with pytest.raises(AnalysisError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_tables(address: str, path: Path) -> None:
    for actual, expected in zip(load_tables(address), load_tables(path), strict=True):
        pd.testing.assert_frame_equal(actual, expected)


@pytest.mark.parametrize(
    "inside", ["", "/cola", "/cola/checkpoint-20", "/cola/checkpoint-20/adapter_model.safetensors"]
)
def test_an_address_gives_what_the_same_path_gives(memory, run, inside):
    assert_same_tables(memory + inside, f"{run.parent}{inside}")


def test_local_files_have_addresses_too(run):
    assert_same_tables(f"file://{run.parent}", run.parent)


def test_an_address_given_twice_counts_once_and_may_stand_beside_a_path(memory, run):
    assert len(discover([memory, f"{memory}/cola/checkpoint-10", memory + "/"])) == 3
    assert {a.run for a in discover([memory, run.parent])} == {"bucket/cola", "runs/cola"}


def test_adapters_at_addresses_can_be_sent_to_other_processes(memory):
    adapters = discover(memory)
    sent = pickle.loads(pickle.dumps(adapters))
    assert sent == adapters
    with open_tensors(sent[0].file) as file:
        assert len(file.shapes) == 4
    assert discover(adapters[0].file) == adapters[:1]


def test_remote_bin_is_read_through_a_copy(memory, run):
    fs = fsspec.filesystem("memory")
    tensors = {name: torch.from_numpy(values) for name, values in lora_tensors("layer.0.query").items()}
    write_adapter(run.parent / "bin", lora_tensors("layer.0.query"))
    torch.save(tensors, run.parent / "x.bin")
    fs.pipe("/bin/adapter_model.bin", (run.parent / "x.bin").read_bytes())
    fs.pipe("/bin/adapter_config.json", json.dumps(lora_config()).encode())
    assert_same_tables("memory://bin", run.parent / "bin")


def test_full_checkpoint_at_an_address(memory):
    fsspec.filesystem("memory").pipe("/bucket/full/checkpoint-20/model.safetensors.index.json", b"{}")
    found = discover(f"{memory}/full", full=True)
    assert [(a.run, a.step, a.file.name) for a in found] == [("full", 20, "model.safetensors.index.json")]


@pytest.mark.parametrize("inside", ["/runs", "/runs/cola/", "/runs/cola/checkpoint-10/adapter_model.safetensors"])
def test_web_server(web, run, tmp_path, inside):
    assert_same_tables(web[0] + inside, f"{tmp_path}{inside}")


def test_query_of_a_web_address_is_no_part_of_the_name(web, run):
    address = f"{web[0]}/runs/cola/checkpoint-10/adapter_model.safetensors?download=true"
    assert [(a.run, a.step, a.epoch) for a in discover(address)] == [("cola", 10, 1)]


@pytest.mark.parametrize("ranges", [True, False])
def test_only_what_is_read_is_fetched_and_that_once(web, tmp_path, ranges):
    address, handler = web
    handler.ranges = ranges
    factors = lora_tensors(*(f"layer.{i}.query" for i in range(40)))
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(
        {"base_model.model.classifier.weight": np.zeros((2**20, 7), np.float32), **factors},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(lora_config()))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert_same_tables(f"{address}/a/adapter_model.safetensors", folder)
    served = handler.served["adapter_model.safetensors"]
    if ranges:
        assert served <= 2 * 4 * 2**20 < size / 3  # the block of the header, that of the factors
    else:
        assert served <= 2 * size  # once to learn that there are no ranges


def test_file_that_shrinks_while_it_is_read(web, tmp_path):
    folder = write_adapter(tmp_path / "a", lora_tensors("layer.0.query", cols=2**20))
    file = folder / "adapter_model.safetensors"
    with open_tensors(discover(f"{web[0]}/a/adapter_model.safetensors")[0].file) as opened:
        file.write_bytes(file.read_bytes()[: 2**20])
        assert f"{web[0]}/a/adapter_model.safetensors: " in error(opened.read, max(opened.shapes))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("memory://nothing", "memory://nothing: not found; check the address"),
        ("memory://nothing/adapter_model.safetensors", "memory://nothing/adapter_model.safetensors: not found; check"),
        ("unheard-of://x", "unheard-of://x: Protocol not known: unheard-of; expected hf://, s3://, https:// or such"),
    ],
)
def test_addresses_of_nothing(address, expected):
    assert error(discover, address).startswith(expected)


def test_missing_package_of_a_file_system(monkeypatch):
    import fsspec.core

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    expected = "s3://bucket/x: a package that reads such addresses is missing: Install s3fs to access S3"
    assert error(discover, "s3://bucket/x") == expected


def test_folder_without_adapters_and_files_of_other_kinds(memory):
    fsspec.filesystem("memory").pipe("/empty/notes.txt", b"")
    assert error(discover, "memory://empty").startswith("memory://empty: no adapter found; looked in it and all")
    assert error(discover, "memory://empty/notes.txt").startswith("memory://empty/notes.txt: not an adapter file")


def test_config_is_missing_at_an_address(memory):
    fsspec.filesystem("memory").rm("/bucket/cola/adapter_config.json")
    expected = "memory://bucket/cola/adapter_model.safetensors: no adapter_config.json beside it; copy it there"
    assert error(discover, memory) == error(discover, f"{memory}/cola/adapter_model.safetensors") == expected


@pytest.mark.parametrize("inside", ["/none/adapter_model.safetensors", "/none", "/secret/x.safetensors", "/secret"])
def test_web_addresses_of_nothing_and_of_what_is_private(web, inside):
    assert error(discover, web[0] + inside).startswith(f"{web[0]}{inside}: ")


def test_no_network():
    pytest.importorskip("aiohttp")
    address = "http://127.0.0.1:9/adapter_model.safetensors"
    assert error(discover, address).startswith(f"{address}: not found (Cannot connect to host 127.0.0.1:9")


class HubServer(Server):
    """As much of the Hub's interface as is asked for, answered from a folder that is the repository owner/name."""

    asked: set[str]

    def translate_path(self, path: str) -> str:
        found = re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", path)
        return str(Path(self.directory) / found[2]) if found else "/nowhere"

    def answer(self, body: bool) -> None:
        root = Path(self.directory)
        url = unquote(self.path.partition("?")[0])
        if "/resolve/" in url:
            return super().answer(body)
        found = re.fullmatch(r"/api/models/owner/name(?:/revision/(.+?)|/tree/(v1|main|refs/pr/1)/?(.*))?", url)
        if not found:
            self.send_response(401)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.asked.add(found[1] or found[2] or "main")
        if found[2]:
            folder = root / found[3]
            inside = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
            answer = [self.entry(root, path) for path in inside]
        else:
            answer = {"id": "owner/name", "sha": "0" * 40, "siblings": [], "tags": []}
        return self.send_json(answer)

    def do_POST(self):
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        root = Path(self.directory)
        self.send_json([self.entry(root, root / name) for name in form["paths"] if (root / name).exists()])

    def entry(self, root: Path, path: Path) -> dict:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0"}
        return {"type": "file", "path": name, "oid": "0", "size": path.stat().st_size}

    def send_json(self, answer) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(run, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    handler = type("Handler", (HubServer,), {"served": {}, "asked": set()})
    with serving(handler, run.parent) as address:
        fs = library.HfFileSystem(endpoint=address, token=False, skip_instance_cache=True)
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **_: (fs, fs._strip_protocol(url)))
        yield handler


@pytest.mark.parametrize(("revision", "asked"), [("", "main"), ("@v1", "v1"), ("@refs/pr/1", "refs/pr/1")])
def test_repository_of_the_hub(hub, run, revision, asked):
    """The real HfFileSystem, at a server that plays the Hub."""
    adapters = discover(f"hf://owner/name{revision}/cola")
    assert [(a.run, a.step, a.epoch) for a in adapters] == [("cola", 10, 1), ("cola", 20, 2), ("cola", None, None)]
    assert str(adapters[0].file) == f"hf://owner/name{revision}/cola/checkpoint-10/adapter_model.safetensors"
    assert hub.asked == {asked}
    assert_same_tables(f"hf://owner/name{revision}", run.parent)
    assert_same_tables(f"hf://owner/name{revision}/cola/checkpoint-20/adapter_model.safetensors", run / "checkpoint-20")


def test_repository_that_is_private_or_not_there(hub):
    message = error(discover, "hf://owner/other")
    assert message.startswith("hf://owner/other: ")
    assert "private" in message


class LyingServer(Server):
    """Says nothing at /silent, drips at /drip; elsewhere pages lead to others without end, the next to another host."""

    heard: list[tuple[str, str | None]]

    def answer(self, body: bool) -> None:
        host, port = self.headers["Host"].split(":")
        self.heard.append((host, self.headers["Authorization"]))
        if "silent" in self.path:
            return self.server.stopped.wait(20)
        if "drip" in self.path:
            return self.drip(body)
        hub = self.path.startswith("/api")
        text = b'[{"type": "file", "path": "x", "oid": "0", "size": 1}]' if "/tree/" in self.path else b'{"id": "a/b"}'
        self.send_response(200)
        self.send_header("Link", f'<http://localhost:{port}/api/models/a/b/tree/main?cursor=x>; rel="next"')
        self.send_header("Content-Type", "application/json" if hub else "text/html")
        text = text if hub else b'<a href="deeper/">deeper</a><a href="other/">other</a>'
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text if body else b"")

    def drip(self, body: bool) -> None:
        """A byte now and then, of a file with ranges (/drip) or of a stream without a length (/drip/stream)."""
        stream = "stream" in self.path
        self.send_response(206 if "Range" in self.headers and not stream else 200)
        self.send_header("Content-Type", "application/octet-stream")
        if not stream:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", "4096")
        self.end_headers()
        with suppress(OSError):  # the reader has seen enough
            while body and not self.server.stopped.wait(0.1):
                self.wfile.write(b"x")


@pytest.fixture
def liar(tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "SILENCE", 0.5)
    monkeypatch.setattr(LIMITS, "SLOWEST", 1e9)
    monkeypatch.setattr(LIMITS, "REQUESTS", 20)
    handler = type("Handler", (LyingServer,), {"served": {}, "heard": []})
    stopped = threading.Event()
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "stopped", stopped, raising=False)
    with serving(handler, tmp_path) as address:
        yield address, handler.heard
        stopped.set()


def test_web_server_that_is_silent_or_never_ends(liar):
    address, heard = liar
    assert "Timeout on reading data from socket" in error(discover, f"{address}/silent/x.safetensors")
    assert "its pages lead in a circle" in error(discover, f"{address}/pages/")
    assert len(heard) < 40


def test_a_server_that_drips_is_not_waited_for(liar):
    address, _ = liar
    assert "too slow" in error(open_tensors, Remote.parse(f"{address}/drip/x.safetensors"))
    assert "too slow: " in error(open_tensors, Remote.parse(f"{address}/drip/stream.safetensors"))


def test_hub_whose_pages_never_end_gets_no_token_elsewhere(liar, monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    address, heard = liar
    fs = library.HfFileSystem(endpoint=address, token="hf_mine", skip_instance_cache=True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **_: (fs, fs._strip_protocol(url)))
    assert "its pages lead in a circle" in error(discover, "hf://a/b")
    assert {given for host, given in heard if host == "localhost"} == {None}
    assert "Bearer hf_mine" in {given for host, given in heard if host == "127.0.0.1"}
    assert "timed out" in error(discover, "hf://a/silent")
    assert "too slow: " in error(discover, "hf://a/drip")


def test_a_certificate_that_nobody_vouches_for(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("localhost", 0), http.server.SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # it, too, sees the handshake fail
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        message = error(discover, f"https://localhost:{server.server_port}/x.safetensors")
    finally:
        server.shutdown()
        server.server_close()
    assert "CERTIFICATE_VERIFY_FAILED" in message
    assert "\n" not in message
