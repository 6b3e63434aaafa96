"""`jaxinfer generate`: everything that needs no terminal."""

import io
import json
import subprocess
import sys

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.cli.console import Progress, print_pieces
from jaxinfer.cli.generate import _texts

SHORT = ["--max-tokens", "12"]


@pytest.fixture(scope="module")
def expected(model):
    """Texts of some prompts, by the Python interface, greedy."""
    prompts = ["one", "two words", "third"]
    with LLM(model) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12))
    return dict(zip(prompts, outputs, strict=True))


def text_of(expected, prompt):
    return expected[prompt].outputs[0].text


def line_of(expected, prompt):
    """As one prompt's text is printed: the last line is ended if the text does not end it itself."""
    return text_of(expected, prompt).removesuffix("\n") + "\n"


def test_one_prompt(cli, model, expected):
    assert cli("generate", "one", "-m", model, *SHORT) == (0, line_of(expected, "one"), "")


def test_several_prompts(cli, model, expected):
    code, out, err = cli("generate", *expected, "--model", model, *SHORT)
    assert (code, err) == (0, "")
    assert out == "\n".join(f"==> {prompt} <==\n{text_of(expected, prompt)}\n" for prompt in expected)


def test_json(cli, model, expected):
    code, out, err = cli("generate", *expected, "--model", model, *SHORT, "--json")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == list(expected)
    for record, output in zip(records, expected.values(), strict=True):
        completion = output.outputs[0]
        assert record["text"] == completion.text
        assert record["token_ids"] == completion.token_ids
        assert record["finish_reason"] == completion.finish_reason
        prompt_tokens, completion_tokens = len(output.prompt_token_ids), len(completion.token_ids)
        assert record["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        timing = record["timing"]
        names = ["load_seconds", "compile_seconds", "time_to_first_token"]
        assert list(timing) == [*names, "prefill_tokens_per_second", "decode_tokens_per_second"]
        assert all(value > 0 for value in timing.values())


def test_prompts_from_files_and_pipes(cli, model, expected, tmp_path):
    lines = "".join(f"{prompt}\n" for prompt in expected)
    wanted = cli("generate", *expected, "-m", model, *SHORT).out
    file = tmp_path / "prompts.txt"
    file.write_text(f"\n{lines}\n\n")
    assert cli("generate", "--file", file, "-m", model, *SHORT).out == wanted
    assert cli("generate", "--file", "-", "-m", model, *SHORT, stdin=lines.encode()).out == wanted
    assert cli("generate", "-m", model, *SHORT, stdin=lines.encode()).out == wanted
    assert cli("generate", "-m", model, *SHORT, stdin=b"one\n").out == line_of(expected, "one")
    # As PROMPT, - is all that is piped in, lines and all.
    record = json.loads(cli("generate", "-", "-m", model, *SHORT, "--json", stdin=lines.encode()).out)
    assert record["prompt"] == lines.removesuffix("\n")


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("a\u2028b\u2029c\nd\n", ["a\u2028b\u2029c", "d"]),
        ("a\x0cb\x0b\x1c\x1d\x1ec\x85d\n", ["a\x0cb\x0b\x1c\x1d\x1ec\x85d"]),
        ("\ufeffa\r\n\r\nb\rc\r\n", ["a", "b\rc"]),
    ],
)
def test_lines_are_what_files_call_lines(tmp_path, monkeypatch, content, prompts):
    """And a byte order mark is no part of a prompt."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(content.encode())
    assert _texts([], str(file)) == prompts
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert _texts([], None) == prompts
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert _texts(["x", "-"], None) == ["x", content.removeprefix("\ufeff").removesuffix("\n")]


def test_chat_template(cli, model):
    """The template of the tiny checkpoints writes `user: ...`, a line for each message, and `assistant:`."""
    code, out, _ = cli("generate", "hi", "-m", model, *SHORT, "--chat", "--json")
    plain = json.loads(cli("generate", "user: hi\nassistant:", "-m", model, *SHORT, "--json").out)
    record = json.loads(out)
    assert code == 0
    assert record["prompt"] == "hi"
    assert {key: record[key] for key in ("text", "usage")} == {key: plain[key] for key in ("text", "usage")}


def test_sampling_options_arrive(cli, model):
    def ids(*options):
        code, out, err = cli("generate", "one", "-m", model, "--json", *options)
        assert (code, err) == (0, "")
        return json.loads(out)["token_ids"]

    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "seed": -7, "max_tokens": 9}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    with LLM(model) as llm:
        outputs = [llm.generate("one", SamplingParams(**options | change)) for change in ({}, {"top_k": -1})]
        greedy = llm.generate("one", SamplingParams(temperature=0.0, max_tokens=9))[0].outputs[0].token_ids
    assert ids(*flags) == outputs[0][0].outputs[0].token_ids
    assert ids(*flags, "--top-k", "-1") == outputs[1][0].outputs[0].token_ids
    # What is not given is as the checkpoint says: greedy here, and every option matters.
    assert ids("--max-tokens", 9) == greedy
    assert ids("--max-tokens", 9, "--temperature", 0.9, "--seed", 1) != greedy


def test_several_continuations_with_log_probabilities(cli, model):
    options = ["-m", model, "--max-tokens", 5, "--temperature", 1.0, "--seed", 3, "-n", 2]
    with LLM(model) as llm:
        params = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=5, logprobs=1, frequency_penalty=0.5)
        expected = llm.generate(["one", "two"], params, use_tqdm=False)
    more = ["--logprobs", 1, "--frequency-penalty", 0.5, "--max-num-seqs", 4, "--max-num-batched-tokens", 32]
    code, out, err = cli("generate", "one", "two", *options, *more, "--json")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [(record["prompt"], record["index"]) for record in records] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    for record, completion in zip(
        records, [completion for output in expected for completion in output.outputs], strict=True
    ):
        assert record["token_ids"] == completion.token_ids
        for entries, step, token in zip(record["logprobs"], completion.logprobs, completion.token_ids, strict=True):
            assert entries[0]["token_id"] == token
            assert [entry["logprob"] for entry in entries] == pytest.approx(
                [logprob.logprob for logprob in step.values()], abs=1e-5
            )
    text = cli("generate", "one", *options, "--frequency-penalty", 0.5).out
    first, second = (completion.text for completion in expected[0].outputs)
    assert text == f"==> one, 1 of 2 <==\n{first}\n\n==> one, 2 of 2 <==\n{second}\n"
    assert "--logprobs are part of what --json prints" in cli("generate", "x", "-m", model, "--logprobs", 1).error()


def test_a_chat_template_of_one_s_own(cli, model, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    asked = ["-m", model, *SHORT, "--json"]
    own = json.loads(cli("generate", "hi", *asked, "--chat", "--chat-template", file).out)
    plain = json.loads(cli("generate", "<hi>", *asked).out)
    assert {key: own[key] for key in ("text", "usage")} == {key: plain[key] for key in ("text", "usage")}
    named = json.loads(cli("generate", "hi", *asked, "--chat", "--chat-template", "default").out)
    assert named["text"] == json.loads(cli("generate", "hi", *asked, "--chat").out)["text"]
    line = cli("generate", "hi", *asked, "--chat", "--chat-template", "nowhere.jinja").error()
    assert line == "--chat-template nowhere.jinja: no such file, and no such template: the checkpoint's are default"
    assert "give --chat too" in cli("generate", "hi", *asked, "--chat-template", file).error()


@pytest.mark.slow
def test_structured_output(cli, model, tmp_path):
    for file, content in (("schema.json", '{"const": [1, "x"]}'), ("grammar", 'root ::= "a" "b"')):
        (tmp_path / file).write_text(content)
    for options, text in (
        (["--choice", "yes"], "yes"),
        (["--regex", "a{3}"], "aaa"),
        (["--json-schema", tmp_path / "schema.json"], None),
        (["--grammar", tmp_path / "grammar"], "ab"),
    ):
        code, out, err = cli("generate", "one", "-m", model, "--max-tokens", "60", *options)
        assert (code, err) == (0, "")
        assert out == f"{text}\n" if text else json.loads(out) == [1, "x"]
    code, _, err = cli("generate", "one", "-m", model, "--choice", "yes", "--regex", "a")
    assert code == 2
    assert "give exactly one of" in err
    assert "none: No such file" in cli("generate", "one", "-m", model, "--grammar", tmp_path / "none")[2].replace(
        "'", ""
    )


def test_stop_strings_may_be_repeated(cli, model, expected):
    text = text_of(expected, "one")
    stop = next(c for c in text[2:] if c.isascii())
    options = ["-m", model, *SHORT, "--stop", "never there", "--stop", stop, "--json"]
    record = json.loads(cli("generate", "one", *options).out)
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


def test_dtype_and_max_model_len_arrive(cli, model):
    options = ["-m", model, "--dtype", "bfloat16", "--max-model-len", 8, "-v", "--json"]
    code, out, err = cli("generate", "one", *options)
    assert code == 0
    assert json.loads(out)["usage"]["total_tokens"] <= 8
    assert "in bfloat16" in err
    assert "max_model_len 8" in err


def test_verbosity(cli, model, monkeypatch):
    monkeypatch.setattr("jaxinfer.engine.sizing.CPU_SHARE", 1e-12)
    monkeypatch.setattr("jaxinfer.engine.load._available", lambda device, share, slots: 50_000)
    logs = {flag: cli("generate", "one", "-m", model, *SHORT, *flag.split()).err for flag in ("", "-q", "-v", "-vv")}
    warning = "jaxinfer: warning: max_model_len is 176 of the model's 256 tokens: more does not fit in the KV cache\n"
    assert logs[""] == warning
    assert logs["-q"] == ""
    assert logs["-v"].startswith(warning + "jaxinfer: info: loaded ")
    assert "jaxinfer: info: attention: plain XLA: " in logs["-v"]
    assert "Traceback" in cli("generate", "x" * 300, "-m", model, "-vv").err
    assert cli("generate", "x" * 300, "-m", model, "-q").error().startswith("the prompt has 300 tokens")


def test_profile(cli, model, tmp_path):
    folder = tmp_path / "new" / "trace"
    code, out, _ = cli("generate", "one", "-m", model, *SHORT, "--profile", folder)
    assert code == 0
    assert len(out) > 1
    assert list(folder.rglob("*.xplane.pb"))
    assert "is not on this machine" in cli("generate", "one", "-m", model, "--profile", "memory://x").error()


def test_prompts_that_are_none(cli, model, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    latin = tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    m = ["-m", model]
    assert "no prompt: give PROMPT" in cli("generate", *m, stdin=None).error()
    assert "the prompt is empty" in cli("generate", *m, stdin=b"").error()
    assert "prompt 1 is empty" in cli("generate", "a", "", *m).error()
    assert "give only one of them" in cli("generate", "a", "--file", empty, *m).error()
    assert f"{empty}: there is no prompt in it" in cli("generate", "--file", empty, *m).error()
    assert "no-file" in cli("generate", "--file", tmp_path / "no-file", *m).error()
    assert f"{latin}: not UTF-8 at byte 3" in cli("generate", "--file", latin, *m).error()
    assert "stdin: not UTF-8 at byte 0" in cli("generate", *m, stdin=b"\xff").error()
    assert "prompt 1: the prompt has 300 tokens" in cli("generate", "a", "b" * 300, *m).error()


def test_the_packaged_model_is_the_default(cli, model, expected, monkeypatch):
    monkeypatch.setattr("jaxinfer.demo.MODEL_DIR", model)
    assert cli("generate", "one", *SHORT).out == line_of(expected, "one")


def test_a_reader_that_goes_away(endless):
    """`jaxinfer generate ... | head -c 10`"""
    command = [sys.executable, "-m", "jaxinfer", "generate", "x", "-m", str(endless), "--max-tokens", "9000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.wait(120) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [([], "\n"), (["a"], "a\n"), (["a\n"], "a\n"), (["a", "b", "c"], "abc\n"), (["a", "b\n"], "ab\n")],
)
def test_text_ends_its_line(capsys, pieces, printed):
    print_pieces(iter(pieces), Progress())
    assert capsys.readouterr() == (printed, "")


def test_what_was_printed_stays(capsys):
    def broken_off():
        yield "a"
        yield "b"
        assert capsys.readouterr().out == "ab"  # text is there at once
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_pieces(broken_off(), Progress())
    assert capsys.readouterr().out == "\n"


def test_answers_stand_below_their_prompts(cli, model):
    """Also where the second one is done first."""
    options = ["-m", model, "--max-tokens", "40", "--json", "--temperature", "0"]
    first, second = (json.loads(cli("generate", prompt, *options).out)["text"] for prompt in ("one", "two words"))
    stop = next(character for character in second if character not in first)  # ends the second one alone
    printed = cli("generate", "one", "two words", *options, "--stop", stop).out
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two words"]
    assert [record["text"] for record in records] == [first, second[: second.index(stop)]]
