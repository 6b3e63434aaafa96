"""Programs that were compiled ahead: nothing compiles where all agrees, and what differs is said."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys

import fsspec
import jax
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.compiled import open_folder
from jaxinfer.engine.load import local_programs
from jaxinfer.plan.ship import ship
from tests.devices import simulated

OPTIONS = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, presence_penalty=0.1)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]

# Counts what JAX says that it compiles, not only what the engine says.
SCRIPT = """
import json, sys
import jax
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
from jaxinfer import LLM, SamplingParams
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, presence_penalty=0.1)
with LLM(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    outputs = llm.generate([[1, 2, 3], [4, 5, 6, 7]], params, use_tqdm=False)
    print(json.dumps({
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "compilations": llm.engine.runner.compilations,
        "compiled": sum("backend_compile" in event for event in events),
        "traced": sum("trace" in event for event in events),
        "flax": "flax" in sys.modules,
        "max_model_len": llm.sizes.max_model_len,
        "pages": llm.sizes.num_pages,
    }))
"""


def elsewhere(folder, devices=1, **options):
    """What a process of its own says, which keeps no compiled programs."""
    flags = {"XLA_FLAGS": simulated(devices), "JAXINFER_CACHE_DIR": "off"}
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps({n: str(v) for n, v in options.items()})]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def tokens(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def model(checkpoints):
    return checkpoints("llama").folder


@pytest.fixture(scope="module")
def expected(model):
    with LLM(model, **OPTIONS) as llm:
        return tokens(llm)


def config_of(model):
    return json.loads((model / "config.json").read_text())


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "programs"
    ship(*local_programs(config_of(model), OPTIONS), str(folder), lambda: None)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "programs")


def change(folder, path, value):
    """Sets a field of the manifest: "environment.jax"."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    *outer, name = path.split(".")
    section = manifest
    for key in outer:
        section = section[key]
    section[name] = value
    file.write_text(json.dumps(manifest))


def test_another_process_compiles_nothing(model, expected, original):
    result, stderr = elsewhere(model, compiled=original)
    assert result["tokens"] == expected
    assert (result["compilations"], result["compiled"]) == (0, 0)
    assert result["max_model_len"] == 64  # as it was compiled for, without being asked
    assert result["pages"] == 2 * 64 // 8 + 1
    assert stderr == ""
    result, _ = elsewhere(model)
    assert result["compiled"] >= 3  # the count counts


def test_every_program_is_there(model, original):
    with LLM(model, compiled=original, warmup=True) as llm:
        assert llm.engine.runner.compilations == 0
        assert len(list(original.glob("*.xla"))) == len(llm.engine.runner.programs.keys())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "data=2"])
def test_on_a_mesh(model, expected, tmp_path, mesh):
    """Two of this process's eight devices; elsewhere, two of two, and one, which is not enough."""
    folder = tmp_path / "two"
    ship(*local_programs(config_of(model), OPTIONS | {"mesh": mesh}), str(folder), lambda: None)
    result, stderr = elsewhere(model, devices=2, compiled=folder)
    assert (result["tokens"], result["compiled"], stderr) == (expected, 0, "")
    result, stderr = elsewhere(model, devices=1, compiled=folder)
    assert result["tokens"] == expected
    assert "not used: compiled for 2 devices, and there are 1" in stderr


@pytest.mark.parametrize(
    ("path", "value", "fact"),
    [
        ("environment.jax", "0.9.0", f"compiled for jax 0.9.0, and this is {jax.__version__}"),
        ("environment.jaxlib", "0.9.0", "compiled for jaxlib 0.9.0, and this is "),
        ("environment.jaxinfer", "0.1.0 (0123456789ab)", "compiled for jaxinfer 0.1.0 (0123456789ab), and this is 0.1"),
        ("environment.runtime", "other", "compiled for runtime other, and this is cpu"),
        ("environment.device", "TPU v5 lite", "compiled for 1 devices of TPU v5 lite, and this is cpu"),
        ("environment.devices", ["device 3 of process 0"], "compiled for device 3 of process 0, and this is device 0"),
        ("environment.devices", ["x"] * 9, "compiled for 9 devices, and there are 8"),
        ("environment.features", ["x86_64", "avx1024"], "compiled for a CPU with "),
        ("environment.settings.enable_x64", True, "setting enable_x64 was True and is False"),
        ("environment.settings.XLA_FLAGS", ["--fast"], "setting XLA_FLAGS was ['--fast'] and is ['--xla_b"),
        ("model.ropes", [], "the model's ropes was [] and is "),
        ("model.hidden_size", 64, "the model's hidden_size was 64 and is 32"),
        ("model.class", "GPT2Config", "the model's class was 'GPT2Config' and is 'DecoderConfig'"),
        ("sizes.bytes", 10**15, "their KV cache of 1,000,000,000,000,000 bytes does not fit in the "),
        ("sizes.bytes", 1, "their KV cache is said to have 1 bytes, and has "),
        ("attention", ["a Triton kernel"], "what attends was ['a Triton kernel'] and is ['"),
        ("options.dtype", "float8", "dtype is 'float8': it must be one of"),
        ("options", {}, "manifest.json is damaged"),
        ("environment", [], "manifest.json is damaged"),
        ("sizes.num_pages", "many", "manifest.json is damaged"),
        ("programs.zeros_1_1", {}, "manifest.json is damaged"),
        ("programs", [], "manifest.json is damaged"),
        ("format", 2, "manifest.json is not one of this version of jaxinfer"),
    ],
)
def test_what_differs_is_said(model, expected, folder, caplog, path, value, fact):
    change(folder, path, value)
    messages = []
    with LLM(model, compiled=folder, on_progress=messages.append) as llm:
        assert llm.engine.runner.compilations > 0
        assert tokens(llm) == expected
    assert f"compiled programs in {folder}: not used: " in caplog.text
    assert fact in caplog.text
    assert any(fact in text for text in messages)


HOSTILE = (0, -1, 10**9, 10**30, 1.5, True, None, "8", [], {}, math.nan, math.inf)


@pytest.mark.parametrize("path", ["sizes.num_pages", "sizes.page_size", "sizes.max_model_len", "options.page_size"])
def test_sizes_that_can_not_be(model, folder, path):
    """They are looked at before anything is made of them."""
    for value in HOSTILE:
        change(folder, path, value)
        assert "page_size is" in (reason := refused(model, folder)) or "manifest.json " in reason


def test_how_many_snapshots_can_not_be(model, folder):
    for value in HOSTILE[1:]:  # none is right, as the model has no states
        change(folder, "sizes.snapshots", value)
        assert "manifest.json " in refused(model, folder)


def test_options_and_devices_that_can_not_be(model, folder):
    whole = (folder / "manifest.json").read_bytes()
    for value in HOSTILE:
        for path in ("environment.devices", "options.max_num_seqs", "options.seed", "programs.forward_32.bytes"):
            if path != "programs.forward_32.bytes" or type(value) is not int or value < 0:
                change(folder, path, value)
                refused(model, folder)
                (folder / "manifest.json").write_bytes(whole)
    change(folder, "environment.runtime", "x\n" * 10**6)
    assert len(refused(model, folder)) < 3000
    (folder / "manifest.json").write_bytes(b"[" * 10**6)
    refused(model, folder)


def refused(model, folder):
    messages = []
    assert open_folder(folder, config_of(model), jax.local_devices(), {}, messages.append) is None
    (text,) = messages
    assert text.startswith("not used: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("content", ["", '{"format": 1, "environment": {"jaxin', "[]", "{}"])
def test_a_damaged_manifest(model, expected, folder, caplog, content):
    (folder / "manifest.json").write_text(content)
    with LLM(model, compiled=folder) as llm:
        assert tokens(llm) == expected
    assert "not used: manifest.json is" in caplog.text


@pytest.mark.parametrize(
    ("option", "fact"),
    [
        ({"max_model_len": 128}, "option max_model_len was 64 and is 128"),
        ({"max_num_seqs": 1}, "option max_num_seqs was 2 and is 1"),
        ({"page_size": 16}, "option page_size was 8 and is 16"),
        ({"dtype": "bfloat16"}, "option dtype was 'float32' and is 'bfloat16'"),
        ({"mesh": "tensor=2"}, "option mesh was 'tensor=1' and is 'tensor=2'"),
        ({"kv_cache_memory": 9000}, "their KV cache of "),
    ],
)
def test_options_that_disagree_are_honoured(model, folder, caplog, option, fact):
    with LLM(model, compiled=folder, **option) as llm:
        assert llm.engine.runner.compilations > 0
        for name in ("max_model_len", "page_size"):
            assert getattr(llm.sizes, name) == option.get(name, getattr(llm.sizes, name))
    assert fact in caplog.text


def test_options_that_agree(model, expected, folder, caplog):
    with LLM(model, compiled=folder, **OPTIONS, mesh=" tensor = 1", dtype="auto", kv_cache_memory=10**8) as llm:
        assert tokens(llm) == expected
        assert llm.engine.runner.compilations == 0
    assert caplog.text == ""


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (flip, "its digest is not the manifest's"),
        (lambda file: file.unlink(), "its file is not there"),
        (lambda file: file.write_bytes(b""), "it has 0 bytes instead of "),
        (lambda file: change(file.parent, "programs.forward_32.signature", "x"), "its arguments are not those"),
        (lambda file: file.write_bytes(b"cos\nsystem\n"), "it has 11 bytes instead of "),
    ],
)
def test_one_program_that_is_not_right_is_compiled(model, expected, folder, caplog, damage, fact):
    damage(folder / "forward_32.xla")
    with LLM(model, compiled=folder) as llm:
        assert tokens(llm) == expected
        assert llm.engine.runner.compilations == 1
    assert f"compiled programs in {folder}: program forward_32: {fact}" in caplog.text


def test_what_jax_refuses_is_compiled(model, expected, folder, caplog):
    """A digest that agrees, of what is no program any more."""
    change(folder, "programs.forward_32.bytes", len(b"nothing"))
    change(folder, "programs.forward_32.sha256", hashlib.sha256(b"nothing").hexdigest())
    (folder / "forward_32.xla").write_bytes(b"nothing")
    with LLM(model, compiled=folder) as llm:
        assert tokens(llm) == expected
        assert llm.engine.runner.compilations == 1
    assert "program forward_32: JAX can't read it" in caplog.text


@pytest.mark.parametrize("name", ["nothing", "model.safetensors", "."])
def test_what_is_no_such_folder(model, name):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json: it is not a folder that jaxinfer compile has"):
        LLM(model, compiled=model / name)


def test_an_unknown_protocol(model):
    with pytest.raises(ValueError, match="compiled abc://x/y: "):
        LLM(model, compiled="abc://x/y")


def test_an_object_store(model, expected, original):
    fs = fsspec.filesystem("memory")
    fs.put(str(original), "/bucket/programs", recursive=True)
    with LLM(model, compiled="memory://bucket/programs") as llm:
        assert tokens(llm) == expected
        assert llm.engine.runner.compilations == 0
