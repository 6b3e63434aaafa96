"""jaxinfer as lm-eval's model: on local task files, the metrics of lm-eval's own `hf` model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxinfer import LLM

pytest.importorskip("lm_eval")
# What other libraries warn about is theirs.
pytestmark = [pytest.mark.filterwarnings("ignore")]

WORDS = ["stone", "river", "lamp", "green", "seven", "under", "walks", "paper", "the", "a", "of", "slow", "music"]

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files over one local data set."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    with open(folder / "data.jsonl", "w") as file:
        for _ in range(24):
            row = {
                "question": words(int(rng.integers(2, 12))),
                "choices": [words(2) for _ in range(4)],
                "answer": int(rng.integers(4)),
                "text": words(int(rng.integers(1, 90))),  # of up to twice the context
            }
            file.write(json.dumps(row) + "\n")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}"} | shared | task))
    return folder


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def evaluate(model, tasks, names=TASKS):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"local_{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {name: [s["filtered_resps"] for s in results["samples"][f"local_{name}"]] for name in names}
    metrics = {
        (name, metric): value
        for name in names
        for metric, value in results["results"][f"local_{name}"].items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return metrics, samples


@pytest.mark.slow
def test_the_metrics_of_hf(checkpoints, tasks):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    from jaxinfer.lm_eval import JaxInferLM

    folder = checkpoints("llama").folder
    with LLM(folder) as llm:
        ours, our_samples = evaluate(JaxInferLM(llm), tasks)
    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=256)
    # The checkpoint's files leave it to the tokenizer, where transformers does not look.
    hf.model.generation_config.eos_token_id = hf.tokenizer.eos_token_id
    theirs, their_samples = evaluate(hf, tasks)
    assert len(ours) == len(theirs) >= 8
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert our_samples["said"] == their_samples["said"]
    assert len({text for (text,) in our_samples["said"]}) > 1


def test_few_shot_examples_are_computed_once(checkpoints, tasks):
    from jaxinfer.lm_eval import JaxInferLM

    with LLM(checkpoints("llama").folder) as llm:
        evaluate(JaxInferLM(llm), tasks, ["choice"])
        assert llm.stats.hit_rate > 0.5  # four choices have a context in common


@pytest.mark.slow
def test_the_command(checkpoints, tasks, tmp_path):
    folder = checkpoints("llama").folder
    arguments = ["--model_args", f"pretrained={folder},max_num_seqs=4", "--include_path", str(tasks)]
    command = [sys.executable, "-m", "jaxinfer", "lm-eval", *arguments, "--tasks", "local_choice", "--limit", "8"]
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out.json")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "|local_choice|" in done.stdout
    assert "jaxinfer (" in done.stdout


def test_options_that_are_not_there(checkpoints, tasks):
    from jaxinfer.lm_eval import JaxInferLM

    folder = str(checkpoints("llama").folder)
    with pytest.raises(ValueError, match="device is 'mps': JAX has chosen cpu;"):
        JaxInferLM(folder, device="mps")
    with pytest.raises(ValueError, match="option 'parallelize' is not known"):
        JaxInferLM(folder, parallelize=True)
    with pytest.raises(ValueError, match="give pretrained=FOLDER or config=FILE"):
        JaxInferLM()
    with LLM(folder) as llm:
        with pytest.raises(ValueError, match="max_num_seqs is an option of loading"):
            JaxInferLM(llm, batch_size=8)
        model = JaxInferLM(llm, batch_size="auto")
        request = type("Request", (), {"args": ("a", {"until": ["b"], "num_beams": 2})})
        with pytest.raises(ValueError, match="num_beams is not supported"):
            model.generate_until([request])


def test_a_deployment(checkpoints, tmp_path):
    from jaxinfer.lm_eval import JaxInferLM

    file = tmp_path / "deployment.yaml"
    file.write_text(f"model: {checkpoints('llama').folder}\nmax_model_len: 40\n")
    assert JaxInferLM(config=str(file), max_num_seqs=2).max_length == 40
