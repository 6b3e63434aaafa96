"""`SentenceTransformer` and `CrossEncoder`: what their namesakes do, and these themselves where they are installed."""

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxinfer import CrossEncoder, RequestError, SentenceTransformer, UnsupportedError
from jaxinfer.layers.pooling import POOLINGS
from jaxinfer.tasks.similarity import PRECISIONS, pairwise_similarity, quantized, similarity
from tests.refusals import line
from tests.test_classify import folders as class_folders  # noqa: F401
from tests.test_embed import TEXTS, expected, folders  # noqa: F401
from tests.test_rerank import LOGIT_SCORE, SMALL, derived

TOLERANCE = 1e-5
QUERY = "one text"
DOCUMENTS = ["and another", "a", "", "much " * 12]
MORE = [*TEXTS, " spaces around \n", "", "long " * 60]


@pytest.fixture(scope="module")
def model(folders):  # noqa: F811
    with SentenceTransformer(folders["bert"], max_num_batched_tokens=256) as model:
        yield model


def test_vectors(folders, model):  # noqa: F811
    wanted = expected(folders["bert"], "bert")
    vectors = model.encode(TEXTS)
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)
    np.testing.assert_array_equal(model.encode(sentences=TEXTS[1]), vectors[1])
    np.testing.assert_array_equal(model.encode(inputs=tuple(TEXTS), batch_size=1, device="cpu"), vectors)
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=5), vectors[:, :5])  # not normed again
    lengths = np.linalg.norm(model.encode(TEXTS, truncate_dim=5, normalize_embeddings=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    with model.truncate_embeddings(7):
        assert model.encode("a").shape == (7,)
        assert model.get_sentence_embedding_dimension() == 7
    assert (model.get_embedding_dimension(), model.truncate_dim) == (128, None)
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=np.int64(5)), vectors[:, :5])
    assert model.encode([]).shape == (0,)
    states = model.encode(TEXTS, output_value="token_embeddings")
    np.testing.assert_allclose(states[3], np.load(folders["bert"] / "reference.npz")["arr_3"], atol=1e-4)
    assert model.encode("a", output_value="token_embeddings").shape == (2, 128)
    for precision in PRECISIONS:
        np.testing.assert_array_equal(model.encode(TEXTS, precision=precision), quantized(vectors, precision))
    np.testing.assert_array_equal(model.encode(TEXTS, precision=None), vectors)  # as evaluators have it
    np.testing.assert_allclose(model.similarity(vectors[:2], vectors), wanted[:2] @ wanted.T, atol=TOLERANCE)
    assert model.similarity_pairwise(vectors, vectors) == pytest.approx(1, abs=1e-6)
    assert "128 dimensions and of 1 can't" in line(lambda: model.similarity(vectors, vectors[:, :1]), RequestError)
    assert "3 vectors and 2" in line(lambda: model.similarity_pairwise(vectors[:3], vectors[:2]), RequestError)
    assert "not 'a'" in line(lambda: model.similarity("a", vectors), RequestError)


def test_prompts_and_lengths(model):
    query = model.encode("query: a")
    np.testing.assert_array_equal(model.encode("a", prompt_name="query"), query)
    np.testing.assert_array_equal(model.encode_query("a"), query)
    np.testing.assert_array_equal(model.encode("a", prompt="query: "), query)
    np.testing.assert_array_equal(model.encode_query("a", prompt="x "), model.encode("x a"))
    np.testing.assert_array_equal(model.encode_document("a"), model.encode("a"))  # it has no such prompt
    assert (model.max_seq_length, model.device, model.prompts) == (160, "cpu", {"query": "query: "})
    model.max_seq_length = 5
    np.testing.assert_array_equal(model.encode("abcdefgh"), model.encode("abcd"))
    assert "from 1 to 160" in line(lambda: setattr(model, "max_seq_length", 161))
    model.max_seq_length = 160


@pytest.mark.parametrize(("said", "length"), [(7, 7), (10**30, 160), (1e30, 160), (None, 160)])
def test_the_tokenizer_says_how_long_texts_are(folders, tmp_path, said, length):  # noqa: F811
    """As newer versions of the library write it."""
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    limited(folder, said)
    with SentenceTransformer(folder) as model:
        assert model.max_seq_length == length
    limited(folder, "7")
    assert "model_max_length is '7': it must be an integer" in line(lambda: SentenceTransformer(folder))


def limited(folder, length):
    """With a tokenizer that says so; the model itself says nothing."""
    for name, content in (("sentence_bert_config.json", {}), ("tokenizer_config.json", {"model_max_length": length})):
        file = folder / name
        there = json.loads(file.read_text()) if file.exists() else {}
        there.pop("max_seq_length", None)
        file.write_text(json.dumps(there | content))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompt_name": "document"}, "prompt_name: 'document' is no prompt: there are query"),
        ({"batch_size": 0}, "batch_size: 0 must be an integer of at least 1"),
        ({"prompt": 5}, "prompt: 5 is no text"),
        ({"precision": "int4"}, "precision: 'int4' is none of float32, int8"),
        ({"precision": "int8"}, "precision: int8 is between"),
        ({"output_value": None}, "output_value: None: it is sentence_embedding"),
        ({"output_value": "token_embeddings", "precision": "int8"}, "leave the rest out"),
        ({"device": "cuda"}, "device: 'cuda': the model is on cpu"),
        ({"truncate_dim": 0}, "truncate_dim: 0 must be"),
        ({"pool": {}, "chunk_size": 5}, "chunk_size: the model runs in this process"),
        ({"tempo": 5}, "'tempo' is not supported"),
    ],
)
def test_what_is_refused(model, options, problem):
    assert problem in line(lambda: model.encode("a", **options), (RequestError, UnsupportedError))


def test_pairs(class_folders):  # noqa: F811
    with CrossEncoder(class_folders["one"], max_num_batched_tokens=256) as model:
        scores = model.predict([(QUERY, document) for document in DOCUMENTS])
        logits = model.predict([[QUERY, document] for document in DOCUMENTS], activation_fn="Identity")
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=1e-5)
        assert model.predict((QUERY, DOCUMENTS[0])) == scores[0]
        order = np.argsort(-scores)
        ranks = model.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
        assert ranks == [{"corpus_id": i, "score": float(scores[i]), "text": DOCUMENTS[i]} for i in order[:2]]
        assert model.rank(QUERY, iter(DOCUMENTS), 2, True, convert_to_tensor=True, apply_softmax=False) == ranks
        assert "a list of texts is needed, not str" in line(lambda: model.rank("a", "bc"), RequestError)
        assert model.predict([], batch_size=5).shape == (0,)
        assert (model.num_labels, model.max_length) == (1, 160)
        assert "NumPy's arrays" in line(lambda: model.predict([("a", "b")], activation_fn="Softmax"), UnsupportedError)
    with CrossEncoder(class_folders["single"], max_length=20, **SMALL) as model:
        pairs = [(QUERY, document) for document in DOCUMENTS]
        assert model.predict(pairs).shape == (4, 3)
        np.testing.assert_allclose(model.predict(pairs, apply_softmax=True).sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(model.predict(pairs, activation_fn=np.abs), np.abs(model.predict(pairs)))
        assert "3 classes" in line(lambda: model.rank("a", ["b"]), UnsupportedError)
        np.testing.assert_array_equal(model.predict(pair for pair in np.array(pairs)), model.predict(pairs))
        for wrong in ("ab", ["ab", "cd", "ef"], {"a": "b"}, None, ["ab"]):  # letters are no texts
            assert "a pair of texts" in line(lambda wrong=wrong: model.predict(wrong), RequestError)
    assert "num_labels is 2" in line(lambda: CrossEncoder(class_folders["single"], 2))


@pytest.mark.parametrize("make", [iter, tuple, np.array, lambda texts: dict.fromkeys(texts).keys()])
def test_any_iterable_of_texts(model, make):
    np.testing.assert_array_equal(model.encode(make(TEXTS[:3])), model.encode(TEXTS[:3]))


@pytest.mark.parametrize("wrong", [None, 5, b"a", np.array("a"), np.array([["a"]]), {"text": "a"}, {"a": 1}])
def test_what_is_no_list(model, wrong):
    assert line(lambda: model.encode(wrong), RequestError)


def test_asked_in_other_ways(model, tmp_path):
    """As LangChain, LlamaIndex, mteb and evaluators of sentence-transformers do."""
    query = model.encode_query("a")
    np.testing.assert_array_equal(model.encode_query(inputs=["a"], prompt_name=None, prompt=None)[0], query)
    np.testing.assert_array_equal(model.encode_query(["a"], None, "query: ", np.int64(8))[0], query)
    with pytest.raises(TypeError, match="sentences"):
        model.encode_query("a", sentences="b")
    metrics = {"cosine_ndcg@10": 0.5}

    def evaluator(evaluated, output_path):
        evaluated.model_card_data.set_evaluation_metrics(evaluator, metrics, -1, 3)
        return metrics

    assert model.evaluate(evaluator, output_path=str(tmp_path)) == metrics
    card = model.model_card_data
    assert card.evaluations == [(evaluator, metrics, -1, 3)]
    assert (card.base_model, card.base_model_revision, card.model_name) == (str(model.llm.folder), None, None)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="can't be pickled or copied"):
            copied(model)
    assert model.to("cpu").eval() is model
    assert "the model is on cpu" in line(lambda: model.to("cuda"), UnsupportedError)


def test_tensors(model, class_folders, monkeypatch):  # noqa: F811
    """Of those who have imported torch."""
    torch = pytest.importorskip("torch")
    vectors = model.encode(TEXTS[:3])
    tensor = model.encode(TEXTS[:3], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), vectors)
    np.testing.assert_array_equal(model.encode(TEXTS[0], convert_to_tensor=True).numpy(), vectors[0])
    several = model.encode(TEXTS[:3], convert_to_numpy=False)
    assert isinstance(several, list)
    np.testing.assert_array_equal(torch.stack(several).numpy(), vectors)
    assert model.encode([], convert_to_tensor=True).shape == (0,)
    states = model.encode(TEXTS[:3], output_value="token_embeddings", convert_to_numpy=False)
    assert [type(state) for state in states] == [torch.Tensor] * 3
    for a, b in ((tensor, tensor), (several, several), (vectors, tensor), (tensor[0], tensor)):
        found = model.similarity(a, b)
        np.testing.assert_allclose(found.numpy(), model.similarity(vectors, vectors)[: len(found)], atol=1e-6)
    assert isinstance(model.similarity_pairwise(tensor, tensor), torch.Tensor)
    assert isinstance(model.similarity(vectors, vectors), np.ndarray)
    with CrossEncoder(class_folders["one"], max_num_batched_tokens=256) as scorer:
        pairs = [(QUERY, document) for document in DOCUMENTS]
        found = scorer.predict(pairs, convert_to_tensor=True)
        np.testing.assert_array_equal(found.numpy(), scorer.predict(pairs))
    monkeypatch.delitem(sys.modules, "torch")
    for option in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        assert "has not imported" in line(lambda option=option: model.encode("a", **option), UnsupportedError)


@pytest.mark.slow
def test_evaluators_of_the_library(folders, class_folders, tmp_path):  # noqa: F811
    """They find of these models what they find of their own."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
    from sentence_transformers.sentence_transformer import evaluation

    queries, documents = {str(i): TEXTS[i] for i in range(4)}, {str(i): text for i, text in enumerate(MORE)}
    answers = {str(i): {str(i + 1), str(i + 3)} for i in range(4)}
    samples = [{"query": TEXTS[i], "positive": MORE[i : i + 2], "negative": MORE[i + 2 : i + 5]} for i in range(3)]
    quiet = {"write_csv": False}
    evaluators = [
        evaluation.InformationRetrievalEvaluator(queries, documents, answers, **quiet),
        evaluation.RerankingEvaluator(samples, **quiet),
        evaluation.TripletEvaluator(MORE[:3], MORE[1:4], MORE[3:6], **quiet),
        evaluation.EmbeddingSimilarityEvaluator(MORE[:4], MORE[2:6], [0.1, 0.9, 0.3, 0.5], **quiet),
        evaluation.TranslationEvaluator(MORE[:4], MORE[1:5], **quiet),
    ]
    folder = theirs(folders["bert"], tmp_path / "vectors", None)
    other = library.SentenceTransformer(str(folder), device="cpu")
    with SentenceTransformer(folder, max_num_batched_tokens=256) as model:
        for evaluator in evaluators:
            assert evaluator(model) == pytest.approx(evaluator(other), abs=1e-4)
    one = with_padding(shutil.copytree(class_folders["one"], tmp_path / "one"))
    evaluator = CrossEncoderRerankingEvaluator(samples, **quiet)
    with CrossEncoder(one, **SMALL) as model:
        assert evaluator(model) == pytest.approx(evaluator(library.CrossEncoder(str(one), device="cpu")), abs=1e-4)


def test_other_models(folders, class_folders):  # noqa: F811
    assert "it is a CrossEncoder" in line(lambda: SentenceTransformer(class_folders["one"]))
    assert "to classify with model_type bert it can be" in line(lambda: CrossEncoder(folders["bert"]))
    assert "backend: the backend is JAX" in line(lambda: SentenceTransformer(folders["bert"], backend="onnx"))


def test_nothing_heavy_is_imported():
    code = "import sys, jaxinfer; assert not {'jax', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_similarities_and_precisions_against_the_library():
    """To the bit, what is quantized."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.util import quantize_embeddings
    from sentence_transformers.util.similarity import SimilarityFunction

    vectors = np.random.default_rng(0).standard_normal((120, 37)).astype(np.float32)
    vectors[:, 3] = 0.25
    for precision in PRECISIONS:
        theirs, found = quantize_embeddings(vectors, precision), quantized(vectors, precision)
        assert found.dtype == theirs.dtype
        np.testing.assert_array_equal(found, theirs)
    for name in ("cosine", "dot", "euclidean", "manhattan"):
        matrix = SimilarityFunction.to_similarity_fn(name)(vectors[:9], vectors[9:])  # it rounds distances of 0
        np.testing.assert_allclose(similarity(name, vectors[:9], vectors[9:]), matrix, rtol=1e-4, atol=1e-4)
        rows = SimilarityFunction.to_similarity_pairwise_fn(name)(vectors, vectors[::-1].copy())
        np.testing.assert_allclose(pairwise_similarity(name, vectors, vectors[::-1]), rows, rtol=1e-4, atol=1e-4)


def theirs(folder, to, pooling):
    """A folder as the library wants it: modules with names and configurations, a token for padding."""
    shutil.copytree(folder, to)
    entries = json.loads((to / "modules.json").read_text())
    for entry in entries:
        entry["name"] = str(entry["idx"])
    (to / "modules.json").write_text(json.dumps(entries[: 2 if pooling else 3]))
    config = {"embedding_dimension": 128, "pooling_mode": pooling or "mean", "include_prompt": False}
    (to / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with_padding(to)
    return to


def with_padding(folder):
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<end>", "model_input_names": names}))
    return folder


@pytest.mark.slow
def test_against_sentence_transformers(folders, tmp_path):  # noqa: F811
    """Vectors of all poolings, alone and put together, with and without a prompt that does not count."""
    library = pytest.importorskip("sentence_transformers")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    for i, pooling in enumerate([None, *POOLINGS, ["mean", "cls", "lasttoken"]]):
        folder = theirs(folders["bert"], tmp_path / str(i), pooling)
        if i % 2:
            limited(folder, 20)
        other = library.SentenceTransformer(str(folder), device="cpu")
        with SentenceTransformer(folder, max_num_batched_tokens=256) as model:
            for options in ({}, {"prompt_name": "query"}, {"truncate_dim": 16, "normalize_embeddings": True}):
                wanted = other.encode(MORE, **options)
                got = model.encode(MORE, **options)
                np.testing.assert_allclose(got, wanted, atol=TOLERANCE * max(1, np.abs(wanted).max()))


@pytest.mark.slow
def test_cross_encoders_against_sentence_transformers(folders, class_folders, tmp_path):  # noqa: F811
    """Scores and ranks: of a model with one class, and of a language model, whose pairs a template writes."""
    library = pytest.importorskip("sentence_transformers")
    documents = [*DOCUMENTS, "long " * 60]
    one = with_padding(shutil.copytree(class_folders["one"], tmp_path / "one"))
    logits = with_padding(derived(folders["qwen3"], tmp_path / "logits", modules=LOGIT_SCORE))
    kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    file = logits / "modules.json"
    file.write_text(file.read_text().replace(LOGIT_SCORE["modules.json"][1]["type"], kind))
    for folder in (one, logits):
        other = library.CrossEncoder(str(folder), device="cpu", max_length=40)
        with CrossEncoder(folder, max_length=40, **SMALL) as model:
            pairs = [(QUERY, document) for document in documents]
            np.testing.assert_allclose(model.predict(pairs), other.predict(pairs), atol=TOLERANCE * 10)
            ranks = [[entry["corpus_id"] for entry in m.rank(QUERY, documents)] for m in (model, other)]
            assert ranks[0] == ranks[1]
