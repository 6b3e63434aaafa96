"""Jobs whose rows have adapters."""

import json
import shutil

import pytest

from jaxinfer.batch import run
from tests.adapters import write_adapter
from tests.refusals import line

SHORT = {"max_tokens": 4, "temperature": 0}
TEXT = "What is 1 + 2?"


def done(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_name_their_adapters(llm, tmp_path):
    def batch_line(model):
        body = {"model": model, "prompt": TEXT, **SHORT}
        return {"custom_id": model, "method": "POST", "url": "/v1/completions", "body": body}

    rows = [{"prompt": TEXT, "adapter": name} for name in ("a", None, "b", "x", 5)] + [{"prompt": TEXT}]
    rows += [batch_line(model) for model in ("b", llm.folder.name, "gpt")]  # which nobody is
    source, options = write(tmp_path / "rows.jsonl", rows), {"model": llm, "sampling_params": SHORT}
    summary = run(source, tmp_path / "out.jsonl", adapter="a", **options)
    assert (summary.rows, summary.errors) == (9, 3)
    *own, one, two, three = done(tmp_path / "out.jsonl")
    texts = {
        name: llm.generate(TEXT, llm.get_default_sampling_params().with_changes(**SHORT), adapter=name, use_tqdm=False)
        for name in ("a", None, "b")
    }
    texts = {name: outputs[0].outputs[0].text for name, outputs in texts.items()}
    assert [row["generated_text"] for row in own] == [texts["a"], texts[None], texts["b"], None, None, texts["a"]]
    assert own[3]["error"].endswith("rows.jsonl:4: adapter is 'x': there are a, b")
    assert "adapter must be text, and is a number" in own[4]["error"]
    bodies = [entry["response"]["body"] for entry in (one, two)]
    assert [body["choices"][0]["text"] for body in bodies] == [texts["b"], texts[None]]
    assert [body["model"] for body in bodies] == ["b", llm.folder.name]
    assert f"model is 'gpt': there are a, b, {llm.folder.name}" in json.dumps(three)
    assert "adapter is 'x': there are a, b" in line(lambda: run(source, tmp_path / "other", adapter="x", **options))


def test_scores_and_templates(llm, tmp_path):
    rows = [{"text": TEXT, "adapter": name} for name in ("a", None)]
    run(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", model=llm, task="score")
    found = [row["logprob"] for row in done(tmp_path / "out.jsonl")]
    expected = [output.logprob for output in llm.score([TEXT] * 2, adapter=["a", None], use_tqdm=False)]
    assert found == pytest.approx(expected)


def test_a_job_is_of_its_adapters(folders, llm, tmp_path, cli):
    """Resumed with another content under the same name, or asked for once more."""
    shutil.copytree(folders / "a", tmp_path / "adapter")
    source = write(tmp_path / "rows.jsonl", [{"prompt": TEXT}, {"prompt": TEXT, "adapter": ""}])
    command = ["batch", source, "-o", tmp_path / "out.jsonl", "--model", folders / "base", "--dtype", "float32", "-q"]
    command += ["--max-num-seqs", 4, "--max-num-batched-tokens", 32, "--max-adapters", 2, "--max-tokens", 4]
    assert cli(*command, "--adapter", f"x={tmp_path / 'adapter'}").code == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    adapted, plain = done(tmp_path / "out.jsonl")
    assert adapted["generated_text"] != plain["generated_text"]
    assert cli(*command, "--adapter", f"x={tmp_path / 'adapter'}").code == 0
    shutil.rmtree(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", folders / "base", seed=7)
    assert "holds another job: adapters.x was" in cli(*command, "--adapter", f"x={tmp_path / 'adapter'}").error()
    assert "holds another job: adapter was" in cli(*command).error()
    assert (tmp_path / "out.jsonl").read_bytes() == before
