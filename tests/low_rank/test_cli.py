"""Adapters on command lines, and in a deployment's file."""

import json

import pytest

from jaxinfer import SamplingParams
from jaxinfer.engine.deployment import read_deployment
from tests.refusals import line

TEXT = "some text that is long enough"
SIZES = ("--max-num-seqs", 4, "--max-num-batched-tokens", 32, "--dtype", "float32", "--max-adapters", 2, "-q")


def text_of(llm, name):
    (output,) = llm.generate(TEXT, SamplingParams(temperature=0, max_tokens=5), adapter=name, use_tqdm=False)
    return output.outputs[0].text


def test_one_is_used_and_of_several_the_named_one(cli, folders, llm):
    one, two = ("--adapter", f"a={folders / 'a'}"), ("--adapter", f"b={folders / 'b'}")
    command = ("generate", TEXT, "--model", folders / "base", *SIZES, "--max-tokens", 5)
    assert json.loads(cli(*command, *one, "--json").out)["text"] == text_of(llm, "a")
    assert cli(*command, *one, *two, "--use", "b").out.removesuffix("\n") == text_of(llm, "b")
    score = cli(
        "score", "-", "--model", folders / "base", *SIZES, *two, "--json", stdin=json.dumps({"text": TEXT}).encode()
    )
    expected = llm.score(TEXT, adapter="b", use_tqdm=False)[0].logprob
    assert json.loads(score.out)["logprob"] == pytest.approx(expected)
    bench = ("bench", "throughput", "--num-prompts", 2, "--input-len", 4, "--output-len", 2, "--json")
    assert json.loads(cli(*bench, "--model", folders / "base", *SIZES, *one, *two).out)["num_requests"] == 2


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (("--adapter", "a=x", "--adapter", "b=y"), "there are a, b; --use NAME says which one prompts have"),
        (("--adapter", "a=x", "--use", "b"), "--use is 'b', and --adapter names a"),
        (("--adapter", "x"), "--adapter is 'x': it must be NAME=DIR"),
        (("--adapter", "a=x", "--adapter", "a=y"), "there are two called a"),
        (("--adapter", "a=/none"), "/none: no such folder"),
        (("--max-adapters", "0"), "max_adapters is 0: it must be an integer from 1"),
        (("--lora-modules", "a=x"), "--lora-modules: here it is adapters={NAME: FOLDER}"),
    ],
)
def test_what_is_wrong(cli, folders, options, fact):
    assert fact in cli("generate", TEXT, "--model", folders / "base", *options).error()


def test_servers_and_other_models(cli, folders, tmp_path):
    where = ("--model", folders / "base", "--port", 0)
    assert (
        "there is no room for adapters: give --max-adapters" in cli("serve", *where, "--adapter-dir", tmp_path).error()
    )
    assert "adapter_dir is '/none'" in cli("serve", *where, "--adapter-dir", "/none", "--max-adapters", 2).error()


def test_in_a_deployment(folders, tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(f"model: {folders / 'base'}\nadapters:\n  a: {folders / 'a'}\nmax_adapters: 4\n")
    assert read_deployment(file).options == {"adapters": {"a": str(folders / "a")}, "max_adapters": 4}
    file.write_text("model: x\nadapters: [a]\n")
    assert line(lambda: read_deployment(file)).startswith(f"{file}:2: adapters is ['a']: it must be a dict")


def test_a_plan_counts_them(cli, folders):
    base = ("plan", folders / "base", "--topology", "h100-1", "--json")
    plain, adapted = (json.loads(cli(*base, *more).out) for more in ((), ("--max-adapters", 8, "--max-lora-rank", 16)))
    # Of each layer's seven matrices: 16 x (in + out) in bfloat16, and two float32 for each output.
    width, mlp, kv = 32, 48, 16
    sizes = [(width, width), (width, kv), (width, kv), (width, width), (width, mlp), (width, mlp), (mlp, width)]
    expected = 8 * 2 * sum(16 * (i + o) * 2 + 8 * o for i, o in sizes)
    assert adapted["bytes"]["adapters"] == expected
    assert adapted["bytes"]["total"] >= plain["bytes"]["weights"] + expected
    assert "adapters" not in plain["bytes"]
    assert "8 adapters of rank 16" in cli(*base[:-1], "--max-adapters", 8).out
