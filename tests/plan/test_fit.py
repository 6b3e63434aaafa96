"""What is held, from shapes; what would fit where something does not; and the ranking of all that fits."""

import json
import math
import re

import pytest

from jaxinfer.engine.deployment import read_deployment
from jaxinfer.plan.compile import make_plan
from jaxinfer.plan.figures import decoding
from jaxinfer.plan.fit import DoesNotFit, fit, fit_config, model_of
from jaxinfer.plan.roofline import expected_maximum
from jaxinfer.plan.slices import GIB
from jaxinfer.plan.sweep import meshes, sweep
from jaxinfer.plan.targets import find_target
from jaxinfer.sharding import AXES, parse_mesh
from tests.deployments import FILES, deployment_of, model_of_deployment
from tests.plan.test_roofline import CONFIG


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deployments_fit_by_their_shapes(file):
    deployment = read_deployment(file)
    target = find_target(deployment.topology, compiles=False)
    result = fit(model_of_deployment(deployment), target, **deployment.options)
    assert result.devices == len(result.target.devices)
    assert result.sizes.max_model_len == deployment.options["max_model_len"]
    assert result.cache_tokens >= 4 * result.sizes.max_model_len
    assert result.held < 0.85 * result.target.chip.memory


# In CI: two layers, and few sequences, as sampling for many takes long to compile. With -m long: all of all.
IN_CI = (
    *("llama-3.1-8b_v5e-8", "qwen3-30b-a3b_v5e-8", "qwen3-235b-a22b_v6e-32"),
    *("gpt-oss-120b_v6e-8", "gemma-4-26b-a4b_v6e-4"),
)
CUT = {"max_num_seqs": 16, "max_num_batched_tokens": 256}


def cut_off(architecture):
    """The last two layers of it."""
    text = architecture.get("text_config", architecture)
    text = text | {"num_hidden_layers": 2}
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][-2:]
    return architecture | {"text_config": text} if "text_config" in architecture else text


@pytest.mark.parametrize(
    ("file", "cut"),
    [
        *(pytest.param(f, True, id=f"{f.stem} cut", marks=pytest.mark.slow) for f in FILES if f.stem in IN_CI),
        *(pytest.param(f, False, id=f.stem, marks=pytest.mark.long) for f in FILES),
    ],
)
def test_deployments_compile(file, cut):
    """The prediction within 3% of what the compiler reports, and room for all."""
    pytest.importorskip("libtpu")
    deployment = read_deployment(file)
    architecture = cut_off(deployment.architecture) if cut else deployment.architecture
    options = deployment.options | (CUT if cut else {})
    plan = make_plan(fit_config(architecture, find_target(deployment.topology), **options))
    arguments = max(program.arguments for program in plan.programs)
    print(f"{file.stem}: {plan.total / GIB:.2f} GiB, padding {plan.padding / arguments:.2%}")
    for program in plan.programs:
        print(program)
    assert plan.fit.held == pytest.approx(arguments, rel=0.03)
    assert plan.free > 0


def test_experts_are_there_once():
    """Over data and tensor: no more bytes a chip than over tensor alone, and room for no fewer tokens; where each shard
    of rows has all of them they are there twice."""
    deployment = deployment_of("qwen3-30b-a3b_v6e-8")
    model, target = model_of_deployment(deployment), find_target("v6e-8", compiles=False)
    meshes = "data=2,tensor=4", "tensor=8", "fsdp=2,tensor=4", "data=2,tensor=4,expert=4"
    both, alone, fsdp, twice = (fit(model, target, **deployment.options | {"mesh": mesh}) for mesh in meshes)
    experts = 48 * 3 * 128 * 768 * 2048 * 2
    assert twice.weights - both.weights == experts // 8
    assert alone.weights < both.weights < 1.15 * alone.weights, "attention is there twice"
    assert fsdp.weights == pytest.approx(alone.weights, rel=0.01)
    for mesh in (both, fsdp):  # four key/value heads on eight chips are there twice otherwise
        assert mesh.cache_tokens > 1.8 * alone.cache_tokens
    assert twice.cache_tokens < both.cache_tokens
    assert [result.mesh for result in (both, alone, fsdp, twice)] == list(meshes)
    rates = [decoding(result, 256, 1024)["tokens_per_second"] for result in (both, alone, twice)]
    assert rates == sorted(rates, reverse=True)


def test_remedies():
    """More chips, and shorter sequences: each of them does fit."""
    deployment = deployment_of("llama-3.1-8b_v6e-1")
    model = model_of(deployment.architecture, "float32")
    hardware = find_target("v6e-1", compiles=False)
    options = deployment.options | {"dtype": "float32"}
    with pytest.raises(DoesNotFit, match=r"v6e-1: needs .* of a chip's 31\.25, .*: tensor=2 or dtype bfloat16$"):
        fit(model, hardware, **options)
    model = model_of_deployment(deployment)
    with pytest.raises(DoesNotFit) as caught:
        fit(model, hardware, **deployment.options | {"max_model_len": 131072})
    match = re.search(r": tensor=(\d+) or max_model_len ≤ (\d+)$", str(caught.value))
    assert match, caught.value
    assert fit(model, hardware, **deployment.options | {"max_model_len": int(match[2])})
    with pytest.raises(DoesNotFit):
        fit(model, hardware, **deployment.options | {"max_model_len": int(match[2]) + 16})
    assert fit(
        model, hardware.with_devices(int(match[1])), **deployment.options | {"max_model_len": 131072, "mesh": None}
    )


def test_the_cache_is_as_large_as_it_is_told_to_be():
    deployment = deployment_of("llama-3.1-8b_v6e-1")
    hardware = find_target("v6e-1", compiles=False)
    assert (
        fit(model_of_deployment(deployment), hardware, **deployment.options | {"kv_cache_memory": 2 * GIB}).sizes.bytes
        <= 2 * GIB
    )


def test_windows_leave_room():
    """Mistral 7B as it was first: of 32,768 tokens its layers keep 4,096, and a chunk while a prompt is computed."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"model_type": "mistral", "vocab_size": 32000, "num_hidden_layers": 32, "max_position_embeddings": 32768}
    hardware, options = find_target("v6e-1", compiles=False), {"max_num_seqs": 64, "max_model_len": 32768}
    whole, windowed = (
        fit(model_of(config | shape | {"sliding_window": window}), hardware, **options) for window in (None, 4096)
    )
    assert whole.programs.layout.bytes_per_token == windowed.programs.layout.bytes_per_token
    assert whole.rows_of(32768) == 3
    assert windowed.rows_of(32768) > 20
    assert windowed.rows_of(2048) == whole.rows_of(2048) * windowed.sizes.num_pages // whole.sizes.num_pages
    size = windowed.sizes.page_size
    assert windowed.programs.table_widths == ((4096 - 1 + windowed.programs.max_tokens + size - 2) // size + 1,)
    assert windowed.sizes.bytes <= whole.sizes.bytes


@pytest.mark.parametrize(
    ("name", "plain", "more"),
    [
        ("gemma-3-27b_v6e-4", {"sliding_window_pattern": 1}, 4.5),  # a layer of six sees all
        ("olmo-3-32b_v6e-8", {"layer_types": ["full_attention"] * 64}, 2.5),  # a layer of four
    ],
)
def test_windows_of_deployments_leave_room(name, plain, more):
    """For as many times more tokens than if every layer saw everything: in Gemma 3 27B of 131072 they take a sixth."""
    deployment = deployment_of(name)
    whole = dict(deployment.architecture)
    inner = whole.get("text_config")
    whole |= plain if inner is None else {"text_config": inner | plain}
    target = find_target(deployment.topology, compiles=False)
    options = deployment.options | {"max_model_len": 65536}
    windowed, seen = (fit(model, target, **options) for model in (model_of_deployment(deployment), model_of(whole)))
    assert windowed.weights == seen.weights
    assert windowed.cache_tokens > more * seen.cache_tokens
    assert windowed.sizes.bytes <= seen.sizes.bytes * 1.05


def test_heads_are_kept_no_more_often_than_they_must():
    """Eight key/value heads on sixteen chips: twice."""
    deployment = deployment_of("llama-3.3-70b_v6e-16")
    result = fit(model_of_deployment(deployment), find_target("v6e-16", compiles=False), **deployment.options)
    assert result.sizes.bytes == result.sizes.num_pages * result.sizes.page_size * 80 * 2 * 128 * 2


def test_a_sweep_ranks_what_fits():
    deployment = deployment_of("llama-3.3-70b_v6e-8")
    model = model_of_deployment(deployment)
    options = {name: value for name, value in deployment.options.items() if name != "mesh"}
    topologies = ["v5e-8", "v6e-8", "h200-4", "v5p-8"]
    candidates, refused = sweep(model, topologies, 1024, **options)
    assert [c.rate for c in candidates] == sorted((c.rate for c in candidates), reverse=True)
    assert {c.fit.target.name for c in candidates} == {
        "v6e-8",
        "h200-4",
        "v5p-8",
    }  # 131 GiB of weights in 8 x 15.75: no
    assert refused
    for candidate in candidates:
        assert candidate.rows * 1024 <= candidate.fit.cache_tokens
        assert candidate.fit.devices == len(candidate.fit.target.devices)


def test_every_mesh_of_a_sweep_uses_all_devices():
    model = model_of_deployment(deployment_of("llama-3.1-8b_v5e-8"))
    specs = list(meshes(model, find_target("v5e-8", compiles=False)))
    assert "tensor=8" in specs
    for spec in specs:
        sizes = parse_mesh(spec)
        assert math.prod(sizes[axis] for axis in AXES) == 8


@pytest.mark.slow
def test_sweeping_from_the_command_line(cli, tmp_path):
    file = deployment_of("llama-3.1-8b_v5e-4").path
    best = json.loads(cli("plan", file, "--sweep", "--json").out)
    assert best[0]["tokens_per_second_per_chip"] >= best[-1]["tokens_per_second_per_chip"] > 0
    assert {candidate["topology"].split("-")[0] for candidate in best} >= {
        "v4",
        "v5e",
        "v5p",
        "v6e",
        "tpu7x",
        "h100",
        "a100",
    }
    only = json.loads(cli("plan", file, "--sweep", "--topology", "v6e-4", "--json").out)
    assert {candidate["topology"] for candidate in only} == {"v6e-4"}
    assert "from shapes alone" in cli("plan", file, "--sweep").out
    assert "leave --mesh out" in cli("plan", file, "--sweep", "--mesh", "tensor=4").error()
    assert "a plan compiles anew" in cli("plan", file, "--sweep", "--compiled", "programs").error()
    assert "nothing is downloaded here" in cli("plan", file, "--sweep", "--revision", "main").error()
    code, out, err = cli("plan", file, "--sweep", "--topology", "t4", "--max-model-len", "4096")
    assert (code, out) == (1, "")
    assert "none of 1 meshes fits" in err


def test_a_cache_that_a_chip_has_no_room_for():
    deployment = deployment_of("llama-3.1-8b_v6e-1")
    hardware = find_target("v6e-1", compiles=False)
    for size in (10**13, 20 * GIB):  # 15 GiB of weights on 31.25
        with pytest.raises(DoesNotFit, match=f"kv_cache_memory is {size:,}, and beside weights a chip has "):
            fit(model_of_deployment(deployment), hardware, **deployment.options | {"kv_cache_memory": size})


def test_sequences_are_no_longer_than_the_model_takes(cli, tmp_path):
    """With as many tokens as it takes where nobody says how many; a model of 256 has room on any chip."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 256}))
    arguments = "plan", tmp_path, "--topology", "l4"
    for options, length in (((), 256), (("--max-model-len", "100"), 100), (("--context", "99"), 99)):
        figures = json.loads(cli(*arguments, *options, "--json").out)
        assert figures["context"] == length
        assert all(estimate["fits"] for estimate in figures["decode"])
        assert f"{length:,} tokens of context" in cli(*arguments, *options, "--sweep").out
    for more in ((), ("--sweep",)):
        for wanted in ("1000000", "257"):
            error = cli(*arguments, "--context", wanted, *more).error()
            assert error == f"context is {wanted}: config.json defines the model for at most 256"
        error = cli(*arguments, "--context", "101", "--max-model-len", "100", *more).error()
        assert error == "context is 101: max_model_len is 100"


SCOUT = {
    "model_type": "llama4",
    "architectures": ["Llama4ForConditionalGeneration"],
    "text_config": {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,  # of 48
        "max_position_embeddings": 10485760,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize(("place", "most", "page"), [("v6e-8", 2**21, 8192), ("h100-8", 10485760, 1024)])
def test_chunks_and_millions_of_tokens(place, most, page):
    """Llama 4 Scout, the first layers of it. Whatever length there is room for, pages divide chunks; a step reads the
    experts that its tokens have, and no more than a chunk of most layers."""
    target = find_target(place, compiles=False)
    model = model_of(SCOUT, target=target)
    held = fit(model, target)
    assert (held.sizes.max_model_len, held.sizes.page_size) == (most, page)
    assert fit(model, target, max_model_len=8192, max_num_seqs=64).sizes.page_size == {"v6e-8": 64, "h100-8": 16}[place]
    layers, expert = 4, 3 * 5120 * 8192
    one, many = (decoding(held, rows, 1024)["bytes_moved"] for rows in (1, 256))
    cache = 255 * layers * 1024 * 2 * 8 * 128 * 2
    busiest = expected_maximum(2, 1 / 16, 8)  # of the two experts that a chip has, how many one token has
    assert (many - one) * 8 == pytest.approx((16 - 8 * busiest) * layers * expert * 2 + cache, rel=1e-3)
    short, long = (decoding(held, 1, context)["bytes_moved"] for context in (8192, 81920))
    assert (long - short) * 8 == pytest.approx((81920 - 8192) * 2 * 8 * 128 * 2)  # of the layer that sees all
