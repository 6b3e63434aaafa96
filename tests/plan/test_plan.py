"""Slices that are not there, and `jaxinfer plan` on them."""

import json
import os
import re
import sys

import pytest
import yaml

from jaxinfer.attention.tpu_xla import XLAAttentionOnTPU
from jaxinfer.engine.dtypes import choose_dtype
from jaxinfer.plan.slices import GENERATIONS, names
from jaxinfer.plan.targets import find_target
from tests.plan.test_roofline import CONFIG

SMALL = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 128}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def test_names_count_what_google_counts():
    assert {"v5e-1", "v5e-8", "v5p-8", "v4-8", "v6e-256", "tpu7x-4"} <= set(names())
    assert GENERATIONS["v5p"].shapes[4] == "2x2x1"  # v5p-8 has 4 chips


@pytest.mark.parametrize("name", ["v5e-3", "v5e", "v9-8", "v5p-7", "8", "v5e-8-8", "", "h100-9", "h100-0", "t4-"])
def test_other_names(name):
    with pytest.raises(ValueError, match=r"is not known; there are v4-8, .*v5e-8"):
        find_target(name)


def test_without_the_compiler(cli, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert "pip install '.[tpu]'" in cli("plan", model, "--topology", "v5e-4").error()
    assert cli("plan", model, "--topology", "v5e-4", "--sweep").code == 0  # from shapes


@pytest.mark.parametrize("name", ["v5e-1", "v5e-16", "v5p-8", "v4-16", "v6e-8", "tpu7x-4", "v7x-4"])
def test_devices_that_are_not_there(name):
    pytest.importorskip("libtpu")
    hardware = find_target(name)
    assert hardware.devices[0].platform == "tpu"
    assert len(hardware.devices) == {"v5e-1": 1, "v5e-16": 16, "v5p-8": 4, "v4-16": 8}.get(name, 8)


@pytest.mark.parametrize(("name", "count"), [("h100", 1), ("h100-4", 4), ("T4-8", 8), ("v6e-4", 4), ("tpu7x-4", 8)])
def test_devices_for_their_shapes(name, count):
    hardware = find_target(name, compiles=False)
    assert (len(hardware.devices), hardware.compiles) == (count, False)


@pytest.mark.slow
def test_a_plan(cli, model):
    pytest.importorskip("libtpu")
    arguments = ["--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--json"]
    code, out, _ = cli("plan", model, "--topology", "v5e-4", *arguments)
    assert code == 0
    figures = json.loads(out)
    assert figures["tensor"] == 4
    sizes = figures["bytes"]
    parts = ("weights", "cache", "slots", "hidden_states", "padding", "temporaries", "code")
    assert sizes["total"] == sum(sizes[name] for name in parts)
    assert sizes["free"] == sizes["memory"] - sizes["total"] > 0
    assert figures["cache_tokens"] == 8 * 256  # eight sequences of the longest kind
    assert [program["program"].split(",")[0] for program in figures["programs"]] == [
        "full_decode",
        "forward",
        "full_sample",
        "score",
    ]
    for program in figures["programs"]:
        kinds = {kind: collective["bytes"] for kind, collective in program["collectives"].items()}
        if program["program"].startswith(("full_decode", "forward")):  # two reductions a layer, and the embedding's
            assert program["collectives"]["all-reduce"]["count"] >= 2 * SMALL["num_hidden_layers"] + 1
            assert kinds.pop("all-reduce") > 2**13
        assert all(size < 2**17 for size in kinds.values())  # no whole row of logits
    # What of it is predicted from shapes, and what the compiler reports.
    held = sizes["weights"] + sizes["cache"] + sizes["slots"] + sizes["hidden_states"]
    assert held == pytest.approx(max(program["arguments"] for program in figures["programs"]), rel=0.03)
    assert [estimate["rows"] for estimate in figures["decode"]] == [1, 2, 4, 8]
    assert all(
        estimate["flops"] > 0 and estimate["bytes_moved"] > 0 for estimate in [*figures["decode"], figures["prefill"]]
    )
    table = cli("plan", model / "config.json", "--topology", "v5e-1", *arguments[:-1])
    assert table.code == 0
    assert "v5e-1, tensor=1" in table.out
    assert "binds" in table.out
    assert "nothing is sent between chips" in table.out


def test_what_does_not_fit(cli, model):
    pytest.importorskip("libtpu")
    large = SMALL | {"num_hidden_layers": 48, "hidden_size": 8192, "intermediate_size": 28672, "num_key_value_heads": 8}
    (model / "config.json").write_text(json.dumps(large | {"num_attention_heads": 64}))
    code, out, err = cli("plan", model, "--topology", "v5e-4")
    assert (code, out) == (1, "")
    assert "v5e-4: needs " in err
    assert "GiB of a chip's 15.75, of which 13.39 are for weights and cache: tensor=8" in err


@pytest.fixture
def deployment(tmp_path):
    """A file with an architecture and no model anywhere."""
    file = tmp_path / "small.yaml"
    fields = {"model": "nobody/small", "topology": "v5e-4", "max_num_seqs": 8, "max_num_batched_tokens": 64}
    file.write_text(yaml.safe_dump(fields | {"architecture": SMALL}, sort_keys=False))
    return file


@pytest.mark.slow
def test_a_deployment(cli, deployment, model):
    pytest.importorskip("libtpu")
    figures = json.loads(cli("plan", deployment, "--json").out)
    assert (figures["topology"], figures["tensor"], figures["max_model_len"]) == ("v5e-4", 4, 256)
    arguments = "--config", deployment, "--topology", "v5e-1", "--max-model-len", "128", "--max-num-seqs", "4"
    figures = json.loads(cli("plan", *arguments, "--model", model, "--json").out)
    assert (figures["topology"], figures["tensor"], figures["max_model_len"]) == ("v5e-1", 1, 128)
    assert figures["decode"][-1]["rows"] == 4


@pytest.mark.slow
def test_a_cache_in_int8(cli, model):
    """As many bytes as its values and their scales, of which the compiler's arguments have no more."""
    pytest.importorskip("libtpu")
    arguments = "--topology", "v5e-1", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--json"
    plain, small = (
        json.loads(cli("plan", model, *arguments, "--kv-cache-dtype", name).out) for name in ("auto", "int8")
    )
    heads, layers = SMALL["num_key_value_heads"], SMALL["num_hidden_layers"]
    assert plain["bytes_per_token"] == layers * heads * 2 * 128 * 2
    assert small["bytes_per_token"] == layers * heads * 2 * (128 + 4)
    for figures in (plain, small):
        held = sum(figures["bytes"][name] for name in ("weights", "cache", "slots", "hidden_states"))
        assert held == pytest.approx(max(program["arguments"] for program in figures["programs"]), rel=0.03)


def test_wrong_deployments(cli, deployment, model):
    text = deployment.read_text()
    assert "both" in cli("plan", deployment, "--config", deployment).error()
    assert "both" in cli("plan", model, "--model", model, "--topology", "v5e-1").error()
    assert "no model is named" in cli("plan").error()
    assert "topology is missing" in cli("plan", model).error()
    (model / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 7}))
    assert "num_layers is 7" in cli("plan", deployment, "--model", model).error()
    deployment.write_text(text.replace("hidden_size: 256", "hidden_size: wide"))
    assert f"{deployment}:8: architecture: hidden_size is 'wide'" in cli("plan", deployment).error()
    deployment.write_text(text[: text.index("architecture")])
    assert "architecture is missing, and nobody/small is no folder" in cli("plan", deployment).error()
    deployment.write_text(text.replace("v5e-4", "v5e-5"))
    assert "'v5e-5' is not known; there are v4-8" in cli("plan", deployment).error()
    deployment.write_text(text.replace("tokens: 64", "tokens: 4"))
    assert "max_num_batched_tokens is 4" in cli("plan", deployment).error()


def test_wrong_meshes_and_models(cli, model):
    pytest.importorskip("libtpu")
    assert (
        "tensor=3 does not divide the model's 8"
        in cli("plan", model, "--topology", "v5e-8", "--mesh", "tensor=3").error()
    )
    error = cli("plan", model, "--topology", "v5e-4", "--mesh", "tensor=8").error()
    assert "it needs 8 devices and there are 4" in error
    assert "no such folder" in cli("plan", model / "nothing", "--topology", "v5e-4").error()


def test_what_the_compiler_refuses(cli, model, monkeypatch):
    """For attention in plain XLA as it is elsewhere it copies the pool."""
    monkeypatch.setattr(XLAAttentionOnTPU, "supports", lambda *_: "not now")
    pytest.importorskip("libtpu")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 2**22}
    (model / "config.json").write_text(json.dumps(SMALL | heads))
    arguments = "--topology", "v5e-1", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--attention", "xla"
    code, out, err = cli("plan", model, *arguments)
    assert (code, out) == (1, "")
    assert re.search(r"v5e-1: programs need \d+\.\d\d GiB; a chip has 15\.75, .*: lower memory_utilization", err), err


def test_gpus_are_planned_from_shapes(cli, model):
    figures = json.loads(cli("plan", model, "--topology", "l4-2", "--max-num-seqs", "8", "--json").out)
    assert (figures["compiled"], figures["programs"], figures["mesh"]) == (False, [], "tensor=2")
    sizes = figures["bytes"]
    assert sizes["memory"] == int(23_034 * 2**20 * 0.75)
    assert sizes["total"] == sizes["weights"] + sizes["cache"] + sizes["slots"] + sizes["hidden_states"]
    assert "temporaries" not in sizes
    assert "l4-2: from shapes alone" in cli("plan", model, "--topology", "l4-2").out


def test_states_of_sequences(cli, model):
    """As many bytes whatever the length, for eight of them and nobody, and 64 that others may go on from."""
    config = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 1024}
    (model / "config.json").write_text(json.dumps(config))
    figures = json.loads(cli("plan", model, "--topology", "l4", "--max-num-seqs", "8", "--json").out)
    each = 2 * 128 * (1024 + 3) * 4
    assert (figures["bytes_per_sequence"], figures["bytes_per_token"]) == (each, 0)
    assert (figures["snapshots"], figures["bytes"]["cache"]) == (64, (9 + 64) * each)
    shown = cli("plan", model, "--topology", "l4", "--max-num-seqs", "8").out
    assert "tokens of context, 1.0 MiB a sequence beside" in shown
    assert "  of it 64 states to go on from" in shown


def test_a_gpu_without_bfloat16(cli, model):
    """What the engine takes there: choose_dtype."""
    config = json.loads((model / "config.json").read_text())
    for dtype, there, elsewhere in (("bfloat16", "float16", "bfloat16"), ("float32", "float32", "float32")):
        (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert json.loads(cli("plan", model, "--topology", "t4", "--json").out)["dtype"] == there
        assert json.loads(cli("plan", model, "--topology", "l4", "--json").out)["dtype"] == elsewhere
        device = find_target("t4").devices[0]
        assert choose_dtype("auto", config | {"dtype": dtype}, None, device) == there
    assert "a GPU of 7.5" in cli("plan", model, "--topology", "t4", "--attention", "pallas").error()
    assert "dtype is float32" in cli("plan", model, "--topology", "l4", "--attention", "pallas").error()


def test_experts(cli, model):
    """Over how many devices they are, and what all wait for, with where that is from."""
    more = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    (model / "config.json").write_text(json.dumps(SMALL | more | {"architectures": ["Qwen3MoeForCausalLM"]}))
    arguments = "plan", model, "--topology", "h100-4", "--mesh", "data=2,tensor=2"
    assert "4 devices share experts" in (out := cli(*arguments).out)
    assert "doi:10.1002/0471722162" in out
    figures = json.loads(cli(*arguments, "--json").out)
    assert figures["experts_over"] == 4
    busiest = [step["busiest_rows"] for step in figures["decode"]]
    assert busiest == sorted(busiest, reverse=True)
    assert busiest[0] > figures["prefill"]["busiest_rows"] > 1
    arguments = *arguments[:-1], "data=2,tensor=2,expert=2"
    apart = json.loads(cli(*arguments, "--json").out)
    assert (apart["experts_over"], apart["mesh"]) == (2, "data=2,tensor=2,expert=2")
    assert apart["bytes"]["weights"] > figures["bytes"]["weights"]
    assert apart["prefill"]["bytes_sent"] < figures["prefill"]["bytes_sent"]


def test_a_picture(cli, model, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert cli("plan", model, "--topology", "h100", "--plot", file).code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert cli("plan", model, "--topology", "h100", "--plot", file).code == 0  # it is replaced
    (tmp_path / "folder.png").mkdir()
    for name, problem in [
        ("plan.svg", "a .png file"),
        ("none/plan.png", "no folder"),
        ("folder.png", "a .png file"),
        ("n" * 252 + ".png", "File name too long"),
    ]:
        assert problem in cli("plan", model, "--topology", "h100", "--plot", tmp_path / name).error()
    assert "is not on this machine" in cli("plan", model, "--topology", "h100", "--plot", "memory://x.png").error()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "folder.png", "plan.png"]
    assert "only one" in cli("plan", model, "--sweep", "--plot", file).error()
