"""`--config FILE` on every command that loads a model."""

import json

import pytest
import yaml


@pytest.fixture
def config(model, tmp_path):
    file = tmp_path / "deployment.yaml"
    fields = {"model": str(model), "max_model_len": 40, "max_num_seqs": 4, "seed": 7}
    file.write_text(yaml.safe_dump(fields))
    return file


def test_generate(cli, config, model):
    expected = cli("generate", "ab", "--model", model, "--max-tokens", "4", "--temperature", "0").out
    assert cli("generate", "ab", "--config", config, "--max-tokens", "4", "--temperature", "0").out == expected
    assert "at most 39" in cli("generate", "x" * 50, "--config", config).error()
    # What the command line says comes before what the file says.
    assert cli("generate", "x" * 50, "--config", config, "--max-model-len", "60", "--max-tokens", "2").code == 0


def test_chat(cli, config):
    assert cli("chat", "--config", config, "--max-tokens", "2", stdin=b"a\n").code == 0
    assert "at most 39" in cli("chat", "--config", config, stdin=b"x" * 50).error()


def test_score(cli, config):
    text = json.dumps({"text": "x" * 50}).encode()
    result = cli("score", "-", "--config", config, stdin=text)
    assert result.code == 1
    assert "max_model_len" in result.err


@pytest.mark.slow
def test_bench(cli, config):
    lengths = ["--num-prompts", "1", "--output-len", "2"]
    assert "max_model_len" in cli("bench", "throughput", "--config", config, "--input-len", "50", *lengths).error()
    assert cli("bench", "throughput", "--config", config, "--input-len", "8", *lengths).code == 0


def test_batch(cli, config, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "ab"}) + "\n" + json.dumps({"prompt": "x" * 50}) + "\n")
    output = tmp_path / "out.jsonl"
    done = cli("batch", tmp_path / "rows.jsonl", "-o", output, "--config", config, "--max-tokens", "2", "--quiet")
    assert done.code == 1  # one row failed
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert first["error"] is None
    assert "max_model_len" in second["error"]


def test_what_is_wrong_is_said_with_its_line(cli, config):
    config.write_text(config.read_text() + "page_sise: 3\n")
    for command in (["generate", "x"], ["chat"], ["score", "-"], ["bench", "latency"], ["plan"]):
        assert f"{config}:5: there is no field 'page_sise'" in cli(*command, "--config", config).error()
    assert cli("generate", "x", "--config", "none.yaml").error() == "none.yaml: No such file or directory"
