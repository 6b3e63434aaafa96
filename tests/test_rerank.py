"""`LLM.score`, `rerank`, `similarity`, `reward`, `encode`: against logits and hidden states that transformers made."""

import asyncio
import json
import shutil
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxinfer
from jaxinfer import LLM, AsyncEngine, PoolingParams, RequestError, UnsupportedError
from jaxinfer.errors import CheckpointError, ContextLengthError, EngineClosed, QueueFullError
from jaxinfer.tasks.template import TEMPLATES, PairTemplate
from jaxinfer.text.tokenizer import load_tokenizer
from tests.refusals import line
from tests.test_classify import TEXTS as CLASS_TEXTS
from tests.test_classify import folders as class_folders  # noqa: F401
from tests.test_embed import END, TEXTS, expected, folders, ours  # noqa: F401

TOLERANCE = 1e-5
NO, YES = ours("n")[0], ours("y")[0]
PAIR = "Q:{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }} " + (
    "D:{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}!?"
)
QUIET = {"use_tqdm": False}
SMALL = {"max_num_batched_tokens": 32}  # one size of calls, for one program a model
SHORT = [i for i, text in enumerate(TEXTS) if len(text) < 32]


def derived(folder, to, tensors=None, modules=None, **fields):
    """A language model's files again, with other fields and more tensors, and no modules but those given."""
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, to)
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
    stored = load_file(folder / "model.safetensors") | (tensors or {})
    if fields.get("tie_word_embeddings"):
        del stored["lm_head.weight"]
    save_file(stored, to / "model.safetensors")
    for name, content in (modules or {}).items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return to


@pytest.fixture(scope="module")
def qwen3(folders):  # noqa: F811
    return folders["qwen3"]


@pytest.fixture(scope="module")
def last(qwen3):
    """Of each of the short ones of TEXTS the hidden state of its last token, and the head's rows of two words."""
    hidden = np.load(qwen3 / "reference.npz")
    states = np.stack([hidden[f"arr_{i}"][-1] for i in SHORT])
    return states, load_file(qwen3 / "model.safetensors")["lm_head.weight"][[NO, YES]]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scores(outputs):
    return np.array([output.outputs.score for output in outputs])


LOGIT_SCORE = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.LogitScore"},
    ],
    "1_LogitScore/config.json": {"true_token_id": YES, "false_token_id": NO, "module_input_name": "causal_logits"},
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.linear.Identity",
    },
    "sentence_bert_config.json": {
        "transformer_task": "text-generation",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "logits"},
            "message": {"method": "forward", "method_output_name": "logits", "format": "flat"},
        },
        "module_output_name": "causal_logits",
    },
    "chat_template.jinja": PAIR,
}
TWO_WAYS = {"classifier_from_token": ["n", "y"], "method": "from_2_way_softmax"}


@pytest.fixture(scope="module")
def reranker(qwen3, tmp_path_factory):
    """One whose folder says all, of which scores are logits."""
    with LLM(derived(qwen3, tmp_path_factory.mktemp("logits") / "model", modules=LOGIT_SCORE), **SMALL) as llm:
        yield llm


def test_language_models_answer_by_the_logits_of_words(qwen3, last, reranker, tmp_path):
    """In all ways; no other rows of the head are there."""
    states, rows = last
    texts = [TEXTS[i] for i in SHORT]
    logits = states @ rows.T
    difference = logits[:, 1] - logits[:, 0]
    plain = derived(qwen3, tmp_path / "plain")
    converted = {"score.weight": (rows[1:] - rows[:1])}
    converted = derived(
        qwen3,
        tmp_path / "converted",
        converted,
        architectures=["Qwen3ForSequenceClassification"],
        id2label={"0": "score"},
        label2id={"score": 0},
    )
    tied = derived(qwen3, tmp_path / "tied", tie_word_embeddings=True)
    both = states @ load_file(tied / "model.safetensors")["model.embed_tokens.weight"][[NO, YES]].T
    named = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["n", "y"]}
    one = {"classifier_from_token": ["y"], "method": "no_post_processing"}
    for folder, overrides, wanted in (
        (plain, TWO_WAYS, sigmoid(difference)),
        (plain, named | {"is_original_qwen3_reranker": True}, sigmoid(difference)),
        (plain, one, sigmoid(logits[:, 1])),
        (converted, None, sigmoid(difference)),
        (tied, TWO_WAYS, sigmoid(both[:, 1] - both[:, 0])),
    ):
        with LLM(folder, hf_overrides=overrides, **SMALL) as llm:
            found = np.stack([output.outputs.probs for output in llm.classify(texts, **QUIET)])[:, 0]
            np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
            count = len(overrides["classifier_from_token"]) if overrides else 1
            assert llm.model.params["classifier.out.weight"].shape == (count, 128)
            assert not [name for name in llm.model.params if "lm_head" in name]
    ids = [[*ours(text), END] for text in texts]
    logit = [output.outputs.probs[0] for output in reranker.classify(ids, use_activation=False, **QUIET)]
    np.testing.assert_allclose(logit, difference, atol=TOLERANCE * 10)
    for overrides, problem in (
        ({"classifier_from_token": ["n", "y"]}, "method is missing (by default ''): supported are from_2_way_softmax"),
        ({"classifier_from_token": ["maybe"], "method": "no_post_processing"}, "'maybe' is no token of its tokenizer"),
        ({"classifier_from_token": ["y"], "method": "from_2_way_softmax"}, "is of two tokens"),
        ({"classifier_from_token": [300], "method": "no_post_processing"}, "token 300 is to be a class"),
        ({"vocab_size": 5}, "for models that make text, change config.json"),
    ):
        assert problem in line(lambda overrides=overrides: LLM(plain, hf_overrides=overrides))


def test_a_pair_by_a_template(reranker):
    """The text is the whole template's; where it is too long the document loses its end and what follows stays."""
    whole = reranker.classify([ours("Q:what? D:this one!?")], use_activation=False, **QUIET)[0].outputs.probs[0]
    (output,) = reranker.score("what?", "this one", **QUIET)
    assert output.prompt_token_ids == ours("Q:what? D:this one!?")
    assert output.outputs.score == pytest.approx(whole, abs=1e-6)  # its activation is Identity
    assert "the text has 208 tokens" in line(lambda: reranker.score("q", "d" * 200, **QUIET), ContextLengthError)
    for options, most in (({"truncate": True}, 160), ({"truncate_prompt_tokens": 15}, 15)):
        cut = reranker.score("q", "d" * 200, **options, **QUIET)[0].prompt_token_ids
        assert cut == [*ours("Q:q D:" + "d" * (most - 8)), *ours("!?")]
    problem = line(lambda: reranker.score("q" * 20, "d", truncate_prompt_tokens=20, **QUIET), ContextLengthError)
    assert "nothing of the document would remain" in problem
    assert "the chat template writes the document 0 times" in line(
        lambda: reranker.score("q", "d", chat_template="{{ messages[0].content }}", **QUIET), RequestError
    )
    assert "not of token ids" in line(lambda: reranker.score([[5, 6]], ["d"], **QUIET), RequestError)


def test_templates_of_known_rerankers(qwen3):
    tokenizer = load_tokenizer(qwen3)

    def text(template, *pair):
        return tokenizer.decode(PairTemplate(tokenizer, template).ids(*pair, None), False)

    asked = text("qwen3_reranker", " why? ", "so", "Judge it")
    assert asked.startswith("<|im_start|>system\nJudge whether the Document meets the requirements based on the Query")
    assert asked.endswith(
        'can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Judge it\n<Query>:  why? \n'
        "<Document>: so<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert "is in the template already" in line(lambda: text("qwen3_reranker", asked, "b", None), RequestError)
    assert "<Instruct>: Given a web search query, retrieve relevant" in text("qwen3_reranker", "a", "b", None)
    asked = text(TEMPLATES["bge_reranker_gemma"], "a", "b", None)
    assert asked.startswith("A: a\nB: b\nGiven a query A and a passage B,")
    assert asked.endswith("either 'Yes' or 'No'.")
    assert text(PAIR.replace("first }}!", "first | trim }}!"), " a ", " b ", None) == "Q: a  D:b!?"


def test_cross_encoders(class_folders, tmp_path):  # noqa: F811
    """One class: of pairs, one query to many, by the activation that is said."""
    reference = np.load(class_folders["one"] / "reference.npz")
    pairs = [(i, text) for i, text in enumerate(CLASS_TEXTS) if isinstance(text, tuple)]
    wanted = np.array([reference["probs"][i, 0] for i, _ in pairs])
    with LLM(class_folders["one"], max_num_batched_tokens=256) as llm:
        outputs = llm.score([a for _, (a, _) in pairs], [b for _, (_, b) in pairs], **QUIET)
        np.testing.assert_allclose(scores(outputs), wanted, atol=TOLERANCE)
        assert [output.index for output in outputs] == [0, 1]
        query, documents = "one text", ["and another", "a", "", "much " * 12]
        many = scores(llm.score(query, documents, **QUIET))
        np.testing.assert_array_equal(many, scores(llm.score(queries=[query] * 4, documents=documents, **QUIET)))
        assert many[0] == pytest.approx(wanted[0], abs=TOLERANCE)
        results = llm.rerank(query, documents, top_n=3, **QUIET)
        order = np.argsort(-many, kind="stable")[:3]
        assert [(r.index, r.relevance_score, r.document) for r in results] == [
            (i, many[i], documents[i]) for i in order
        ]
        assert llm.rerank(query, [], **QUIET) == []
        ids = llm.score([ours("one text")], [ours("and another")], **QUIET)  # special tokens are put around
        assert scores(ids)[0] == many[0]
        failed = llm.score("a", ["b", "c" * 200], on_error="return", **QUIET)
        assert [output.error is None for output in failed] == [True, False]
        assert np.isnan(failed[1].outputs.score)
        assert "2 for 3 queries" in line(lambda: llm.score(["a"] * 3, ["b"] * 2, **QUIET), RequestError)
        assert "give score(queries, documents)" in line(lambda: llm.score("a", **QUIET), RequestError)
        assert "top_n: 0" in line(lambda: llm.rerank("a", ["b"], top_n=0), RequestError)
        assert "a list of texts is needed, not bytes" in line(lambda: llm.rerank("a", b"b"), RequestError)
        assert "dimensions: score has no use for it" in line(
            lambda: llm.score("a", "b", pooling_params=PoolingParams(dimensions=2)), RequestError
        )
        rewards = llm.reward(CLASS_TEXTS, **QUIET)  # as the head has them
        np.testing.assert_allclose([r.outputs.data[0] for r in rewards], reference["logits"][:, 0], atol=TOLERANCE)
    copy = tmp_path / "copy"
    shutil.copytree(class_folders["one"], copy)
    config = json.loads((copy / "config.json").read_text())
    for said in (
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ):
        (copy / "config.json").write_text(json.dumps(config | said))
        with LLM(copy, **SMALL) as llm:
            raw = scores(llm.score("one text", "and another", **QUIET))[0]
            assert raw == pytest.approx(reference["logits"][pairs[0][0], 0], abs=TOLERANCE)
    for name in ("os.system", "torch.nn.Softmax", 5):
        (copy / "config.json").write_text(json.dumps(config | {"sbert_ce_default_activation_function": name}))
        assert "supported are torch.nn's" in line(lambda: LLM(copy), CheckpointError)
    with LLM(class_folders["single"]) as llm:
        assert "it has 3 classes, and a score is of one" in line(lambda: llm.score("a", "b"), UnsupportedError)
        assert "it has 3 classes, which LLM.classify gives" in line(lambda: llm.reward("a"), UnsupportedError)


def test_scores_by_vectors(folders, qwen3, tmp_path):  # noqa: F811
    vectors = expected(folders["bert"], "bert")
    cosine = vectors @ vectors.T
    with LLM(folders["bert"], max_num_batched_tokens=256) as llm:
        np.testing.assert_allclose(scores(llm.score(TEXTS[0], TEXTS, **QUIET)), cosine[0], atol=TOLERANCE)
        np.testing.assert_allclose(
            scores(llm.score(TEXTS, TEXTS[::-1], **QUIET)), np.diag(cosine[::-1]), atol=TOLERANCE
        )
        np.testing.assert_allclose(llm.similarity(TEXTS[:3], TEXTS, **QUIET), cosine[:3], atol=TOLERANCE)
        assert llm.similarity([], TEXTS, **QUIET).shape == (0, len(TEXTS))
        best = llm.rerank(TEXTS[2], TEXTS, top_n=1, **QUIET)[0]
        assert (best.index, best.document) == (2, TEXTS[2])
        assert "leave it out" in line(lambda: llm.score("a", "b", chat_template=PAIR), RequestError)
        assert "and nothing else" in line(lambda: llm.reward("a"), UnsupportedError)
        hidden = np.load(folders["bert"] / "reference.npz")
        found = llm.encode(TEXTS, PoolingParams(normalize=False), pooling_task="token_embed", **QUIET)
        for i, output in enumerate(found):
            assert output.outputs.data.shape == hidden[f"arr_{i}"].shape
            np.testing.assert_allclose(output.outputs.data, hidden[f"arr_{i}"], atol=TOLERANCE * 10)
        cut = llm.encode(TEXTS[0], PoolingParams(dimensions=4), pooling_task="token_embed", **QUIET)[0].outputs.data
        np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, rtol=1e-6)  # as the folder's vectors are
        pooled = llm.encode(TEXTS, **QUIET)
        np.testing.assert_allclose([output.outputs.data for output in pooled], vectors, atol=TOLERANCE)
        params = PoolingParams(dimensions=5, truncate_prompt_tokens=-1)
        assert llm.embed("a" * 300, pooling_params=params, **QUIET)[0].outputs.embedding.shape == (5,)
        for call, problem in (
            (lambda: llm.encode("a", pooling_task="score"), "pooling_task: 'score' is none of embed, classify"),
            (lambda: llm.encode("a", PoolingParams(step_tag_id=1)), "step_tag_id: embed has no use for it"),
            (lambda: llm.embed("a", dimensions=3, pooling_params=params), "dimensions: it is in pooling_params, too"),
            (lambda: llm.embed("a", pooling_params={"dimensions": 3}), "pooling_params is a dict"),
            (lambda: PoolingParams(step_tag_id="x"), "step_tag_id: 'x' is no token id"),
            (lambda: PoolingParams(returned_token_ids=[-1]), "is no list of ids"),
            (lambda: PoolingParams(task="embed"), "LLM.encode has pooling_task"),
        ):
            assert problem in line(call, RequestError)
    said = json.loads((folders["bert"] / "config_sentence_transformers.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(folders["bert"], copy)
    (copy / "config_sentence_transformers.json").write_text(json.dumps(said | {"similarity_fn_name": "euclidean"}))
    with LLM(copy, pooler_config={"normalize": False, "dimensions": 3}, **SMALL) as llm:
        short = np.stack([output.outputs.embedding for output in llm.embed(TEXTS[:2], **QUIET)])
        far = -np.linalg.norm(short[0] - short[1])
        assert scores(llm.score(TEXTS[0], TEXTS[1], **QUIET))[0] == pytest.approx(far, rel=1e-5)
        assert short.shape[1] == 3


def test_rewards_of_steps(qwen3, tmp_path):
    """The head of Qwen2.5-Math-PRM at tokens that end a step; Math-Shepherd's, by the logits of two words."""
    rng = np.random.default_rng(5)
    shapes = {"score.0.weight": (128, 128), "score.0.bias": (128,), "score.2.weight": (2, 128), "score.2.bias": (2,)}
    head = {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    hidden = np.load(qwen3 / "reference.npz")
    text = 4  # three letters, and the end
    ids = [*ours(TEXTS[text]), END]
    states = hidden[f"arr_{text}"]
    middle = np.maximum(states @ head["score.0.weight"].T + head["score.0.bias"], 0)
    logits = middle @ head["score.2.weight"].T + head["score.2.bias"]
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    folder = derived(qwen3, tmp_path / "steps", head, architectures=["Qwen3ForProcessRewardModel"])
    tags = np.array(ids) == ids[0]
    with LLM(folder, pooler_config={"pooling_type": "STEP", "step_tag_id": ids[0]}, **SMALL) as llm:
        (output,) = llm.reward(TEXTS[text], **QUIET)
        np.testing.assert_allclose(output.outputs.data, probs[tags], atol=TOLERANCE)
        params = PoolingParams(step_tag_id=END, returned_token_ids=[1], use_activation=False)
        (output,) = llm.encode([ids], params, **QUIET)
        np.testing.assert_allclose(output.outputs.data, logits[-1:, 1:], atol=TOLERANCE * 10)
        assert llm.classify(TEXTS[text], **QUIET)[0].outputs.probs == pytest.approx(probs[-1], abs=TOLERANCE)
        assert "there are 2 classes" in line(
            lambda: llm.encode("a", PoolingParams(returned_token_ids=[2])), RequestError
        )
    one = {name: tensor[:1] if name.startswith("score.2") else tensor for name, tensor in head.items()}
    with LLM(derived(qwen3, tmp_path / "one", one, architectures=["Qwen3ForRewardModel"]), **SMALL) as llm:
        (output,) = llm.reward(TEXTS[text], **QUIET)
        np.testing.assert_allclose(output.outputs.data, logits[-1, :1], atol=TOLERANCE * 10)
    words = states @ load_file(qwen3 / "model.safetensors")["lm_head.weight"][[NO, YES]].T
    words = np.exp(words - words.max(axis=1, keepdims=True))
    pooling = {"pooling_type": "STEP", "step_tag_id": END, "returned_token_ids": [NO, YES]}
    with LLM(derived(qwen3, tmp_path / "words"), convert="classify", pooler_config=pooling, **SMALL) as llm:
        (output,) = llm.reward(TEXTS[text], **QUIET)
        np.testing.assert_allclose(output.outputs.data, (words / words.sum(1, keepdims=True))[-1:], atol=TOLERANCE)
    assert "give ALL or STEP" in line(lambda: LLM(folder, pooler_config={"pooling_type": "MEAN"}))


def test_tokens_over_devices(qwen3):
    hidden = np.load(qwen3 / "reference.npz")
    with LLM(qwen3, mesh="data=4,tensor=2", max_num_batched_tokens=128) as llm:
        found = llm.encode(
            [TEXTS[i] for i in SHORT], PoolingParams(normalize=False), pooling_task="token_embed", **QUIET
        )
    for i, output in zip(SHORT, found, strict=True):
        np.testing.assert_allclose(output.outputs.data, hidden[f"arr_{i}"], atol=TOLERANCE * 10)


async def _many(folder):
    engine = AsyncEngine(folder, max_num_batched_tokens=256, max_queued=8)
    outputs = await asyncio.gather(*(engine.embed(text) for text in TEXTS[:8]))
    vectors = np.stack([output.outputs.embedding for output in outputs])
    calls = engine.stats.calls
    score = (await engine.score(TEXTS[0], TEXTS[1])).outputs.score
    with pytest.raises(ContextLengthError, match="at most 160"):
        await engine.embed("x" * 300)
    with pytest.raises(UnsupportedError, match="the model makes vectors"):
        await engine.classify("a")
    with pytest.raises(UnsupportedError, match="the model makes vectors"):
        await anext(engine.generate("a"))
    many = await asyncio.gather(*(engine.embed("y" * 150) for _ in range(200)), return_exceptions=True)
    assert 0 < sum(isinstance(end, QueueFullError) for end in many) < 200
    cancelled = asyncio.create_task(engine.embed("a"))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    again = (await engine.embed(TEXTS[0])).outputs.embedding  # it goes on
    launch, failures = engine._stream.engine._launch, [MemoryError("no room")]
    engine._stream.engine._launch = lambda *call: (_ for _ in ()).throw(failures.pop()) if failures else launch(*call)
    with pytest.raises(MemoryError, match="no room"):
        await engine.embed("a")
    after = (await engine.embed(TEXTS[0])).outputs.embedding
    waiting = [asyncio.ensure_future(engine.embed("z" * 150)) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.to_thread(engine.close)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, EngineClosed | jaxinfer.EmbeddingRequestOutput) for end in ends)
    with pytest.raises(EngineClosed):
        await engine.embed("a")
    return vectors, calls, score, again, after


async def _at_once(folder, monkeypatch):
    """The device fails while another text is being read, and the engine is closed while one is."""
    from jaxinfer.tasks.embed import EmbedTask

    row, begun = EmbedTask.row, threading.Event()

    def slowly(task, index, text, options):
        if text == "slow":
            begun.set()
            time.sleep(0.3)
        return row(task, index, text, options)

    monkeypatch.setattr(EmbedTask, "row", slowly)
    async with AsyncEngine(folder, max_num_batched_tokens=256) as engine:
        launch, failures = engine._stream.engine._launch, [MemoryError("no room")]

        def fails(*call):
            begun.wait()
            if failures:
                raise failures.pop()
            return launch(*call)

        engine._stream.engine._launch = fails
        asked = [asyncio.ensure_future(engine.embed(text)) for text in ("a", "slow", "b")]
        ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
        assert isinstance(ends[0], MemoryError)
        assert all(isinstance(end, MemoryError | jaxinfer.EmbeddingRequestOutput) for end in ends)
        begun.clear()
        failures.append(MemoryError("no room"))
        asked = [asyncio.ensure_future(engine.embed(text)) for text in ("a", "slow")]
        await asyncio.to_thread(begun.wait)
    ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
    assert all(isinstance(end, EngineClosed | MemoryError) for end in ends)


def test_none_is_forgotten(folders, monkeypatch):  # noqa: F811
    asyncio.run(_at_once(folders["bert"], monkeypatch))


def test_an_async_engine(folders):  # noqa: F811
    vectors, calls, score, again, after = asyncio.run(_many(folders["bert"]))
    wanted = expected(folders["bert"], "bert")
    np.testing.assert_allclose(vectors, wanted[:8], atol=TOLERANCE)
    assert calls < 8  # together
    assert score == pytest.approx(wanted[0] @ wanted[1], abs=TOLERANCE)
    np.testing.assert_array_equal([again, after], [vectors[0]] * 2)
    assert not any(thread.name == "jaxinfer-stream" for thread in threading.enumerate())
