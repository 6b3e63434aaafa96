"""jaxinfer as lm-eval's model: on local task files, the metrics of lm-eval's own `hf` model."""

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.text.chat import ChatTemplates
from tests.checkpoints import write_tokenizer
from tests.models.test_families import reference as of_family

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


def hf_model(folder, **options):
    """lm-eval's own model of a checkpoint."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=str(folder), dtype="float32", device="cpu", **options)
    # The tiny checkpoints' files leave it to the tokenizer, where transformers does not look; and the other one's
    # generation_config.json has most tokens of an answer, which would come before what lm-eval asks for.
    hf.model.generation_config.eos_token_id = hf.tokenizer.eos_token_id
    hf.model.generation_config.max_new_tokens = None
    return hf


@pytest.fixture(scope="module")
def both(checkpoints):
    """The same checkpoint as lm-eval's own model and as ours."""
    from jaxinfer.lm_eval import JaxInferLM

    folder = checkpoints("llama").folder
    with LLM(folder) as llm:
        yield hf_model(folder, batch_size=1), JaxInferLM(llm)


def evaluate(model, tasks, names=TASKS, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"local_{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
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
    from jaxinfer.lm_eval import JaxInferLM

    folder = checkpoints("llama").folder
    with LLM(folder) as llm:
        ours, our_samples = evaluate(JaxInferLM(llm), tasks)
    theirs, their_samples = evaluate(hf_model(folder, batch_size=4, max_length=256), tasks)
    assert len(ours) == len(theirs) >= 8
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert our_samples["said"] == their_samples["said"]
    assert len({text for (text,) in our_samples["said"]}) > 1


GENERATION = [
    {"until": ["e", "\n"]},
    {"until": "e"},
    {"until": []},
    {"until": ["never said"], "do_sample": False, "temperature": 0.9},
    {"temperature": 0, "top_p": 0.5},
    {"top_k": 3, "min_p": 0.1},
    {"num_beams": 1, "repetition_penalty": 1.3},
    {"min_new_tokens": 5, "until": ["<|end|>", "</s>"]},
]


def requests(count, seed=0):
    """Of all types: {method: [arguments of a request, ...]}, `count` in all."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(rng.choice([*WORDS, "é", "\n", "日"], int(rng.integers(low, high))))

    arguments = {"loglikelihood": [], "loglikelihood_rolling": [], "generate_until": []}
    contexts = ["", "a ", "two  spaces \n", "</s>the", "<|end|>the", words(90, 120)]  # the last one is cut
    for i in range(count):
        context = contexts[i // 4 % len(contexts)] if i % 8 < 4 else words(1, 30)
        match i % 4:
            case 0 | 1:  # several of one context, and one after several contexts
                scored = " stone" if i % 12 == 1 else f" {words(1, 5)}"
                # At a text's own leading space transformers 5 reads tokenizer.model in another way: see tests/text.
                arguments["loglikelihood"].append((context, scored if context else scored[1:]))
            case 2:
                arguments["loglikelihood_rolling"].append(("" if i == 2 else words(1, 140),))
            case 3:
                most = {"max_gen_toks": int(rng.integers(1, 24))} if i % 8 == 3 else {"max_new_tokens": 9}
                arguments["generate_until"].append((context or "a", GENERATION[i // 4 % len(GENERATION)] | most))
    return arguments


def compare(hf, ours, count):
    """Asks both the same and returns the largest difference of a log-likelihood."""
    from lm_eval.api.instance import Instance

    difference = 0.0
    for method, asked in requests(count).items():
        answers = []
        for model in (hf, ours):
            instances = [Instance(method, {}, arguments, i) for i, arguments in enumerate(asked)]
            answers.append(getattr(model, method)(instances, disable_tqdm=True))
        for arguments, theirs, own in zip(asked, *answers, strict=True):
            if method == "generate_until":
                assert own == theirs, arguments
                continue
            if method == "loglikelihood":
                assert own[1] == theirs[1], arguments
                own, theirs = own[0], theirs[0]
            assert own == pytest.approx(theirs, rel=1e-5, abs=1e-3), arguments
            difference = max(difference, abs(own - theirs))
    return difference


def test_the_answers_of_hf(both):
    compare(*both, 32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.long),
        pytest.param("qwen3", marks=pytest.mark.long),
        pytest.param("demo", marks=pytest.mark.long),
        pytest.param("qwen3_5_text", marks=pytest.mark.long),  # with states
        pytest.param("mamba2", marks=pytest.mark.long),
    ],
)
def test_the_answers_of_hf_to_200_requests(checkpoints, name, tmp_path, capsys):
    from jaxinfer.lm_eval import JaxInferLM

    folder = files("jaxinfer") / "demo" / "model" if name == "demo" else tmp_path / name
    if name in ("qwen3_5_text", "mamba2"):
        shutil.copytree(of_family(checkpoints.root, name, "large").folder, folder)
        write_tokenizer(folder)
    elif name != "demo":
        folder = checkpoints(name).folder
    with LLM(folder, dtype="float32") as llm:
        ours = JaxInferLM(llm)
        difference = compare(hf_model(folder, batch_size=1, max_length=ours.max_length), ours, 200)
    with capsys.disabled():
        print(f"\n{name}: 200 requests, log-likelihoods differ by at most {difference:.1e}")


def test_what_hf_says_of_itself_and_of_texts(both):
    hf, ours = both
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks", "tokenizer_name"):
        assert getattr(ours, name) == getattr(hf, name), name
    assert ours.chat_template(False) is hf.chat_template(False) is None
    assert ours.chat_template(True) == hf.chat_template(True)
    for text in ("", "a b", " é", "<|end|>a", "a<|end|>", "\n\n"):
        for options in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}, {"left_truncate_len": 2}):
            assert ours.tok_encode(text, **options) == hf.tok_encode(text, **options)


def test_a_task_is_greedy_unless_it_says_how_to_sample(both):
    from lm_eval.api.instance import Instance

    def answers(**kwargs):
        asked = [Instance("generate_until", {}, ("slow music", {"max_gen_toks": 9} | kwargs), i) for i in range(4)]
        return both[1].generate_until(asked, disable_tqdm=True)

    (greedy,) = set(answers(do_sample=False))
    for kwargs in (
        {},
        {"until": None},
        {"until": ["zz"]},
        {"top_p": 0.9},
        {"top_k": 5, "seed": 1},
        {"do_sample": True},
    ):
        assert set(answers(**kwargs)) == {greedy}
    assert len(set(answers(temperature=1.0))) > 1
    assert len(set(answers(do_sample=True, temperature=1.0, top_p=None))) > 1


def test_generation_config_counts_as_it_does_for_hf(both, tmp_path):
    """A penalty there applies to greedy answers too."""
    from lm_eval.api.instance import Instance

    from jaxinfer.lm_eval import JaxInferLM

    folder = tmp_path / "m"
    shutil.copytree(both[1].llm.folder, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "repetition_penalty": 2.0})
    )
    asked = [Instance("generate_until", {}, (word, {"max_gen_toks": 16}), 0) for word in WORDS[:4]]
    plain = both[1].generate_until(asked, disable_tqdm=True)
    theirs = hf_model(folder, batch_size=1).generate_until(asked, disable_tqdm=True)
    with LLM(folder) as llm:
        assert JaxInferLM(llm).generate_until(asked, disable_tqdm=True) == theirs != plain


def test_stop_strings_may_be_special_tokens(both, tmp_path):
    """The text has no special tokens in it, but ends where one is said."""
    from lm_eval.api.instance import Instance

    from jaxinfer.lm_eval import JaxInferLM

    request = Instance("generate_until", {}, ("green lamp", {"max_gen_toks": 20}), 0)
    (text,) = both[1].generate_until([request], disable_tqdm=True)
    middle = next(c for c in text[5:] if c.isascii() and c.isprintable() and c != " ")
    folder = tmp_path / "m"
    shutil.copytree(both[1].llm.folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    token = content["added_tokens"][0] | {"id": content["model"]["vocab"][middle], "content": middle, "special": True}
    content["added_tokens"].insert(0, token)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    request = Instance("generate_until", {}, ("green lamp", {"max_gen_toks": 20, "until": [middle]}), 0)
    (theirs,) = hf_model(folder, batch_size=1).generate_until([request], disable_tqdm=True)
    with LLM(folder) as llm:
        assert JaxInferLM(llm).generate_until([request], disable_tqdm=True) == [theirs] == [text[: text.index(middle)]]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content FILTER}}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM])
@pytest.mark.parametrize("written", ["", "| trim ", "| upper "])
def test_conversations_as_hf_writes_them(both, template, written, monkeypatch, caplog):
    hf, ours = both
    template = template.replace("FILTER", written)
    monkeypatch.setattr(hf.tokenizer, "chat_template", template)
    monkeypatch.setattr(ours.llm.tokenizer, "chat_templates", ChatTemplates(ours.llm.folder, {"default": template}))
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say yes </s> \n"}
    answer = {"role": "assistant", "content": "yes"}
    for history in ([user], [system, user], [system, user, answer, user], [user, answer]):
        assert ours.apply_chat_template(history) == hf.apply_chat_template(history)
    assert ("no system role: so the system message is left out" in caplog.text) == (template.startswith(NO_SYSTEM[:20]))
    # Text that is said elsewhere too, and after it, by the template.
    for reply in ("yes", " yes \n", "s", "</s>", "Be brief."):
        for history in ([user, answer | {"content": reply}], [system, user, answer | {"content": reply}], [user]):
            text = ours.apply_chat_template(history, False)
            if "upper" in written:  # which transformers refuses, as it looks for the message's own text too
                assert text.endswith(f">{history[-1]['content'].upper()}")
            else:
                assert text == hf.apply_chat_template(history, False)
    with pytest.raises(ValueError, match="no text in 'content'"):
        ours.apply_chat_template([user, {"role": "assistant", "content": None}], False)


def test_a_template_by_name(both, monkeypatch):
    ours = both[1]
    templates = {"default": "{{ messages[0].content }}", "short": "{{ messages[0].content[0] }}"}
    monkeypatch.setattr(ours.llm.tokenizer, "chat_templates", ChatTemplates(ours.llm.folder, templates))
    monkeypatch.setattr(ours, "_template", None)
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="chat_template is 'long': the checkpoint has default, short"):
        ours.chat_template("long")
    assert ours.apply_chat_template(message) == "hi"
    assert ours.chat_template("short") == templates["short"]
    assert ours.apply_chat_template(message) == "h"


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


def test_an_output_that_can_not_be_is_said_before(cli, tmp_path):
    """lm-eval itself would make a folder gs: here, and the other at the end."""
    (tmp_path / "file").touch()
    arguments = ("--model_args", "pretrained=no-such-folder/x", "--tasks", "local_choice")
    for name, problem in {
        "gs:/bucket/x": "has lost a slash",
        "memory://x": "is not on this machine",
        tmp_path / "file": "can't be made",
        tmp_path / "file" / "x.json": "can't be made",
        tmp_path / ("n" * 256): "File name too long",
    }.items():
        for option in ("--output_path", "-o"):
            assert problem in cli("lm-eval", *arguments, option, name).error()
    assert os.listdir(tmp_path) == ["file"]


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
