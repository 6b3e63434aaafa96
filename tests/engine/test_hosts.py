"""One model on two processes, four simulated devices each, over loopback: as on one."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.convert import convert
from tests.adapters import write_adapter
from tests.devices import simulated
from tests.distributed.test_rendezvous import free_port
from tests.engine.test_sharded import OPTIONS, wide  # noqa: F401  (a fixture)

SECONDS = 240  # far more than anything takes, even on a busy machine
SPLIT = OPTIONS | {"mesh": "tensor=8"}

PROMPTS = [[1, 5, 9], list(range(2, 45)), [7] * 9]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0.9, top_k=20, seed=1, max_tokens=8, logprobs=2, structured_outputs={"regex": "[a-z ]+"}
    ),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=8, logit_bias={300: 4.0}),
]


class Hosts:
    """Processes that run the same program."""

    def __init__(self, *commands, devices=4):
        environment = os.environ | {"XLA_FLAGS": simulated(devices)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for command in commands
        ]

    @classmethod
    def of(cls, folder, what, *options):
        port = free_port()
        return cls(
            *(
                ("-m", "tests.engine.host", port, len(options), rank, folder, json.dumps(own), what)
                for rank, own in enumerate(options)
            )
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def line(self):
        """The next result of process 0."""
        for line in self.processes[0].stdout:
            if line.startswith(("{", "[[", '"')):  # and not what XLA:CPU's connections say there
                return json.loads(line)
        raise AssertionError(self.processes[0].communicate())

    def end(self, rank):
        """(exit code, results, stderr)"""
        process = self.processes[rank]
        out, err = process.communicate(timeout=SECONDS)
        results = []
        for line in out.splitlines():
            try:
                result = json.loads(line)
                if not isinstance(result, int):  # a piece of what Gloo's threads say at once
                    results.append(result)
            except ValueError:
                assert not line or "Gloo" in line or "peer ranks" in line
        return process.returncode, results, err


@pytest.mark.slow
def test_the_same_tokens_and_half_of_the_weights(wide):  # noqa: F811
    with LLM(wide, **OPTIONS) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        (scored,) = llm.score([PROMPTS[1]], use_tqdm=False)
    with Hosts.of(wide, "interrupted", SPLIT, SPLIT) as hosts:
        read = hosts.line()
        assert hosts.line() == tokens
        assert hosts.line() == "waiting"
        hosts.processes[0].send_signal(signal.SIGINT)
        code, (again, logprob, refused), err = hosts.end(0)
        assert (code, again) == (0, tokens), err
        assert logprob == pytest.approx(scored.logprob, abs=1e-4)
        assert refused == "there was an LLM in this program already: on several hosts it can have one"
        code, (also_read,), err = hosts.end(1)  # nothing else happens there
        assert code == 0, err
        for counts in (read, also_read):
            assert 0.45 < counts["read"] / counts["of"] < 0.55, (read, also_read)  # what is padding is not read


@pytest.mark.slow
def test_adapters(wide, tmp_path):  # noqa: F811
    """The other host is sent what is put into slots, and reads no adapter."""
    own = {name: write_adapter(tmp_path / name, wide, seed=i, dora=not i) for i, name in enumerate("xy")}
    with LLM(wide, adapters=own, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, adapter=["x", "y", None], use_tqdm=False)
        tokens = [output.outputs[0].token_ids for output in outputs]
    adapters = {name: str(folder) for name, folder in own.items()}
    with Hosts.of(wide, "once", *[SPLIT | {"adapters": adapters}] * 2) as hosts:
        code, results, err = hosts.end(0)
        assert (code, results[1]) == (0, tokens), err
        assert hosts.end(1)[0] == 0


@pytest.mark.slow
def test_a_converted_checkpoint(wide, tmp_path):  # noqa: F811
    """Each process restores its part of what one process has written."""
    convert(wide, tmp_path / "int8", quantization="int8", show_progress=False)
    with LLM(wide, **OPTIONS, quantization="int8") as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    with Hosts.of(tmp_path / "int8", "once", SPLIT, SPLIT) as hosts:
        code, results, err = hosts.end(0)
        assert (code, results[1]) == (0, tokens), err
        assert hosts.end(1)[0] == 0


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("data=8", marks=pytest.mark.long),
    ],
)
def test_rows_on_both_hosts(wide, mesh):  # noqa: F811
    """Each shard of rows says what its prompts' tokens are, whichever host it is on. Each host has all weights."""
    options = OPTIONS | {"mesh": mesh, "max_num_seqs": 8}
    prompts = [[*prompt, n] for n in range(3) for prompt in PROMPTS]
    with LLM(wide, **OPTIONS) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS * 3, use_tqdm=False)]
        (scored,) = llm.score([prompts[1]], use_tqdm=False)
    with Hosts.of(wide, "many", options, options) as hosts:
        code, (read, token_ids, logprob), err = hosts.end(0)
        assert (code, token_ids) == (0, tokens), err
        assert logprob == pytest.approx(scored.logprob, abs=1e-4)
        code, (also_read,), err = hosts.end(1)
        assert code == 0, err
        assert read["read"] == also_read["read"] > 0.9 * read["of"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_other(wide, victim):  # noqa: F811
    with Hosts.of(wide, "forever", SPLIT, SPLIT) as hosts:
        hosts.line(), hosts.line()
        hosts.processes[victim].kill()
        code, _, err = hosts.end(1 - victim)
        assert code == 3
        assert err.splitlines()[-1] == (
            f"jaxinfer: error: process {1 - victim} of 2: process {victim} of 2, at 127.0.0.1, is lost: the connection "
            "was closed. Without it the others can't go on; start the program again on every host"
        )
        assert "Traceback" not in err
        assert "***" not in err  # of a crash in C++


def test_options_that_differ(wide):  # noqa: F811
    with Hosts.of(wide, "once", SPLIT, SPLIT | {"page_size": 16}) as hosts:
        for rank in (0, 1):
            code, _, err = hosts.end(rank)
            assert code == 1, err
            assert "ValueError: option page_size is 16 in process 1 and 8 in process 0: all hosts need the same" in err


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            "tensor=4",
            "mesh is 'tensor=4': it has devices of 1 processes, and all 2 need some; 8 devices are there in all",
        ),
        pytest.param("tensor=16", "it needs 16 devices and there are 8", marks=pytest.mark.slow),
    ],
)
def test_meshes_that_can_not_be(wide, mesh, message):  # noqa: F811
    options = OPTIONS | {"mesh": mesh}
    with Hosts.of(wide, "once", options, options) as hosts:
        for rank in (0, 1):
            code, _, err = hosts.end(rank)
            assert code == 1, err
            assert message in err


@pytest.mark.slow
def test_an_async_engine(wide):  # noqa: F811
    with LLM(wide, **OPTIONS) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate([[1, 5, 9]], params, use_tqdm=False)
    with Hosts.of(wide, "async", SPLIT | {"warmup": True}, SPLIT | {"warmup": True}) as hosts:
        code, results, err = hosts.end(0)
        assert code == 0, err
        _, tokens = results
        assert tokens == output.outputs[0].token_ids
        assert hosts.end(1)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_both(wide, number):  # noqa: F811
    with Hosts.of(wide, "forever", SPLIT, SPLIT) as hosts:
        hosts.line(), hosts.line()
        hosts.processes[0].send_signal(number)
        assert hosts.end(0)[0] == -number
        assert hosts.end(1)[0] == (0 if number == signal.SIGINT else 3)  # Python ends as always after Ctrl-C


def commands(*arguments):
    """The same command on two hosts."""
    port = free_port()
    where = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id")
    return [("-m", "jaxinfer", *arguments, *where, rank) for rank in (0, 1)]


LOADED = ("--mesh", "tensor=8", "--max-model-len", 64)


@pytest.mark.slow
def test_the_command_line(wide, cli):  # noqa: F811
    """Only process 0 prints, and on stdout only results."""
    asked = ("generate", "--model", wide, "--json", "--max-tokens", 6, "--temperature", 0, "Hello")
    expected = json.loads(cli(*asked, "--max-model-len", 64).out)
    with Hosts(*commands(*asked, *LOADED)) as hosts:
        out, err = hosts.processes[0].communicate(timeout=SECONDS)
        assert hosts.processes[0].returncode == 0, err
        assert json.loads(out)["token_ids"] == expected["token_ids"]
        out, err = hosts.processes[1].communicate(timeout=SECONDS)
        assert (hosts.processes[1].returncode, out) == (0, ""), err


@pytest.mark.slow
def test_compiled_ahead_for_both(wide, cli, tmp_path, monkeypatch):  # noqa: F811
    """By both together, of which process 0 writes; then neither compiles anything, and the tokens are the same."""
    asked = ("generate", "--model", wide, "--json", "--max-tokens", 6, "--temperature", 0, "Hello")
    expected = json.loads(cli(*asked, "--max-model-len", 64).out)
    out = tmp_path / "programs"
    few = ("--max-num-seqs", 2, "--max-num-batched-tokens", 32)
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "off")
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    with Hosts(*commands("compile", wide, *LOADED, *few, "--json", "-o", out)) as hosts:
        (code, (done,), err), follower = hosts.end(0), hosts.end(1)
        assert (code, done["programs"]) == (0, len(list(out.glob("*.xla")))), err
        assert follower[:2] == (0, []), follower
        assert "Compiling" in err  # what is counted below
    with Hosts(*commands(*asked, "--compiled", out)) as hosts:
        (code, (record,), err), follower = hosts.end(0), hosts.end(1)
        assert (code, record["token_ids"]) == (0, expected["token_ids"]), err
        assert follower[:2] == (0, []), follower
        for log in (err, follower[2]):
            assert "Compiling" not in log
            assert "not used" not in log
    first, (*second,) = commands(*asked, "--compiled", out)
    second[second.index(out)] = shutil.copytree(out, tmp_path / "copy")
    (second[second.index(tmp_path / "copy")] / "manifest.json").write_text("{}")
    with Hosts(first, second) as hosts:
        for rank in (0, 1):
            code, _, err = hosts.end(rank)
            assert code == 2, err
            assert "the digest of the compiled programs that are used is None in process 1 and '" in err


@pytest.mark.slow
def test_a_batch_job(wide, tmp_path):  # noqa: F811
    """Process 0 reads and writes all of it, and the second time nothing is to be done."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Hello {n}"}) + "\n" for n in range(5)))
    for _ in range(2):
        asked = ("batch", rows, "--output", tmp_path / "out.jsonl", "--model", wide, "--max-tokens", 3)
        with Hosts(*commands(*asked, *LOADED, "--max-num-seqs", 4)) as hosts:
            out, err = hosts.processes[0].communicate(timeout=SECONDS)
            summary = json.loads(out)
            assert (summary["complete"], summary["rows"], summary["errors"]) == (True, 5, 0), err
            assert hosts.processes[1].wait(SECONDS) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_score_and_chat(wide, tmp_path):  # noqa: F811
    texts = tmp_path / "texts.txt"
    texts.write_text("Hello\n")
    for asked in (
        ("score", texts, "--json", *LOADED),
        ("chat", *LOADED),
    ):
        with Hosts(*commands(*asked, "--model", wide)) as hosts:
            out, err = hosts.processes[0].communicate(timeout=SECONDS)
            assert hosts.processes[0].returncode == 0, err
            assert (asked[0] == "chat") == (not out)
            assert hosts.processes[1].wait(SECONDS) == 0


def test_lm_eval_takes_the_options_of_hosts(cli):
    pytest.importorskip("lm_eval")
    message = "process_id is 2: with num_processes 2 it must be from 0 to 1"
    hosts = ("--coordinator", "here:1", "--num-processes=2", "--process-id", 2)
    assert cli("lm-eval", "--tasks", "t", *hosts, "--model_args", "pretrained=x").error() == message
    assert "num_processes is 'two': it must be" in cli("lm-eval", *hosts, "--num-processes", "two").error()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coordinator", "here:1"), "num_processes is missing: give coordinator, num_processes and process_id"),
        (("--coordinator", "here"), "num_processes is missing"),
        (("--num-processes", 2, "--process-id", 1), "coordinator is missing"),
        (("--coordinator", "here:1", "--num-processes", 2, "--process-id", 2), "process_id is 2: with num_processes 2"),
        (("--coordinator", "auto"), "--coordinator auto: JAX finds no other hosts from here"),
    ],
)
def test_hosts_that_can_not_be(cli, options, message):
    assert message in cli("generate", "Hello", *options).error()
