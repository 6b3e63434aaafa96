"""`LLM` on tiny checkpoints: the same text in any company, what ends it, what comes back, and what is left behind."""

import gc
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import LLM, Logprob, SamplingParams
from jaxinfer.kernels.cpu import multiplies
from tests.checkpoints import NEW_TOKENS, Reference, same_tokens
from tests.settled import settled

LONG = 40  # tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (3, 40, 1, 17, 90, 8)]


@pytest.fixture(scope="module")
def reference(checkpoints) -> Reference:
    return checkpoints("llama")


@pytest.fixture(scope="module")
def llm(reference):
    with LLM(reference.folder, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def cramped(reference):
    """Room for 39 pages of 4 tokens: rows that run together soon need more. Chunks of at most 16 tokens."""
    with LLM(
        reference.folder, max_num_seqs=4, page_size=4, kv_cache_memory=40 * 4 * 256, max_num_batched_tokens=16
    ) as llm:
        assert llm.sizes.num_pages == 40
        assert llm.sizes.max_model_len == 39 * 4
        yield llm


@pytest.fixture(scope="module")
def greedy(llm):
    """The greedy continuation of PROMPTS, each alone."""
    return [llm.generate(prompt, GREEDY)[0].outputs[0] for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """After each test all pages are free again, whatever happened in it."""
    yield
    for name in {"llm", "cramped"} & set(request.fixturenames):
        settled(request.getfixturevalue(name))


def variant(reference: Reference, folder: Path, **files: dict | None) -> Path:
    """The checkpoint with other JSON files; None removes one."""
    for file in reference.folder.iterdir():
        os.symlink(file, folder / file.name)
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    return folder


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def ids(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# --- the same tokens in any company


def test_greedy_is_transformers_alone_together_and_preempted(llm, cramped, reference):
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = reference.prompts * 2
    runs = [llm.generate(prompts, params), cramped.generate(prompts, params)]
    assert cramped.stats.preemptions > 0
    assert max(output.metrics.preemptions for output in runs[1]) > 0
    for outputs in runs:
        for output, expected, gaps in zip(
            outputs, reference.greedy * 2, [*reference.gaps, *reference.gaps], strict=True
        ):
            assert same_tokens(output.outputs[0].token_ids, expected, gaps)


def test_greedy_is_the_same_in_company(llm, cramped, greedy):
    expected = [output.token_ids for output in greedy]
    assert ids(llm.generate(PROMPTS, GREEDY)) == expected
    assert ids(llm.generate(PROMPTS[::-1], GREEDY)) == expected[::-1]
    assert ids(cramped.generate(PROMPTS, GREEDY)) == expected
    # Beside rows that sample, too.
    params = [GREEDY, SamplingParams(max_tokens=LONG, ignore_eos=True)] * 3
    assert ids(llm.generate(PROMPTS, params))[::2] == expected[::2]


def test_a_seed_gives_the_same_tokens_in_any_company(llm, cramped):
    params = [
        SamplingParams(temperature=1.2, seed=100 + i, max_tokens=LONG, ignore_eos=True, top_p=1 - i / 20, top_k=40 * i)
        for i in range(len(PROMPTS))
    ]
    alone = [ids(llm.generate(prompt, each))[0] for prompt, each in zip(PROMPTS, params, strict=True)]
    assert ids(llm.generate(PROMPTS, params)) == alone
    assert ids(llm.generate(PROMPTS[::-1], params[::-1])) == alone[::-1]
    before = cramped.stats.preemptions
    assert ids(cramped.generate(PROMPTS, params)) == alone
    assert cramped.stats.preemptions > before
    other = SamplingParams(temperature=1.2, seed=7, max_tokens=LONG, ignore_eos=True)
    assert ids(llm.generate(PROMPTS[0], other))[0] != alone[0]


def test_without_a_seed_each_request_draws_its_own_and_each_program_run_the_same(llm, reference):
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    def run(seed: int) -> list[list[int]]:
        with LLM(reference.folder, max_num_seqs=4, max_num_batched_tokens=64, seed=seed) as fresh:
            return ids(fresh.generate([PROMPTS[0]] * 4, params))

    first = run(0)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert run(0) == first
    assert run(1) != first


def test_twenty_prompts_of_all_kinds_come_back_in_their_order(llm):
    """More than there are rows, of different lengths, ending at different times."""
    prompts = [
        (PROMPTS[i % 6], {"prompt_token_ids": PROMPTS[i % 6]}, f"prompt number {i}", {"prompt": f"dict {i}"})[i % 4]
        for i in range(20)
    ]
    params = [
        SamplingParams(temperature=0.0 if i % 3 else 1.0, seed=i, max_tokens=1 + 7 * i % 23, ignore_eos=True)
        for i in range(20)
    ]
    outputs = llm.generate(prompts, params)
    alone = [llm.generate(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert ids(outputs) == ids(alone)
    assert [len(tokens) for tokens in ids(outputs)] == [each.max_tokens for each in params]
    assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in alone]


def test_each_output_comes_as_soon_as_it_and_those_before_are_done(llm, greedy, slowly):
    slowly(llm, 0.02)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (2, LONG)]
    outputs = llm.generate_iter(zip(PROMPTS[:2], params, strict=True), in_order=True)
    assert next(outputs).outputs[0].token_ids == greedy[0].token_ids[:2]
    assert llm.engine.scheduler.running
    assert next(outputs).outputs[0].token_ids == greedy[1].token_ids
    assert not list(outputs)


# --- what a prompt may be


def test_all_forms_of_a_prompt(llm):
    text = "An example."
    tokens = llm.tokenizer.encode(text)
    forms = [text, {"prompt": text}, tokens, tuple(tokens), np.array(tokens), {"prompt_token_ids": tokens}]
    outputs = [llm.generate(form, GREEDY)[0] for form in forms] + llm.generate(forms, GREEDY)
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert all(output.prompt_token_ids == tokens and output.finished for output in outputs)
    assert [output.prompt for output in outputs] == [text, text, None, None, None, None] * 2
    assert llm.generate([], GREEDY) == []


def test_chat_applies_the_checkpoints_template(llm):
    messages = [{"role": "user", "content": "Hello?"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == llm.tokenizer.encode("user: Hello?\nassistant:")
    assert output.outputs[0].text == texts(llm.generate("user: Hello?\nassistant:", GREEDY))[0]
    other = [{"role": "user", "content": "And?"}]
    assert texts(llm.chat([messages, other], GREEDY)) == texts(llm.chat(messages, GREEDY) + llm.chat(other, GREEDY))


def test_one_bad_prompt_among_good_ones_starts_nothing(llm):
    with pytest.raises(ValueError, match="prompt 1: the prompt has token id 300"):
        llm.generate([[1, 2], [300]], GREEDY)
    with pytest.raises(ValueError, match="sampling_params: 1 for 2 prompts"):
        llm.generate([[1, 2], [3]], [GREEDY])


# --- what ends a text


def test_stop_strings_cut_the_text_and_never_leak(llm, greedy):
    """Stop strings of one to three characters from all over the text, at once and streamed."""
    full = greedy[0]
    spans = [full.text[start : start + length] for start in range(len(full.text)) for length in (1, 2, 3)]
    whole = [span for span in dict.fromkeys(spans) if "\ufffd" not in span]  # what random bytes decode to
    assert len(whole) > 12
    for stop in whole[::2]:
        for include in (False, True):
            end = full.text.find(stop) + (len(stop) if include else 0)
            params = SamplingParams(
                temperature=0.0,
                max_tokens=LONG,
                ignore_eos=True,
                stop=["never found", stop],
                include_stop_str_in_output=include,
            )
            output = llm.generate(PROMPTS[0], params)[0].outputs[0]
            assert output.text == full.text[:end]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
            # The tokens go as far as the stop string: what was sampled after it in the same call is dropped.
            count = len(output.token_ids)
            assert output.token_ids == full.token_ids[:count]
            assert stop in llm.tokenizer.decode(output.token_ids)
            assert stop not in llm.tokenizer.decode(output.token_ids[:-1])
            pieces = list(llm.stream(PROMPTS[0], params))
            assert "".join(pieces) == output.text
            assert all(pieces)


def test_what_only_begins_like_a_stop_string_is_released_at_the_end(llm, greedy):
    full = greedy[0]
    params = SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True, stop=full.text[-2:] + "...")
    output = llm.generate(PROMPTS[0], params)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (full.text, "length", None)
    assert "".join(llm.stream(PROMPTS[0], params)) == full.text


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_text_and_stays_among_the_ids(llm, greedy, include):
    full = greedy[1].token_ids
    token = next(t for t in full[5:] if t < 256 and full.index(t) >= 5)
    end = full.index(token)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=LONG,
        ignore_eos=True,
        stop_token_ids=[299, token],
        include_stop_str_in_output=include,
    )
    output = llm.generate(PROMPTS[1], params)[0].outputs[0]
    assert output.token_ids == full[: end + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.text == llm.tokenizer.decode(full[: end + include])


def eos_variant(reference, tmp_path, generation=None, config=None) -> LLM:
    written = json.loads((reference.folder / "config.json").read_text()) | (config or {})
    folder = variant(reference, tmp_path, config=written, generation_config=generation)
    return LLM(folder, max_num_seqs=4, max_num_batched_tokens=64)


def test_every_eos_id_of_the_generation_config_ends_the_text(reference, tmp_path, greedy):
    full = [output.token_ids for output in greedy[:2]]
    ends = [full[0][6], full[1][11]]
    generation = {"eos_token_id": [299, *ends]}
    with eos_variant(reference, tmp_path, generation, {"eos_token_id": full[0][0]}) as llm:
        outputs = llm.generate(PROMPTS[:2], SamplingParams(temperature=0.0, max_tokens=LONG))
        for output, tokens in zip(outputs, full, strict=True):
            first = min(tokens.index(end) for end in ends if end in tokens)
            assert output.outputs[0].token_ids == tokens[: first + 1]
            assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
            assert output.outputs[0].text == llm.tokenizer.decode(tokens[:first])
        assert ids(llm.generate(PROMPTS[:2], GREEDY)) == full  # ignore_eos


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": None}, (256,)),  # the tokenizer's
        (None, {"eos_token_id": 5}, (5,)),
        ({"do_sample": False}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (7,)),
    ],
)
def test_where_the_eos_id_comes_from(reference, tmp_path, generation, config, expected):
    with eos_variant(reference, tmp_path, generation, config) as llm:
        assert llm.engine.eos_token_ids == expected


def test_nothing_stops_before_min_tokens(llm, greedy):
    full = greedy[0]
    token = full.token_ids[2]
    for extra in ({"stop_token_ids": [token]}, {"stop": full.text[0]}):
        params = SamplingParams(temperature=0.0, max_tokens=LONG, min_tokens=20, ignore_eos=True, **extra)
        output = llm.generate(PROMPTS[0], params)[0].outputs[0]
        assert len(output.token_ids) >= 20
        if "stop" in extra:
            assert output.token_ids == full.token_ids[: len(output.token_ids)]
            assert output.text.startswith(full.text[0])
        else:
            assert token not in output.token_ids[:20]
            assert output.token_ids[:2] == full.token_ids[:2]


def test_max_tokens_none_goes_to_the_end_of_the_context(llm, reference):
    prompt = np.random.default_rng(1).integers(0, 256, 240).tolist()
    for params in (
        SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True),
    ):
        (output,) = llm.generate(prompt, params)
        assert len(output.outputs[0].token_ids) == 256 - 240
        assert output.outputs[0].finish_reason == "length"
    whole = llm.generate(prompt + [1] * 15, GREEDY)[0].outputs[0]
    assert len(whole.token_ids) == 1


# --- what comes back


def test_logprobs_are_the_models(llm, reference, greedy):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(reference.folder).eval()
    params = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5),
        SamplingParams(temperature=1.5, seed=1, top_k=50, max_tokens=6, ignore_eos=True, logprobs=0),
        GREEDY,
        SamplingParams(temperature=2.0, seed=2, max_tokens=6, ignore_eos=True, logprobs=20, min_tokens=6),
    ]
    for output, each in zip(llm.generate(PROMPTS[:4], params), params, strict=True):
        completion = output.outputs[0]
        if each.logprobs is None:
            assert completion.logprobs is None
            assert completion.cumulative_logprob is None
            continue
        tokens = output.prompt_token_ids + completion.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, len(output.prompt_token_ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1).numpy()
        assert len(completion.logprobs) == len(completion.token_ids) == 6
        total = 0.0
        for token, entry, values in zip(completion.token_ids, completion.logprobs, expected, strict=True):
            assert next(iter(entry)) == token
            assert len(entry) in (each.logprobs, each.logprobs + 1)
            assert {*np.argsort(-values)[: each.logprobs].tolist(), token} == set(entry)
            for i, logprob in entry.items():
                assert isinstance(logprob, Logprob)
                assert math.isclose(logprob.logprob, values[i], abs_tol=2e-4)
                assert logprob.rank == 1 + (values > values[i]).sum()
                assert logprob.decoded_token == llm.tokenizer.decode([i], skip_special_tokens=False)
            total += entry[token].logprob
        assert math.isclose(completion.cumulative_logprob, total, abs_tol=1e-6)
    # Asking changes nothing.
    assert completion.token_ids != greedy[3].token_ids[:6]
    again = llm.generate(PROMPTS[0], params[0])[0].outputs[0]
    assert again.token_ids == greedy[0].token_ids[:6]


def test_logprobs_survive_preemption(llm, cramped):
    params = SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True, logprobs=2)
    before = cramped.stats.preemptions
    outputs = cramped.generate(PROMPTS, params)
    assert cramped.stats.preemptions > before
    for output, other in zip(outputs, llm.generate(PROMPTS, params), strict=True):
        for a, b in zip(output.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert a.keys() == b.keys()
            assert all(math.isclose(a[i].logprob, b[i].logprob, abs_tol=1e-4) for i in a)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision(llm, reference, dtype):
    """Weights and cache in 16 bits, and activations too where there is no kernel for float32 with such weights, give
    nearly the same probabilities."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=10)
    prompt = reference.prompts[1]
    with LLM(reference.folder, dtype=dtype, max_num_seqs=1, max_num_batched_tokens=16) as low:
        runner = low.engine.runner
        assert {array.dtype for array in runner.params.values() if array.ndim > 1} == {np.dtype(dtype)}
        assert runner.programs.model.dtype == ("float32" if multiplies("float32", dtype) else dtype)
        assert runner.programs.layout.dtype == dtype
        assert {pool.dtype.itemsize for pool in jax.tree.leaves(runner.state.cache)} == {2}
        ours = low.generate(prompt, params)[0].outputs[0]
    exact = llm.generate(prompt, params)[0].outputs[0]
    assert ours.token_ids[0] == exact.token_ids[0]
    shared = ours.logprobs[0].keys() & exact.logprobs[0].keys()
    assert len(shared) >= 8
    assert all(abs(ours.logprobs[0][i].logprob - exact.logprobs[0][i].logprob) < 0.3 for i in shared)


def test_metrics(llm):
    (output,) = llm.generate(PROMPTS[0], GREEDY)
    assert 0 < output.metrics.time_to_first_token <= output.metrics.total
    assert llm.stats.prefill_tokens > 0
    assert llm.stats.decode_tokens_per_second > 0


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, SamplingParams(temperature=0.0)),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams(temperature=0.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": None}, SamplingParams(temperature=0.6)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_new_tokens": 7},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, max_tokens=7),
        ),
    ],
)
def test_default_sampling_is_the_checkpoints(reference, tmp_path, generation, expected):
    with LLM(variant(reference, tmp_path, generation_config=generation)) as llm:
        assert llm.get_default_sampling_params() == expected


def test_without_params_the_defaults_are_taken(llm, greedy):
    output = llm.generate(PROMPTS[0])[0].outputs[0]
    assert output.token_ids == greedy[0].token_ids[: len(output.token_ids)]
    assert len(output.token_ids) == 16  # as in vLLM


# --- streams


def test_streams_give_exactly_the_text_in_whole_characters(llm, greedy):
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        pieces = list(llm.stream(prompt, GREEDY))
        assert "".join(pieces) == expected.text
        assert all(pieces)
    outputs = [output for _, output in llm.stream_output(PROMPTS[0], GREEDY)]
    assert len(outputs) > 1
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].token_ids == greedy[0].token_ids


def test_two_streams_take_turns(llm, greedy):
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    received = ["", ""]
    while any(streams):
        for i, stream in enumerate(streams):
            piece = next(stream, None) if stream else None
            if piece is None:
                streams[i] = None
            else:
                received[i] += piece
    assert received == [output.text for output in greedy[:2]]


@pytest.mark.parametrize("started", [False, True])
def test_a_stream_loses_nothing_to_a_call_in_between(llm, greedy, started):
    stream = llm.stream(PROMPTS[0], GREEDY)
    received = next(stream) if started else ""
    assert ids(llm.generate(PROMPTS[1:3], GREEDY)) == [output.token_ids for output in greedy[1:3]]
    assert received + "".join(stream) == greedy[0].text


@pytest.mark.parametrize("started", [False, True])
def test_an_abandoned_stream_leaves_nothing_behind(llm, started):
    stream = llm.stream(PROMPTS[0], GREEDY)
    if started:
        next(stream)
    del stream
    settled(llm)


def test_a_bad_prompt_is_refused_when_the_stream_is_made(llm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.stream("")


# --- what is left behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_error_in_the_middle_leaves_no_rows(llm, greedy, monkeypatch, error, after):
    run = llm.engine.runner.launch
    calls = iter(range(100))

    def fails(schedule):
        if next(calls) == after:
            raise error("in the middle")
        return run(schedule)

    monkeypatch.setattr(llm.engine.runner, "launch", fails)
    with pytest.raises(error):
        llm.generate(PROMPTS[:2], GREEDY)
    assert not llm.engine.scheduler.running
    monkeypatch.undo()
    assert ids(llm.generate(PROMPTS[:2], GREEDY)) == [output.token_ids for output in greedy[:2]]


def test_nothing_compiles_a_second_time(llm):
    params = [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, top_k=10, logprobs=3, max_tokens=9), GREEDY]
    llm.generate(PROMPTS[:3], params)
    list(llm.stream(PROMPTS[0], GREEDY))
    before, seconds = llm.engine.runner.compilations, llm.compile_seconds
    params = [SamplingParams(min_p=0.2, seed=3, stop="x", max_tokens=20), GREEDY, SamplingParams(temperature=0.0)]
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    llm.generate([prompt[::-1] for prompt in PROMPTS[:3]], params)
    list(llm.stream(PROMPTS[0], params[0]))
    assert not [event for event in events if "compile" in event]
    jax.jit(lambda x: x * 3)(np.float32(1))
    assert [event for event in events if "compile" in event]  # it would have been seen
    assert (llm.engine.runner.compilations, llm.compile_seconds) == (before, seconds)


def test_the_cache_is_written_in_place(llm):
    def buffers():
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(llm.engine.runner.state)]

    old, before = llm.engine.runner.state, buffers()
    arrays = len(jax.live_arrays())
    llm.generate(PROMPTS, GREEDY)
    assert buffers() == before
    assert all(array.is_deleted() for array in jax.tree.leaves(old))
    assert len(jax.live_arrays()) == arrays


def test_close_frees_weights_and_cache(reference):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    llm = LLM(reference.folder, max_num_seqs=4, max_num_batched_tokens=64)
    output = llm.generate(PROMPTS[0], GREEDY)
    assert {id(array) for array in jax.live_arrays()} - before
    llm.close()
    llm.close()
    assert not {id(array) for array in jax.live_arrays()} - before
    assert len(output[0].outputs[0].token_ids) == LONG
    for use in (lambda: llm.generate("a"), lambda: llm.stream("a"), lambda: llm.stats):
        with pytest.raises(ValueError, match="this LLM was closed: load it again"):
            use()
