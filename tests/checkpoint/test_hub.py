"""The hub, as a server on this machine that answers like it, and as caches that were filled before."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

from jaxinfer.checkpoint import hub

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "source.spm": b"pieces",
    "spiece.model": b"pieces",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "modeling_mine.py": b"code",
    "README.md": b"text",
    "modules.json": b'[{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "1_Dense"}]',
    "1_Dense/config.json": b"{}",
    "1_Dense/model.safetensors": b"weights",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"second copy",
    "consolidated.safetensors": b"third copy",
    "chat_templates/tool_use.jinja": b"{{ tools }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "more_chat_templates/x.jinja": b"of something else",
}
TEMPLATES = {"chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"}
WANTED = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"} | TEMPLATES
WANTED |= {"source.spm", "spiece.model"}
MODULE = {"1_Dense/config.json", "1_Dense/model.safetensors"}
WANTED |= {"modules.json"} | MODULE


class Hub(BaseHTTPRequestHandler):
    """The few answers that huggingface_hub asks for. `asked` has the paths and the tokens."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        path = self.path.split("?")[0]
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repository == "me/secret":
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repository == "me/gated" and ("/tree/" in path or "/resolve/" in path):
            return self.answer(403, X_Error_Code="GatedRepo")
        if repository == "me/broken":
            return self.answer(500)
        if "/revision/nowhere" in path:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(FILES[name]), "oid": f"{i:040}"}
                for i, name in enumerate(FILES)
            ]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if "/resolve/" in path:
            name = path.split(f"/resolve/{SHA}/")[1]
            return self.answer(200, FILES[name], ETag=f'"{list(FILES).index(name):040}"', X_Repo_Commit=SHA)
        return self.answer(
            200,
            json.dumps({"id": repository, "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]}).encode(),
            Content_Type="application/json",
        )

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no login, no proxy, and nobody at the hub's address."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        huggingface_hub.close_session()
        yield tmp_path / "cache"
        huggingface_hub.close_session()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str | None]]]:
    asked: list[tuple[str, str | None]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Hub,), {"asked": asked})) as http:
        endpoint = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield asked
        huggingface_hub.close_session()
        http.shutdown()


def fill(cache: Path, name: str, revision: str = "main", sha: str = SHA) -> Path:
    """A model in the cache as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / sha
    for directory in [folder / "blobs", folder / "refs", snapshot]:
        directory.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(sha)
    (folder / "blobs" / "b10b").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/b10b")
    return snapshot


def refused(kind: type[Exception], message: str, *args: object, **kwargs: object) -> None:
    start = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        hub.resolve(*args, **kwargs)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


def test_a_tokenizer_comes_without_weights(server: list[tuple[str, str | None]]) -> None:
    """And a model that is asked for afterwards comes with them."""

    def files(**options: object) -> set[str]:
        folder = hub.resolve("me/model", **options)  # type: ignore[arg-type]
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files(weights=False) == WANTED - {"model.safetensors"} - MODULE
    assert files() == WANTED


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("models/tiny") == Path("models/tiny")
    assert hub.resolve("models") == Path("models")
    assert hub.resolve("~/models") == tmp_path / "models"
    refused(ValueError, "revision 'v1': models is a local folder", "models", revision="v1")
    refused(NotADirectoryError, "file: not a folder", "file")
    refused(ValueError, "empty", "")
    refused(FileNotFoundError, "no such folder .* as the folder models exists", "models/tony")
    for path in ["/no/such", "./x", "../x", "~/x", "~nobody-of-this-name/x", "a/b/c", "models/tony/", Path("x/y")]:
        refused(FileNotFoundError, "no such folder", path)


@pytest.mark.parametrize("name", ["a b", "a--b", "me/mo:del", "-x/y", "x" * 5000, "a\0b", "me/a\nb"])
def test_what_is_neither(name: str) -> None:
    refused(ValueError, "neither a folder nor a hub id", name)


def test_a_url_that_has_lost_a_slash() -> None:
    refused(ValueError, "lost a slash; give it as text, http://", "http:/x")


def test_no_network() -> None:
    refused(ConnectionError, "me/tiny: no such folder, not in the hub's cache, .* can't be reached", "me/tiny")
    refused(ConnectionError, r"gpt2 \(revision v1\): no such folder", "gpt2", revision="v1")


def test_a_network_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        refused(ConnectionError, "can't be reached", "me/tiny")


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    refused(ConnectionError, r"can't be reached \(no answer in 0.3 s\)", "me/tiny")


def test_no_network_but_cached(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = fill(cache, "me/tiny")
    with caplog.at_level(logging.WARNING):
        assert hub.resolve("me/tiny") == snapshot
    assert "me/tiny: using the cached copy" in caplog.text
    assert (snapshot / "config.json").read_text() == "{}"
    refused(ConnectionError, "not in the hub's cache", "me/tiny", revision="v1")


def test_offline(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    main, branch = fill(cache, "me/tiny"), fill(cache, "me/tiny", "branch", "f" * 40)
    assert hub.resolve("me/tiny") == main
    assert hub.resolve("me/tiny", revision="branch") == branch
    assert hub.resolve("me/tiny", revision="f" * 40) == branch
    elsewhere = fill(cache.with_name("elsewhere"), "me/third")
    assert hub.resolve("me/third", cache=cache.with_name("elsewhere")) == elsewhere
    refused(ConnectionError, "not in the hub's cache", "me/third")
    assert caplog.text == ""
    refused(ConnectionError, "not in the hub's cache, and offline mode is on; unset HF_HUB_OFFLINE", "me/other")


def test_download(cache: Path, server: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve("me/tiny", token="hf_mine")
    assert folder == cache / "models--me--tiny" / "snapshots" / SHA
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert {token for _, token in server} == {"Bearer hf_mine"}
    assert not [path for path, _ in server if ".bin" in path or ".py" in path]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("me/tiny") == folder
    (folder / "model.safetensors").unlink()
    if hasattr(huggingface_hub.errors, "IncompleteSnapshotError"):  # older versions don't look
        refused(ConnectionError, "only a part is in the hub's cache.*model.safetensors", "me/tiny")


@pytest.mark.parametrize("others", [[], ["consolidated.safetensors"], ["adapter_model.safetensors"]])
def test_pickled_weights_where_there_are_no_others(server, monkeypatch: pytest.MonkeyPatch, others: list[str]) -> None:
    names = ["config.json", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "chat_templates/tool_use.jinja"]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "sub/pytorch_model.bin"]
    monkeypatch.setattr(f"{__name__}.FILES", dict.fromkeys([*names, *shards, *others], b"{}"))
    folder = hub.resolve("me/old")
    got = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.json", "pytorch_model.bin", "chat_templates/tool_use.jinja", *shards[:2]}
    assert got == wanted | {name for name in others if name.startswith("adapter")}
    assert hub.resolve("me/old", weights=False) == folder


def test_revision(server: list[tuple[str, str | None]]) -> None:
    assert hub.resolve("me/tiny", revision="v1").name == SHA
    assert "/api/models/me/tiny/revision/v1" in {path.split("?")[0] for path, _ in server}
    refused(ValueError, "me/tiny: no revision 'nowhere' on the hub", "me/tiny", revision="nowhere")


@pytest.mark.usefixtures("server")
def test_what_the_hub_refuses(cache: Path) -> None:
    refused(FileNotFoundError, "me/secret: no such folder, and no such model on the hub; .*log in", "me/secret")
    refused(PermissionError, "me/gated: access is restricted; ask for it on https://", "me/gated")
    refused(OSError, "me/broken: the hub answered with an error: .*500", "me/broken")
    refused(OSError, "me/tiny: the download failed: .*token", "me/tiny", token=True)
    snapshot = fill(cache, "me/broken")
    assert hub.resolve("me/broken") == snapshot


@pytest.mark.usefixtures("server")
def test_a_download_that_breaks_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the cache should be")
    refused(OSError, "me/tiny: the download failed: ", "me/tiny")
