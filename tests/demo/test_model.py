"""The packaged model: what it is, what it answers, and that transformers loads it too."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file

import jaxinfer
from jaxinfer.demo import MODEL_DIR, evaluate
from jaxinfer.demo.questions import held_out_questions
from jaxinfer.demo.train import ARCHITECTURE, CHAT_TEMPLATE, config, tokenizer_for_families


@pytest.fixture(scope="module")
def llm():
    with jaxinfer.LLM(MODEL_DIR) as llm:
        yield llm


def answer(llm, prompt: str) -> str:
    params = jaxinfer.SamplingParams(temperature=0.0, max_tokens=evaluate.MAX_ANSWER_TOKENS)
    return llm.generate(prompt, params)[0].outputs[0].text


def test_size():
    weights = load_file(MODEL_DIR / "model.safetensors")
    assert 1_000_000 <= sum(tensor.size for tensor in weights.values()) <= 5_000_000
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 10 * 2**20


def test_it_is_what_the_script_in_the_package_makes():
    serialized = tokenizer_for_families()
    assert (MODEL_DIR / "tokenizer.model").read_bytes() == serialized
    assert (MODEL_DIR / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    vocab_size = json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"]
    assert json.loads((MODEL_DIR / "config.json").read_text()) == config(vocab_size, ARCHITECTURE)


def test_it_answers_held_out_questions(llm):
    questions = held_out_questions(260, seed=4)
    shares = evaluate.exact_match(questions, evaluate.ask(llm, questions))
    assert shares["overall"] >= 0.95
    assert min(shares.values()) >= 0.8  # of 20 questions each


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 27 + 45?",
        "what is 27 + 45",
        "What is 27+45?",
        "What is 27 + 45?\n",
        "What is 27 + 45? ",
        "Add 27 and 45.",
    ],
)
def test_it_answers_what_people_type(llm, prompt):
    assert answer(llm, prompt).strip() == "27 + 45 = 72."


def test_an_answer_continues_its_question(llm):
    """As its tokens say, whoever asks: what `score` takes for the continuation."""
    question = "What is 27 + 45?"
    params = jaxinfer.SamplingParams(temperature=0.0, max_tokens=48)
    (output,) = llm.generate([question], params)
    completion = output.outputs[0]
    assert completion.text == " 27 + 45 = 72."
    assert llm.tokenizer.decode(output.prompt_token_ids + completion.token_ids) == question + completion.text
    (score,) = llm.score([question], [completion.text])
    assert score.token_ids == completion.token_ids[:-1]  # but for EOS
    assert score.is_greedy
    assert "".join(llm.stream(question, params)) == completion.text
    (beams,) = llm.beam_search([question], beam_width=2, max_tokens=48)
    assert beams.sequences[0].text == completion.text
    assert llm.chat([{"role": "user", "content": question}], params)[0].outputs[0].text == completion.text
    for stop, text in ((" ", ""), (" 27", ""), ("7", " 2")):
        stopped = llm.generate([question], dataclasses.replace(params, stop=stop))[0].outputs[0]
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (text, "stop", stop)


@pytest.mark.parametrize("word", ["letter", "stone", "planet"])
def test_words_without_quotation_marks_or_with_single_ones(llm, word):
    assert answer(llm, f"Reverse the word '{word}'.").strip() == f'Backwards it reads "{word[::-1]}".'


def test_a_conversation_is_its_last_question(llm):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "1 + 1 = 2."},
        {"role": "user", "content": "  What is 27 + 45?\n"},
    ]
    assert llm.chat(conversation)[0].outputs[0].text.strip() == "27 + 45 = 72."
    assert llm.chat_prompt(conversation)["prompt_token_ids"] == llm.tokenizer.encode("What is 27 + 45?")


def test_transformers_gives_the_same_answers(llm):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    for question in held_out_questions(13, seed=9):
        inputs = tokenizer(question.text, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=evaluate.MAX_ANSWER_TOKENS)
        theirs = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert theirs.strip() == answer(llm, question.text).strip()


def test_evaluate_prints_one_json_object(llm, capsys, monkeypatch):
    monkeypatch.setattr(jaxinfer, "LLM", lambda model, **options: llm)
    evaluate.main(["--questions", "26", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["questions"] == 26
    assert report["exact_match"]["overall"] >= 0.9
    assert len(report["exact_match"]) == 14


def test_evaluate_prints_a_table(capsys):  # with a model of its own
    evaluate.main(["--questions", "13", "--model", str(MODEL_DIR)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["sum", "difference"]
    assert lines[-1].startswith("overall")


def test_exact_match_counts_by_family():
    questions = held_out_questions(26)
    shares = evaluate.exact_match(questions, [question.family == "sum" for question in questions])
    assert shares["sum"] == 1.0
    assert shares["date"] == 0.0
    assert shares["overall"] == pytest.approx(1 / 13)


def test_evaluate_refuses_impossible_counts(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--questions", "0"])
    assert exit.value.code == 2
    assert "at least 1" in capsys.readouterr().err
