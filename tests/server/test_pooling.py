"""Vectors and classes over HTTP are those of LLM."""

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


@pytest.fixture
def loaded(checkpoints, request):
    folder, kind, make = request.param
    with LLM(found_or_made(checkpoints.root / folder, kind, "large", make(kind)), max_num_batched_tokens=128) as llm:
        yield llm


@pytest.mark.parametrize("loaded", [("sentences", "bert", make_embedder)], indirect=True)
def test_embeddings(serve, loaded):
    expected = np.stack([output.outputs.embedding for output in loaded.embed(TEXTS, use_tqdm=False)])
    url = serve(loaded).url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
        for form in ("base64", "float"):  # of which the first is the client's own
            answer = ai.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
            vectors = [entry.embedding for entry in answer.data]
            if form == "base64":
                vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
            np.testing.assert_array_equal(np.array(vectors, np.float32), expected)
        cut = ai.embeddings.create(model="tiny", input="a", dimensions=8).data[0].embedding
        assert len(cut) == 8
        for wrong in ({"input": []}, {"input": ""}, {"input": "a", "dimensions": 0}, {"input": "x" * 1000}):
            with pytest.raises(openai.BadRequestError):
                ai.embeddings.create(**{"model": "tiny"} | wrong)
        with pytest.raises(openai.BadRequestError, match="vectors of texts"):
            ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    with httpx.Client(base_url=url) as client:
        assert client.get("/metrics").status_code == client.get("/ready").status_code == 200
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("loaded", [("classes", "single", make_classifier)], indirect=True)
def test_classify(serve, loaded):
    expected = loaded.classify(TEXTS, use_tqdm=False)
    with httpx.Client(base_url=serve(loaded).url) as client:
        answer = client.post("/classify", json={"input": TEXTS}).json()
        assert [entry["label"] for entry in answer["data"]] == [output.outputs.label for output in expected]
        np.testing.assert_array_equal(answer["data"][1]["probs"], expected[1].outputs.probs.tolist())
        refused = client.post("/v1/embeddings", json={"input": "a"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
