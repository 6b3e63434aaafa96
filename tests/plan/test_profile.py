"""`jaxinfer plan --profile`: the TPU compiler's own estimates of what operations take."""

import json
import re
import sys
import tempfile

import pytest
from rich.console import Console

from jaxinfer.cli.profile_tables import print_profile
from jaxinfer.plan.dumped import dumped
from jaxinfer.plan.fit import fit, model_of
from jaxinfer.plan.profile import check_profile, profile
from jaxinfer.plan.targets import find_target
from tests.plan.test_plan import SMALL

SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
OPTIONS = "--max-num-seqs", "8", "--max-num-batched-tokens", "64"


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


def total(program, ops: str, figure: str) -> int:
    """Of operations whose names begin so."""
    return sum(op[figure] for op in program["ops"] if op["op"].startswith(ops))


def test_wrong_ones(cli, model):
    plan = "plan", model, *OPTIONS
    assert "there is no compiler for l4" in cli(*plan, "--topology", "l4", "--profile").error()
    assert "--sweep makes many" in cli(*plan, "--sweep", "--profile").error()
    assert "which is not given" in cli(*plan, "--topology", "v5e-1", "--profile-rows", "2").error()
    pytest.importorskip("libtpu")
    target = find_target("v5e-1")
    held = fit(model_of(SMALL, "bfloat16", target), target, **SIZES)
    with pytest.raises(ValueError, match="profile_rows is 9: max_num_seqs is 8"):
        check_profile(held, [8, 9], [64])
    with pytest.raises(ValueError, match="profile_tokens is 65: max_num_batched_tokens is 64"):
        check_profile(held, [8], [64, 65])


def test_a_compiler_that_ends(monkeypatch, tmp_path):
    """Its process says nothing; and its folder is gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"decode, 8, for v5e-1: the TPU compiler did not make it: .* ended with 1"):
        dumped(SMALL, "v5e-1", SIZES, ("decode", 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_profile(cli, model, monkeypatch, tmp_path_factory):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(tempfile, "tempdir", str(folder := tmp_path_factory.mktemp("dumps")))
    figures = json.loads(cli("plan", model, "--topology", "v5e-1", *OPTIONS, "--profile", "--json").out)
    assert list(folder.iterdir()) == []
    bounds = {"decode, 8 rows": figures["decode"][-1], "prefill, 64 tokens": figures["prefill"]}
    assert [program["program"] for program in figures["profile"]["programs"]] == list(bounds)
    for program in figures["profile"]["programs"]:
        bound = bounds[program["program"]]
        assert (program["bound_seconds"], program["bound_binds"]) == (bound["seconds"], bound["binds"])
        assert program["ratio"] > 1
        assert program["seconds"] == pytest.approx(sum(op["seconds"] + op["waited_seconds"] for op in program["ops"]))
        ops = {op["op"]: op for op in program["ops"]}
        # No less than the weights, each once: down_proj is [512, 256] in each of two layers.
        assert ops["mlp.down_proj"]["bytes_read"] >= 2 * 512 * 256 * 2
        assert total(program, "mlp.", "cycles") > 0  # the fusion of several goes by the largest
        assert {"norm", "rotary", "self_attn.q_proj", "ragged_paged_attention"} <= ops.keys()
        for code in ops["ragged_paged_attention"]["kernel"]:
            # How many blocks a prefill has is known when it runs.
            assert code["grid"] is None if program["program"].startswith("prefill") else code["grid"] > 0
            assert sum(code["bundles"]) > 400
            # What the code has is what the kernel says that it has.
            assert len(code["loops"]) >= 6
            assert code["grid"] in (None, code["loops"][0][2])
        # Of a prompt there is nothing to do for rows that decode: of two kernels one brings pages.
        assert sum(code["loops"][-2][2] > 0 for code in ops["ragged_paged_attention"]["kernel"]) == 1
        assert not any("how often its inner loops run" in note for note in program["notes"])
    console = Console(width=150, record=True)
    print_profile(console, figures["profile"], "small")
    text = console.export_text()
    assert re.search(r"mlp\.\w+ +2 +[\d,.]+ +[\d,.]+ +[\d,.]+ +[\d,.]+ +[\d,]+ +(memory|\w+ \d+%) *\n", text)
    assert re.search(r"a step 0\.\d+ ms by the estimates of libtpu [\d.]+; at best 0\.\d+ \(memory\): \d+\.\d\dx", text)


@pytest.mark.slow
def test_twice_as_many_layers():
    pytest.importorskip("libtpu")
    target, found = find_target("v5e-1"), {}
    for layers in (2, 4):
        config = SMALL | {"num_hidden_layers": layers}
        held = fit(model_of(config, "bfloat16", target), target, **SIZES)
        (found[layers],) = profile(held, config, {**SIZES, "dtype": "bfloat16"}, 64, [8], [])["programs"]
    for ops in ("mlp.", "self_attn.", "ragged_paged_attention"):
        two, four = ({f: total(found[layers], ops, f) for f in ("count", "cycles", "bytes_read")} for layers in (2, 4))
        assert four["count"] == 2 * two["count"] > 0
        assert four["cycles"] == pytest.approx(2 * two["cycles"], rel=0.2)
        assert four["bytes_read"] == pytest.approx(2 * two["bytes_read"], rel=0.01)
    assert total(found[2], "mlp.", "cycles") > 0
    two, four = found[2]["cycles"], found[4]["cycles"]
    assert 1.3 * two < four < 2 * two  # the head and sampling are there once
