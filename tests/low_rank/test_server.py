"""Adapters as models of a server."""

import json
import shutil

import httpx2 as httpx
import pytest

from jaxinfer import SamplingParams
from jaxinfer.server.config import ServerConfig
from jaxinfer.server.run import Background
from tests.adapters import write_adapter
from tests.refusals import line

SHORT = {"max_tokens": 4, "temperature": 0}
TEXT = "some text that is long enough"
CHAT = [{"role": "user", "content": TEXT}]
ROUTES = {
    "/v1/completions": {"prompt": TEXT, **SHORT},
    "/v1/chat/completions": {"messages": CHAT, **SHORT},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 4, "temperature": 0},
    "/v1/messages": {"messages": CHAT, **SHORT},
}


@pytest.fixture
def served(llm, folders, tmp_path):
    """A server with the folder `below` for adapters, and a client of it."""
    shutil.copytree(folders / "a", tmp_path / "below" / "team" / "new")
    config = ServerConfig(port=0, names=("tiny",), adapter_dir=str(tmp_path / "below"), drain_seconds=5)
    with Background(llm, config, False) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    for name in set(llm.list_adapters()) - {"a", "b"}:
        llm.unload_adapter(name)


def test_a_models_name_is_an_adapters(served):
    for path, body in ROUTES.items():
        answers = {}
        for model in ("a", "tiny", "b"):
            answer = served.post(path, json=body | {"model": model})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            answers[model] = json.dumps([answer.json().get(name) for name in ("choices", "output", "content")])
            answers[model] = answers[model].split('"text": ' if "chat" not in path else '"content": ')[1].split(", ")[0]
        assert len(set(answers.values())) == 3, path
        with served.stream("POST", path, json=body | {"model": "a", "stream": True}) as stream:
            assert stream.status_code == 200
            stream.read()
    wrong = served.post("/v1/completions", json=ROUTES["/v1/completions"] | {"model": "x"})
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (404, "no model 'x': here there is tiny, a, b")
    models = {model["id"]: model for model in served.get("/v1/models").json()["data"]}
    assert {name: (model["root"], model["parent"]) for name, model in models.items()} == {
        "tiny": ("tiny", None),
        "a": ("a", "tiny"),
        "b": ("b", "tiny"),
    }
    assert served.get("/v1/models/b").json() == models["b"]
    text = served.get("/metrics").text
    assert 'running_lora_adapters="",waiting_lora_adapters="",max_lora="2"} ' in text
    assert 'jaxinfer:adapter_generation_tokens_total{model_name="tiny",engine="0",adapter="a"} ' in text


def test_loading_and_unloading(served, llm, folders, tmp_path):
    base = folders / "base"

    def load(name, path, **more):
        answer = served.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})
        return answer.status_code, answer.text if answer.status_code == 200 else answer.json()["error"]["message"]

    def unload(name):
        return served.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code

    def text(model):
        answer = served.post("/v1/completions", json=ROUTES["/v1/completions"] | {"model": model})
        return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.status_code

    assert load("new", "team/new") == (200, "Success: LoRA adapter 'new' added successfully.")
    texts = [text("new"), text("a")]
    assert texts[0] == texts[1]
    assert load("new", "team/new")[0] == 400
    assert "loaded already, as 'new'" in load("other", "team/new")[1]
    shutil.rmtree(tmp_path / "below" / "team" / "new")
    write_adapter(tmp_path / "below" / "team" / "new", base, seed=11)
    assert load("new", "team/new", load_inplace=True)[0] == 200
    assert text("new") != texts[0]
    assert [unload("new"), unload("new")] == [200, 404]
    assert text("new") == 404
    write_adapter(tmp_path / "below" / "large", base, rank=40)
    write_adapter(tmp_path / "out", base)
    (tmp_path / "below" / "link").symlink_to(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "below" / "part")
    (part := tmp_path / "below" / "part" / "adapter_model.safetensors").unlink()
    part.symlink_to(tmp_path / "out" / part.name)
    for path in ("../out", str(tmp_path / "out"), "team/../../out", "link", "part", "owner\\x", "a\0b", "."):
        status, message = load("x", path)
        assert (status, "must be the name of a folder below" in message) == (400, True), path
        assert str(tmp_path) not in message.replace(repr(path)[1:-1], "")
    assert load("x", "owner/model")[0] == 404
    assert load("x", "large") == (400, "large: is of rank 40, and max_lora_rank is 8: raise that")
    assert (
        load("tiny", "team/new")[0] == load("", "team/new")[0] == load("a\n", "team/new")[0] == load("x", "")[0] == 400
    )
    assert load("x", "team/new", what=1) == (400, "'what' is not supported; leave it out")
    assert set(llm.list_adapters()) == {"a", "b"}


def test_off_by_default(llm, tmp_path):
    config = ServerConfig(port=0, names=("tiny",), drain_seconds=5)
    with Background(llm, config, False) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for route in ("load", "unload"):
            answer = client.post(f"/v1/{route}_lora_adapter", json={"lora_name": "a", "lora_path": "a"})
            assert answer.status_code == 403
            assert "--adapter-dir" in answer.json()["error"]["message"]
    assert "there is no such folder" in line(lambda: ServerConfig(adapter_dir=str(tmp_path / "none")))
    assert "'a' is the name of an adapter" in line(lambda: Background(llm, ServerConfig(port=0, names=("a",)), False))


def test_who_runs_is_counted(llm, slowly):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    slowly(llm)
    stream = llm.stream_output(TEXT, params, adapter="a")
    next(stream)
    stats = llm.stats
    assert (stats.running_adapters, stats.waiting_adapters) == ({"a": 1}, {})
    stream.close()
