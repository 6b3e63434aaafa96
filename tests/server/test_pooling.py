"""Vectors, classes and scores over HTTP are those of LLM."""

import base64

import httpx2 as httpx
import numpy as np
import openai
import pytest

from jaxinfer import LLM
from tests.models.references import found_or_made
from tests.test_classify import make as make_classifier
from tests.test_embed import make as make_embedder

TEXTS = ["a", "Hello there."]
EMBEDDER, CLASSIFIER, RANKER = (
    ("sentences", "bert", make_embedder),
    ("classes", "single", make_classifier),
    ("classes", "one", make_classifier),
)


@pytest.fixture
def loaded(checkpoints, request):
    folder, kind, make = request.param
    with LLM(found_or_made(checkpoints.root / folder, kind, "large", make(kind)), max_num_batched_tokens=32) as llm:
        yield llm


@pytest.fixture
def http(serve, loaded):
    with httpx.Client(base_url=serve(loaded).url, timeout=60) as client:
        yield client


def vectors(llm, texts, **options):
    return np.stack([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False, **options)])


def numbers(encoded):
    return np.frombuffer(base64.b64decode(encoded), "<f4")


@pytest.mark.parametrize("loaded", [EMBEDDER], indirect=True)
def test_vectors(http, loaded):
    expected = vectors(loaded, TEXTS)
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as ai:

        def embed(asked, **options):
            data = ai.embeddings.create(model="tiny", input=asked, **options).data
            return np.array([entry.embedding for entry in data], np.float32)

        ids = [output.prompt_token_ids for output in loaded.embed(TEXTS, use_tqdm=False)]
        for asked in (TEXTS, ids):
            np.testing.assert_array_equal(embed(asked), expected)
            np.testing.assert_array_equal(embed(asked[1]), expected[1:])
        np.testing.assert_array_equal(embed(TEXTS, encoding_format="float"), expected)
        encoded = ai.embeddings.create(model="tiny", input=TEXTS, encoding_format="base64")
        np.testing.assert_array_equal([numbers(entry.embedding) for entry in encoded.data], expected)
        assert encoded.usage.prompt_tokens == encoded.usage.total_tokens == sum(map(len, ids))
        np.testing.assert_array_equal(embed(TEXTS, dimensions=8), vectors(loaded, TEXTS, dimensions=8))
        raw = vectors(loaded, TEXTS, normalize=False)
        np.testing.assert_array_equal(embed(TEXTS, extra_body={"normalize": False}), raw)
        for wrong, param in (
            ({"input": []}, "input"),
            ({"input": ["a", ""]}, "input"),
            ({"input": [1, 10**6]}, "prompt"),
            ({"input": ["a"] * 2049}, "input"),
            ({"input": "a", "dimensions": 0}, "dimensions"),
            ({"input": "x" * 1000}, "prompt"),
            ({"input": "a", "extra_body": {"messages": []}}, "messages"),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                ai.embeddings.create(**{"model": "tiny"} | wrong)
            assert error.value.param == param
        with pytest.raises(openai.BadRequestError, match="vectors of texts"):
            ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    assert 'vllm:request_prompt_tokens_count{model_name="tiny"' in http.get("/metrics").text
    assert http.get("/ready").status_code == 200
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == loaded.loaded.max_model_len
    assert http.post("/tokenize", json={"prompt": "a"}).status_code == 200
    of_tokens = http.post("/pooling", json={"input": TEXTS, "task": "token_embed"}).json()["data"]
    assert [len(entry["data"]) for entry in of_tokens] == list(map(len, ids))
    np.testing.assert_array_equal(
        numbers(http.post("/pooling", json={"input": "a", "encoding_format": "base64"}).json()["data"][0]["data"]),
        expected[0],
    )
    scores = http.post("/v1/score", json={"text_1": "a", "text_2": TEXTS}).json()["data"]
    answers = loaded.score("a", TEXTS, use_tqdm=False)
    assert [entry["score"] for entry in scores] == [output.outputs.score for output in answers]
    np.testing.assert_array_equal(http.post("/embed", json={"inputs": TEXTS, "normalize": False}).json(), raw)
    assert len(http.post("/embed", json={"inputs": "x" * 1000, "truncate": True}).json()) == 1
    assert http.get("/info").json()["model_type"] == {"embedding": {}}


@pytest.mark.parametrize("loaded", [CLASSIFIER], indirect=True)
def test_classes(http, loaded, monkeypatch):
    expected = loaded.classify([*TEXTS, tuple(TEXTS)], use_tqdm=False)
    answer = http.post("/classify", json={"input": TEXTS}).json()
    assert [entry["label"] for entry in answer["data"]] == [output.outputs.label for output in expected[:2]]
    np.testing.assert_array_equal(answer["data"][1]["probs"], expected[1].outputs.probs.tolist())
    alone, listed = (http.post("/predict", json={"inputs": asked}).json() for asked in (TEXTS, [["a"], TEXTS]))
    assert alone == listed[1]  # a pair
    assert alone[0] == {"label": expected[2].outputs.label, "score": float(expected[2].outputs.probs.max())}
    assert http.get("/info").json()["model_type"]["classifier"]["label2id"] == {"cat": 0, "dog": 1, "owl": 2}
    for path, body, param in (
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/rerank", {"query": "a", "documents": TEXTS}, None),  # three classes are no score
        ("/predict", {"inputs": ["a", "b", "c"]}, "inputs"),
    ):
        refused = http.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert str(loaded.folder) not in refused.text

    def fails(*_):
        raise RuntimeError("secret of the device")

    monkeypatch.setattr(loaded.loaded.engine, "_launch", fails)
    failed = http.post("/classify", json={"input": "a"})
    assert failed.status_code == 500
    assert "secret" not in failed.text


@pytest.mark.parametrize("loaded", [RANKER], indirect=True)
def test_ranks(http, loaded):
    documents = [*TEXTS, "there"]
    best, second, _ = loaded.rerank("a", documents, use_tqdm=False)
    answer = http.post("/v2/rerank", json={"query": "a", "documents": documents, "top_n": 2}).json()
    assert answer["results"] == [
        {"index": entry.index, "relevance_score": entry.relevance_score, "document": {"text": documents[entry.index]}}
        for entry in (best, second)
    ]
    given = [{"text": text, "url": "x"} for text in documents]
    whole = http.post("/rerank", json={"query": "a", "documents": given}).json()["results"]
    assert whole[0]["document"] == given[best.index]
    body = {"query": "a", "documents": documents, "return_documents": False}
    assert http.post("/v1/rerank", json=body).json()["results"][0] == {
        "index": best.index,
        "relevance_score": best.relevance_score,
    }
    ranked = http.post("/rerank", json={"query": "a", "texts": documents, "raw_scores": True}).json()
    assert [entry["index"] for entry in ranked][:2] == [best.index, second.index]
    pairs = loaded.score(TEXTS, documents[1:], use_tqdm=False)
    scores = http.post("/score", json={"queries": TEXTS, "documents": documents[1:]}).json()["data"]
    assert [entry["score"] for entry in scores] == [output.outputs.score for output in pairs]
    for path, body in (
        ("/score", {"text_1": TEXTS, "text_2": documents}),
        ("/score", {"text_1": "a"}),
        ("/rerank", {"query": "a", "documents": []}),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}),
        ("/rerank", {"query": "a", "documents": TEXTS, "top_n": 0}),
        ("/rerank", {"query": "a", "documents": TEXTS, "max_tokens_per_doc": 5}),
    ):
        assert http.post(path, json=body).status_code == 400
