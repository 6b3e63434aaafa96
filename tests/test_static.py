"""Tables of vectors: a text's is the mean of its tokens', by the formulas of model2vec and of sentence-transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import LLM
from jaxinfer.errors import CheckpointError, RequestError
from tests.refusals import line

RNG = np.random.default_rng(0)
WORDS = ["[PAD]", "[UNK]", "the", "river", "runs", "under", "a", "bridge"]
TEXTS = ["the river runs", "a bridge", "under the unheard bridge the", "river"]
TABLE = RNG.normal(size=(len(WORDS), 40)).astype(np.float32)
MAPPING, FACTORS = RNG.integers(0, 5, len(WORDS)), RNG.uniform(0.1, 2, len(WORDS)).astype(np.float32)


def folder(root, tensors, config=None, modules=None, path="."):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    own = root / path
    own.mkdir(parents=True, exist_ok=True)
    save_file(tensors, own / "model.safetensors")
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[PAD] $A [PAD]", special_tokens=[("[PAD]", 0)])
    made.save(str(own / "tokenizer.json"))
    if config is not None:
        (own / "config.json").write_text(json.dumps(config))
    if modules is not None:
        (root / "modules.json").write_text(
            json.dumps([{"path": p, "type": f"sentence_transformers.models.{kind}"} for p, kind in modules])
        )
    return root


def means(table, normalize, drops):
    """Without the tokens that the tokenizer puts around a text."""
    rows = [[WORDS.index(word) if word in WORDS else 1 for word in text.split()] for text in TEXTS]
    vectors = np.stack([table[[i for i in row if i != 1 or not drops]].mean(axis=0) for row in rows])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


OWN = {"model_type": "model2vec", "architectures": ["StaticModel"]}
STATIC = ("0_StaticEmbedding", "StaticEmbedding")
CASES = {
    "model2vec": ({"embeddings": TABLE}, OWN, None, ".", (TABLE, False, True)),
    "normalized": ({"embeddings": TABLE}, OWN | {"normalize": True}, None, ".", (TABLE, True, True)),
    "few rows": (
        {"embeddings": TABLE[:5].astype(np.float16), "mapping": MAPPING, "weights": FACTORS},
        OWN,
        None,
        ".",
        (TABLE[:5].astype(np.float16).astype(np.float32)[MAPPING] * FACTORS[:, None], False, True),
    ),
    "integers": (
        {"embeddings": (50 * TABLE).astype(np.int8)},
        OWN,
        None,
        ".",
        ((50 * TABLE).astype(np.int8), False, True),
    ),
    "modules": ({"embedding.weight": TABLE}, None, [STATIC], STATIC[0], (TABLE, False, False)),
    "both": ({"embeddings": TABLE}, OWN, [(".", STATIC[1]), ("1_N", "Normalize")], ".", (TABLE, True, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors(case, tmp_path):
    *made, (table, normalize, drops) = CASES[case]
    with LLM(folder(tmp_path, *made)) as llm:
        got = np.stack([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
        np.testing.assert_allclose(got, means(table, normalize, drops), rtol=1e-5, atol=1e-6)
        if drops:
            assert "the text is empty" in line(lambda: llm.embed("unheard", use_tqdm=False), RequestError)
        assert llm.embed("the the the", truncate_prompt_tokens=2, use_tqdm=False)[0].prompt_token_ids == [2, 2]


def test_over_devices(tmp_path):
    with LLM(folder(tmp_path, {"embeddings": TABLE}, OWN), mesh="data=4") as llm:
        got = np.stack([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(got, means(TABLE, False, True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"table": TABLE}, "a table of vectors is embedding.weight, or embeddings"),
        ({"embeddings": TABLE, "weights": FACTORS[:3]}, "must have one number of each token"),
        ({"embeddings": TABLE[:2], "mapping": MAPPING + 1}, "mapping has rows beyond the 2 that there are"),
    ],
)
def test_what_is_no_table(tensors, problem, tmp_path):
    assert problem in line(lambda: LLM(folder(tmp_path, tensors, OWN)), CheckpointError)
