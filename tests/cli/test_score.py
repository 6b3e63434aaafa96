"""`jaxinfer score`."""

import json
import math

import pytest

ROWS = b"""{"text": "one two three"}
{"prompt": "one two", "continuation": " three"}
{"text": 5}
{broken
{"text": "one two three"}
"""
NAME = "stdin"


def test_a_line_each_as_json(cli, model):
    code, out, err = cli("score", "-", "-m", model, "--json", stdin=ROWS)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    whole, rest, number, broken, again = lines
    assert whole | {"index": 4} == pytest.approx(again)
    assert whole["perplexity"] == pytest.approx(math.exp(-whole["logprob"] / whole["tokens"]))
    assert whole["word_perplexity"] == pytest.approx(math.exp(-whole["logprob"] / 3))
    assert 0 > rest["logprob"] > whole["logprob"]
    assert rest["tokens"] < whole["tokens"]
    assert "5" not in number
    assert "text must be text, and is a number" in number["error"]
    assert "not JSON" in broken["error"]
    total = whole["logprob"] * 2 + rest["logprob"]
    assert f"all: {total:.4f} in {2 * whole['tokens'] + rest['tokens']} tokens" in err
    assert "; 2 errors" in err


def test_lines_of_text(cli, model, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one two\n\nthree, four\n")
    code, out, err = cli("score", file, "-m", model)
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split() == ["log-likelihood", "tokens", "perplexity", "text"]
    assert [line.split(maxsplit=3)[3] for line in lines] == ["one two", "three, four"]
    assert err.startswith("jaxinfer: all: -")
    assert cli("score", file, "-m", model, "--quiet").err == ""


def test_rolling_scores_the_first_token_too_and_texts_of_any_length(cli, model, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "word " * 200}) + "\n")
    code, out, err = cli("score", file, "-m", model, "--json")
    assert code == 1
    assert "must be 2" in out or "1 tokens" in out
    assert "max_model_len" in out
    code, out, err = cli("score", file, "-m", model, "--json", "--rolling")
    assert code == 0, (out, err)
    single, many = map(json.loads, out.splitlines())
    assert single["tokens"] == 1
    assert many["tokens"] > 256
    pair = b'{"prompt": "a", "continuation": "b"}'
    assert "has a continuation" in cli("score", "-", "-m", model, "--rolling", "--json", stdin=pair).err


def test_no_such_file(cli, model):
    assert "nothing.txt" in cli("score", "nothing.txt", "-m", model).error()
