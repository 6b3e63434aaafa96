"""Adapters beside the weights: what peft makes of them, and the same in any company."""

import gc
import json
import shutil

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.adapters import AdapterSlots
from jaxinfer.errors import RequestError
from tests.adapters import write_adapter

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": 64}
NAMES = ("a", "b", "c", "none")


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    """Three adapters of the tiny Llama, one of them DoRA's."""
    base, folder = checkpoints("llama").folder, tmp_path_factory.mktemp("adapters")
    options = {"a": {}, "b": {"rank": 2, "targets": ("q_proj", "down_proj")}, "c": {"dora": True}}
    return {name: write_adapter(folder / name, base, seed=i, **options[name]) for i, name in enumerate(options)}


def requests(count=24):
    random = np.random.default_rng(3)
    beginnings = [random.integers(3, 250, 20).tolist() for _ in range(2)]
    made = []
    for i in range(count):
        prompt = beginnings[i % 2][: int(random.integers(8, 21))] + random.integers(3, 250, i % 5).tolist()
        params = {"temperature": 0.0} if i % 3 else {"temperature": 0.8, "seed": i}
        made.append((prompt, SamplingParams(max_tokens=int(random.integers(4, 20)), ignore_eos=True, **params)))
    return made


def adapter_of(i):
    return None if NAMES[i % 4] == "none" else NAMES[i % 4]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(checkpoints, folders):
    """Of each request what it gives alone."""
    with LLM(checkpoints("llama").folder, adapters=folders, enable_prefix_caching=False, **OPTIONS) as llm:
        return [tokens(llm.generate(p, s, adapter=adapter_of(i)))[0] for i, (p, s) in enumerate(requests())]


CASES = {
    "slots for all": {},
    "slots for two, preempted": {"max_adapters": 2, "kv_cache_memory": 26 * 1024},
    "tensor": {"mesh": "tensor=2"},
    "data": {"mesh": "data=2", "max_adapters": 2},
    "fsdp": {"mesh": "fsdp=2,tensor=2"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "mesh" in CASES[case] else ()) for case in CASES]
)
def test_the_same_tokens_as_alone(checkpoints, folders, alone, case):
    made = requests()
    order = np.random.default_rng(1).permutation(len(made)).tolist()
    with LLM(checkpoints("llama").folder, adapters=folders, **(OPTIONS | CASES[case])) as llm:
        kinds = []
        launch = llm.engine.runner.launch

        def watched(schedules):
            kinds.append({request.adapter_slot for schedule in schedules for request in schedule.requests})
            return launch(schedules)

        llm.engine.runner.launch = watched
        for _ in range(2):  # the second time all pages are known
            outputs = llm.generate(
                [made[i][0] for i in order], [made[i][1] for i in order], adapter=[adapter_of(i) for i in order]
            )
            assert tokens(outputs) == [alone[i] for i in order]
        assert any(len(slots) > 2 for slots in kinds), "rows of several adapters, and of none, in one call"
        assert llm.stats.hit_tokens > 50
        assert (llm.stats.preemptions > 0) == ("preempted" in case)
        loads = llm.engine.scheduler.adapters.loads
        assert loads > 3 if "max_adapters" in CASES[case] else loads == 3


def test_each_adapter_differs(alone):
    """An adapter that is ignored, or another's, would be seen."""
    made = requests()
    same = [(i, j) for i, (p, s) in enumerate(made) for j, (q, t) in enumerate(made) if i < j and (p, s) == (q, t)]
    assert not same
    assert len({tuple(out) for out in alone}) > len(alone) - 3


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_over_dequantized_weights(checkpoints, folders, scheme, tmp_path):
    """QLoRA's meaning, of DoRA's lengths, too: the same as beside floats that are what quantized weights stand for."""
    from safetensors.numpy import load_file, save_file

    base = checkpoints("llama").folder
    prompt, params = requests()[0][0], SamplingParams(max_tokens=1, prompt_logprobs=5, temperature=0.0)

    def log_probs(llm):
        outputs = llm.generate([prompt] * 4, params, adapter=["a", "b", "c", None], use_tqdm=False)
        return [[p[token].logprob for p, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)] for o in outputs]

    with LLM(base, adapters=folders, quantization=scheme, dtype="float32", **OPTIONS) as llm:
        found = log_probs(llm)
        runner = llm.engine.runner
        weights = {name: runner.rows(name, range(runner.model.params[name].shape[0])) for name in llm.model.quantized}
    (tmp_path / "floats").mkdir()
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            save_file({**load_file(file), **weights}, tmp_path / "floats" / file.name, {"format": "pt"})
        else:
            (tmp_path / "floats" / file.name).write_bytes(file.read_bytes())
    with LLM(tmp_path / "floats", adapters=folders, dtype="float32", **OPTIONS) as llm:
        expected = log_probs(llm)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert all(np.abs(np.subtract(found[i], found[3])).max() > 0.05 for i in range(3))


def test_loaded_unloaded_and_replaced(checkpoints, folders, alone, tmp_path):
    base, made = checkpoints("llama").folder, requests()
    (prompt, params), (other, more) = made[0], made[1]
    with LLM(base, max_adapters=1, max_lora_rank=4, **OPTIONS) as llm:
        with pytest.raises(ValueError, match="adapter is 'a': there are none"):
            llm.generate(prompt, params, adapter="a")
        llm.load_adapter("a", folders["a"])
        llm.load_adapter("same", folders["a"])
        assert tokens(llm.generate(prompt, params, adapter="a"))[0] == alone[0]
        hits = llm.stats.hit_tokens
        assert tokens(llm.generate(prompt, params, adapter="same"))[0] == alone[0]
        assert llm.stats.hit_tokens > hits, "what has the same content shares pages"
        llm.load_adapter("a", folders["b"])  # another one under the same name
        hits = llm.stats.hit_tokens
        assert tokens(llm.generate(prompt, params, adapter="a"))[0] != alone[0]
        assert llm.stats.hit_tokens == hits
        assert tokens(llm.generate(other, more, adapter="a"))[0] == alone[1]
        # A request that runs keeps the one that it began with.
        stream = llm.engine.new_group(prompt, params, adapter="same")
        llm.unload_adapter("same")
        llm.engine_thread.complete([stream])
        assert stream.output().outputs[0].token_ids == alone[0]
        assert sorted(llm.list_adapters()) == ["a"]
        with pytest.raises(ValueError, match="adapter is 'same': there are a"):
            llm.generate(prompt, params, adapter="same")
        big = write_adapter(tmp_path / "big", base, rank=5)
        with pytest.raises(ValueError, match=r"is of rank 5, and max_lora_rank is 4: raise that"):
            llm.load_adapter("big", big)
        with pytest.raises(ValueError, match=r"changes lm_head.weight: load the model with adapted_vocabulary=True"):
            llm.load_adapter("head", write_adapter(tmp_path / "head", base, targets=("lm_head",)))
        for name in ("", "a\0", "x" * 201):
            with pytest.raises(ValueError, match="an adapter's name is"):
                llm.load_adapter(name, folders["a"])
        damaged = write_adapter(tmp_path / "damaged", base, scale=np.inf)
        with pytest.raises(ValueError, match=r"damaged: .*lora_A.weight has numbers that are not finite"):
            llm.load_adapter("damaged", damaged)
        config = tmp_path / "wider"
        config.mkdir()
        fields = json.loads((base / "config.json").read_text())
        (config / "config.json").write_text(json.dumps(fields | {"intermediate_size": 24, "num_hidden_layers": 9}))
        with pytest.raises(ValueError, match=r"is not an adapter of this model"):
            llm.load_adapter("wider", write_adapter(tmp_path / "of wider", config))


@pytest.mark.slow
def test_no_program_is_compiled_after_warm_up(checkpoints, folders):
    """And 200 that take turns in two slots leave nothing behind."""
    import jax

    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 32}
    with LLM(checkpoints("llama").folder, adapters=folders, warmup=True, max_adapters=2, **(OPTIONS | sizes)) as llm:
        before = llm.engine.runner.compilations
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        guided = SamplingParams(max_tokens=2, structured_outputs={"choice": ["a", "b"]})
        llm.generate([[5, 6, 7]] * 4, [params, guided, params, params], adapter=["a", "b", "c", None], use_tqdm=False)
        arrays = len(jax.live_arrays())
        for i in range(200):
            llm.generate([[5, 6, 7 + i % 9]], params, adapter=NAMES[i % 3], use_tqdm=False)
        assert llm.engine.scheduler.adapters.loads > 100
        assert llm.engine.runner.compilations == before
        assert len(jax.live_arrays()) <= arrays
        assert llm.stats.pages_used == 0


class Row:
    """As much of a request as slots look at."""

    def __init__(self, adapter):
        self.adapter, self.adapter_slot = adapter, -1


def test_most_in_the_hosts_memory(checkpoints, folders, alone, tmp_path):
    """Those asked for longest ago are read again, and nothing else is kept of them."""
    own = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    with LLM(checkpoints("llama").folder, adapters=own, max_adapters=2, max_host_adapters=1, **OPTIONS) as llm:
        assert llm.stats.adapter_reads == 3
        assert llm.engine.adapters.in_memory == 1
        assert sorted(llm.list_adapters()) == ["a", "b", "c"]
        prompts, params = zip(*requests(), strict=True)
        outputs = llm.generate(prompts, params, adapter=[adapter_of(i) for i in range(len(prompts))])
        assert tokens(outputs) == alone
        reads = llm.stats.adapter_reads
        assert 3 + 2 <= reads < 3 + 8, "those of requests that wait or run are there for others, too"
        gc.collect()
        assert llm.engine.adapters.in_memory == 1
        for i in (0, 1, 0):
            assert tokens(llm.generate(prompts[i], params[i], adapter=adapter_of(i)))[0] == alone[i]
        assert 2 <= llm.stats.adapter_reads - reads <= 3
        shutil.rmtree(own["b"])
        shutil.copytree(folders["a"], own["b"])
        with pytest.raises(RequestError, match=r"adapter 'b' is another one by now in .*: load it"):
            llm.generate(prompts[1], params[1], adapter="b")
        shutil.rmtree(own["b"])
        with pytest.raises(RequestError, match=r"adapter 'b' can't be read again: .*no such folder"):
            llm.generate(prompts[1], params[1], adapter="b")
        llm.unload_adapter("b")
        with pytest.raises(ValueError, match="adapter is 'b': there are a, c"):
            llm.generate(prompts[1], params[1], adapter="b")
        assert tokens(llm.generate(prompts[2], params[2], adapter="c"))[0] == alone[2]
    with pytest.raises(ValueError, match="max_host_adapters is 4, and there are no adapters"):
        LLM(checkpoints("llama").folder, max_host_adapters=4)


class Content:
    """As much of an adapter."""

    def __init__(self, digest):
        self.digest = digest


def test_slots():
    """Any order of holds and releases: rows of one slot have one adapter, and it was put there before they run."""
    random = np.random.default_rng(0)
    slots, running, there = AdapterSlots(3), [], {}
    adapters = [Content(bytes([i // 2])) for i in range(12)]  # of each two have the same content
    refused = 0
    for _ in range(3000):
        if running and random.random() < 0.45:
            slots.release(running.pop(int(random.integers(len(running)))))
        else:
            row = Row(adapters[int(random.integers(len(adapters)))])
            if slots.hold(row):
                running.append(row)
            else:
                refused += 1
                assert not slots.has_room(row)
                assert len({own.adapter_slot for own in running}) == 3
                assert row.adapter.digest not in {own.adapter.digest for own in running}
        there |= {slot: adapter.digest for slot, adapter in slots.coming()}
        assert all(there[own.adapter_slot] == own.adapter.digest for own in running)
        if random.random() < 0.05:
            slots.forget(adapters[int(random.integers(len(adapters)))].digest)
    assert refused > 100
    assert slots.loads > 300


# Of the bases that adapters of peft are made for which ones these are, in `tests.checkpoint.test_adapters`.
BASES = {"Llama": "LLAMA", "tied": "TIED", "biases": "BIASED", "GPT-2": "GPT2", "Qwen3-MoE": "QWEN"}
BASES |= {"gpt-oss": "GPT_OSS", "Mixtral": "MIXTRAL"}
# Whole tables, and routers: merged alone.
REFUSED = ("saved", "more tokens", "a router", "tied, saved head", "tied, saved embedding", "tied, both saved")
REFUSED = (*REFUSED, "tied, more tokens")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=() if base == "Qwen3-MoE" else pytest.mark.slow) for base in BASES]
)
def test_log_probabilities_of_peft(base, tmp_path):
    """Every feature of its format, in one batch with the others of its base."""
    pytest.importorskip("peft")
    from tests.checkpoint import test_adapters as peft

    model = getattr(peft, BASES[base])
    cases = {name: options for name, (own, options) in (peft.FEW | peft.MORE).items() if own is model}
    expected = {name: peft.made(tmp_path / name, model, options) for name, options in cases.items()}
    folder = tmp_path / next(iter(cases)) / "base"
    ids = peft.IDS[0].tolist()[:31]
    params = SamplingParams(max_tokens=1, prompt_logprobs=20, temperature=0.0)
    options = {"max_lora_rank": 8, "adapted_vocabulary": True, "skip_tokenizer_init": True, "max_model_len": 32}
    options |= {"adapted_experts": base in ("Qwen3-MoE", "gpt-oss", "Mixtral"), "dtype": "float32", "page_size": 8}
    with LLM(folder, max_adapters=4, **options) as llm:
        for name in cases:
            if name in REFUSED:
                with pytest.raises(ValueError, match=r"beside weights there are no .*: merge it, jaxinfer merge"):
                    llm.load_adapter(name, tmp_path / name / "adapter")
            else:
                llm.load_adapter(name, tmp_path / name / "adapter")
        names = [*llm.list_adapters(), None]
        assert len(names) > 1
        outputs = llm.generate([ids] * len(names), params, adapter=names, use_tqdm=False)
    of_base = peft.log_probs(peft.loaded(folder))
    for name, output in zip(names, outputs, strict=True):
        wanted = of_base if name is None else expected[name]
        steps = enumerate(output.prompt_logprobs[1:])
        error = max(abs(p.logprob - wanted[0, i, token]) for i, step in steps for token, p in step.items())
        assert error < 1e-5, (name, error)
        assert name is None or np.abs(wanted - of_base).max() > 0.01
