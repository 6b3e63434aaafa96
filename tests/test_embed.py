"""`LLM.embed` against transformers: vectors of whole texts, alone, in company, and over a mesh."""

import json
import shutil
import threading

import numpy as np
import pytest

import jaxinfer
from jaxinfer import LLM, RequestError, UnsupportedError
from jaxinfer.errors import CheckpointError, ContextLengthError, EngineClosed
from tests.checkpoints import building
from tests.models.families import Variant
from tests.models.references import error, found_or_made, random_model
from tests.refusals import line

TOLERANCE = 1e-5
RNG = np.random.default_rng(0)
TEXTS = [
    "a",
    "Hello there.",
    "x" * 70,
    "two\nlines",
    *("".join(map(chr, RNG.integers(97, 123, n))) for n in range(3, 120, 9)),
]
POOLINGS = {"bert": "mean", "modernbert": "cls", "qwen3": "lasttoken"}
END = 256  # what ends a text
FIELDS = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
KINDS = {
    "bert": ("BertConfig", "AutoModel", {}),
    "modernbert": (
        "ModernBertConfig",
        "AutoModel",
        {"local_attention": 16, "pad_token_id": 0, "cls_token_id": None, "sep_token_id": None},
    ),
    "qwen3": ("Qwen3Config", "AutoModelForCausalLM", {"num_key_value_heads": 2, "head_dim": 32}),
}


def tokenizer(folder):
    """Bytes, and the end behind each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.post_processor = processors.TemplateProcessing("$A <end>", "$A <end> $B:1 <end>:1", [("<end>", END)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )


def make(kind):
    """A folder of sentence-transformers, with the hidden states of TEXTS as transformers has them."""

    def made(folder):
        import torch

        config, auto, more = KINDS[kind]
        model = random_model(Variant(config, FIELDS | more, auto=auto), 0.2, 0.2)
        with building(folder) as own:
            model.save_pretrained(own)
            tokenizer(own)
            ids = [[*ours(text), END] for text in TEXTS]
            with torch.no_grad():
                hidden = [model.base_model(torch.tensor([row])).last_hidden_state[0].numpy() for row in ids]
            np.savez(own / "reference.npz", *hidden)
            modules = ["Transformer", "Pooling", "Normalize"]
            entries = [
                {"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
                for i, name in enumerate(modules)
            ]
            (own / "modules.json").write_text(json.dumps(entries))
            (own / "1_Pooling").mkdir()
            (own / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": POOLINGS[kind]}))
            said = {"prompts": {"query": "query: "}, "similarity_fn_name": "cosine"}
            (own / "config_sentence_transformers.json").write_text(json.dumps(said))

    return made


def ours(text):
    from tokenizers import pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet[c] for c in "".join(part for part, _ in encoded)]


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {kind: found_or_made(checkpoints.root / "sentences", kind, "large", make(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def llms(folders):
    loaded = {kind: LLM(folder, max_num_batched_tokens=256) for kind, folder in folders.items()}
    yield loaded
    for llm in loaded.values():
        llm.close()


@pytest.fixture(scope="module")
def bert(llms):
    return llms["bert"]


def expected(folder, kind):
    """Vectors, pooled here."""
    hidden = np.load(folder / "reference.npz")
    pool = {"mean": lambda x: x.mean(axis=0), "cls": lambda x: x[0], "lasttoken": lambda x: x[-1]}[POOLINGS[kind]]
    vectors = np.stack([pool(hidden[f"arr_{i}"]) for i in range(len(TEXTS))])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors(llm, texts=TEXTS, **options):
    outputs = llm.embed(texts, use_tqdm=False, **options)
    assert [output.index for output in outputs] == list(range(len(outputs)))
    return np.stack([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers(folders, llms, kind):
    got = vectors(llms[kind])
    assert got.dtype == np.float32
    assert error(got, expected(folders[kind], kind)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_alone_as_in_company(llms, kind):
    together = vectors(llms[kind])
    alone = np.stack([vectors(llms[kind], text)[0] for text in TEXTS])
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(vectors(llms[kind], TEXTS[::-1])[::-1], together)


def test_nothing_compiles_after_a_warm_up(folders, llms):
    with LLM(folders["bert"], max_num_batched_tokens=64, warmup=True) as llm:
        engine = llm._pooling
        assert len(engine._executables) == len(engine.programs.sizes) == 4
        before = engine.compile_seconds
        np.testing.assert_array_equal(vectors(llm), vectors(llms["bert"]))
        assert engine.compile_seconds == before
        stats = llm.stats
        assert stats.finished == len(TEXTS)
        assert stats.prefill_tokens == sum(len(text.encode()) + 1 for text in TEXTS)
        assert stats.calls >= stats.prefill_tokens / 160


@pytest.mark.parametrize("mesh", ["data=4,tensor=2", "fsdp=8"])
def test_over_devices(folders, llms, mesh):
    with LLM(folders["qwen3"], mesh=mesh, max_num_batched_tokens=512) as llm:
        assert error(vectors(llm), vectors(llms["qwen3"])) < TOLERANCE


@pytest.mark.parametrize("mesh", ["data=4,tensor=2", "fsdp=8"])
def test_an_encoder_over_devices(folders, bert, mesh):
    with LLM(folders["bert"], mesh=mesh, max_num_batched_tokens=512) as llm:
        assert error(vectors(llm), vectors(bert)) < TOLERANCE


def test_token_ids_and_dicts(bert):
    expected = vectors(bert, TEXTS[:2])
    ids = [[*ours(text), END] for text in TEXTS[:2]]
    for given in (ids, [{"prompt": text} for text in TEXTS[:2]], [{"prompt_token_ids": row} for row in ids]):
        np.testing.assert_array_equal(vectors(bert, given), expected)
    output = bert.embed(ids[0], use_tqdm=False)[0]
    assert (output.prompt_token_ids, output.finished, output.outputs.hidden_size) == (ids[0], True, 128)


def test_prompts(bert):
    expected = vectors(bert, ["query: " + text for text in TEXTS])
    np.testing.assert_array_equal(vectors(bert, prompt_name="query"), expected)
    np.testing.assert_array_equal(vectors(bert, prompt="query: "), expected)
    np.testing.assert_array_equal(vectors(bert, [[1, 2]], prompt="query: "), vectors(bert, [[1, 2]]))


def with_files(folder, tmp_path, **files):
    """A copy with other contents of some JSON files: fields that are added, or a list."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, content in files.items():
        file = copy / f"{name.replace('__', '/')}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content if isinstance(content, list) else old | content))
    return copy


def test_what_a_folder_says_is_done(folders, bert, tmp_path):
    """The default prompt, whose tokens don't count, lower case, a length, and vectors that are cut."""
    said = {"default_prompt_name": "query", "truncate_dim": 8}
    folder = with_files(
        folders["bert"],
        tmp_path,
        config_sentence_transformers=said,
        sentence_bert_config={"max_seq_length": 40, "do_lower_case": True},
        **{"1_Pooling__config": {"include_prompt": False, "pooling_mode": "lasttoken"}},
    )
    with LLM(folder) as llm:
        last = vectors(llm, ["HELLO"])
        assert llm._pooling.programs.sizes[-1] >= 40
        assert "at most 40" in line(lambda: vectors(llm, "x" * 60), ContextLengthError)
    with LLM(folders["bert"], pooler_config={"pooling_type": "LAST", "normalize": False}) as llm:
        whole = vectors(llm, ["query: hello"])[:, :8]
    np.testing.assert_allclose(last, whole / np.linalg.norm(whole), rtol=1e-6)
    (folder / "1_Pooling" / "config.json").write_text('{"include_prompt": false, "pooling_mode": "mean"}')
    with LLM(folder) as llm:
        mean, alone = vectors(llm, ["hello"], normalize=False), vectors(llm, ["hello"], prompt="", normalize=False)
        assert llm.embed("hello", use_tqdm=False)[0].outputs.embedding.shape == (8,)
    assert np.abs(mean - alone).max() > 1e-2


def test_cut_vectors_are_normed_afterwards(bert):
    whole = vectors(bert, normalize=False)
    np.testing.assert_allclose(
        vectors(bert, dimensions=5), whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_array_equal(vectors(bert, dimensions=5, normalize=False), whole[:, :5])


def test_what_is_too_long(bert):
    long = "y" * 200
    text = line(lambda: bert.embed(["a", long], use_tqdm=False), ContextLengthError)
    assert "text 1: the text has 201 tokens" in text
    assert "truncate=True" in text
    cut = bert.embed(long, truncate=True, use_tqdm=False)[0]
    assert cut.prompt_token_ids == [*ours("y" * 159), END]
    assert bert.embed(long, truncate_prompt_tokens=3, use_tqdm=False)[0].prompt_token_ids == [*ours("yy"), END]
    assert bert.embed(long, truncate_prompt_tokens=-1, use_tqdm=False)[0].prompt_token_ids == cut.prompt_token_ids
    outputs = bert.embed(["a", long, "b"], on_error="return", use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, False, True]
    assert outputs[1].outputs.embedding.shape == (0,)


def test_an_empty_text_is_what_the_tokenizer_puts_around_it(bert):
    assert bert.embed("", use_tqdm=False)[0].prompt_token_ids == [END]
    assert "the text is empty" in line(lambda: bert.embed([[]], use_tqdm=False), RequestError)
    assert bert.embed([], use_tqdm=False) == []


def test_an_iterable_is_read_as_far_as_needed(bert):
    """Also one that waits for an answer before it goes on."""
    answered = threading.Event()

    def texts():
        yield TEXTS[0]
        assert answered.wait(60)
        yield from TEXTS[1:]

    outputs = []
    for output in bert.embed_iter(texts()):
        outputs.append(output)
        answered.set()
    assert [output.index for output in outputs] == list(range(len(TEXTS)))
    np.testing.assert_array_equal(np.stack([output.outputs.embedding for output in outputs]), vectors(bert))
    read = []

    def endless():
        while True:
            read.append(1)
            yield "text"

    stream = bert.embed_iter(endless())
    for _ in range(10):
        next(stream)
    stream.close()
    assert len(read) < 10_000


def test_an_iterable_that_fails(bert):
    def texts():
        yield from TEXTS
        raise KeyError("no more")

    outputs = []
    with pytest.raises(KeyError, match="no more"):
        outputs.extend(bert.embed_iter(texts()))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt_name": "document"}, "there are query; or give prompt"),
        ({"prompt_name": "query", "prompt": "a"}, "prompt is given too"),
        ({"prompt": 5}, "prompt: 5 is no text"),
        ({"dimensions": 129}, "dimensions: 129 is not from 1 to 128"),
        ({"dimensions": 0}, "dimensions: 0 is not from 1"),
        ({"dimensions": True}, "dimensions: True is not from 1"),
        ({"normalize": "yes"}, "normalize: 'yes' is neither true nor false"),
        ({"truncate": "yes"}, "truncate: 'yes' is neither true nor false"),
        ({"truncate_prompt_tokens": 161}, "161 is neither -1 nor from 1 to 160"),
        ({"on_error": "skip"}, "on_error is 'skip'"),
    ],
)
def test_wrong_options(bert, options, problem):
    assert problem in line(lambda: bert.embed("a", use_tqdm=False, **options), RequestError)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (5, "a text or a list of them is needed, not int"),
        ([5.0], "a text must be a string or a list of token ids, not float"),
        ([[300]], "the text has token id 300: the model's ids go from 0 to 299"),
        ([[-1]], "the text has token id -1"),
        ([("a", "b")], "a pair of texts is given"),
        ([b"a"], "not bytes: decode it"),
        ([{"text": "a"}], "either prompt or prompt_token_ids"),
        (["\ud800"], "half of a surrogate pair"),
    ],
)
def test_wrong_texts(bert, text, problem):
    assert problem in line(lambda: bert.embed(text, use_tqdm=False), RequestError)


def test_what_a_model_can_not_do_is_said(folders, bert):
    for call in (
        lambda: bert.generate("a"),
        lambda: bert.chat([{"role": "user", "content": "a"}]),
        lambda: next(bert.generate_iter(["a"])),
        lambda: bert.classify("a"),
    ):
        assert "the model makes vectors of texts (LLM.embed, score" in line(call, UnsupportedError)
    with LLM(folders["qwen3"], runner="generate") as llm:
        assert llm.task == "generate"
        assert "the model generates text" in line(lambda: llm.embed("a"), UnsupportedError)


def test_what_can_not_be_loaded(folders, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(folders["bert"], folder)
    (folder / "modules.json").unlink()
    assert 'give pooler_config={"pooling_type": "MEAN"}' in line(lambda: LLM(folder), CheckpointError)
    for options, problem in (
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype is 'int8': models that embed have no use for it"),
        ({"max_model_len": 161}, "max_model_len is 161"),
        ({"pooler_config": {"pooling_type": "SUM"}}, "one of CLS, LAST, MEAN"),
        ({"pooler_config": {"logit_bias": 1}}, "it must be a dict with pooling_type"),
        ({"pooler_config": {"pooling_type": "STEP"}}, "models that embed have no steps"),
        ({"pooler_config": {"step_tag_id": 1}}, "step_tag_id is 1: models that embed have no use for it"),
        ({"runner": "pool"}, "runner is 'pool'"),
        ({"runner": "generate", "convert": "embed"}, "leave one of them out"),
        ({"convert": "classify"}, "to classify with model_type bert it can be"),
    ):
        assert problem in line(lambda options=options: LLM(folders["bert"], **options))
    with LLM(folder, pooler_config={"pooling_type": "MEAN"}) as llm, LLM(folders["bert"]) as said:
        np.testing.assert_array_equal(vectors(llm), vectors(said))


def test_closed(folders):
    llm = LLM(folders["bert"])
    stream = llm.embed_iter(iter(["a", "b"]))
    llm.close()
    llm.close()
    assert "closed" in repr(llm)
    with pytest.raises(EngineClosed):
        next(stream)
    with pytest.raises(EngineClosed):
        llm.embed("a")


def test_in_one_call(folders, bert):
    try:
        np.testing.assert_array_equal(
            jaxinfer.embed(TEXTS, folders["bert"], prompt_name="query"), vectors(bert, prompt_name="query")
        )
        assert jaxinfer.embed("a", folders["bert"], dimensions=7).shape == (7,)
        assert jaxinfer.embed([], folders["bert"]).shape[0] == 0
        assert "'dimension' is not known" in line(lambda: jaxinfer.embed("a", folders["bert"], dimension=7))
    finally:
        jaxinfer.unload()


def test_many_threads_at_once(bert):
    expected, got = vectors(bert), {}

    def ask(i):
        got[i] = vectors(bert)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    for vector in got.values():
        np.testing.assert_array_equal(vector, expected)
