"""What `jaxinfer compare` says of models that make vectors or classes."""

import json

import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.compare import compare
from jaxinfer.compare_pooled import agreement
from jaxinfer.demo import CLASSIFIER_DIR, ENCODER_DIR
from jaxinfer.demo.questions import held_out_questions

TEXTS = [question.text for question in held_out_questions(24, 2)]


def test_agreement():
    """Against Spearman's coefficient as it is defined."""
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=(9, 5)).astype(np.float32)
    ours = theirs + 0.3 * rng.normal(size=theirs.shape).astype(np.float32)
    nearest, rank = agreement(ours, theirs)
    same, coefficients = [], []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        near = [
            [np.dot(x[i], x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in others] for x in (ours, theirs)
        ]
        ranks = [[sorted(own).index(value) for value in own] for own in near]
        same.append(ranks[0].index(7) == ranks[1].index(7))
        coefficients.append(1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (8 * (64 - 1)))
    assert (nearest, rank) == (pytest.approx(np.mean(same)), pytest.approx(np.mean(coefficients)))
    assert 0 < nearest <= 1
    assert 0 < rank < 1
    assert agreement(theirs, theirs) == (1, pytest.approx(1))
    assert agreement(ours[:2], theirs[:2]) == (1, 1)


@pytest.mark.slow
def test_vectors():
    base, int8, w8a8 = compare(ENCODER_DIR, ["int8", "int8-w8a8"], TEXTS)
    assert (base.cosine_min, base.nearest, base.texts) == (pytest.approx(1), 1, 24)
    assert 0.9 < w8a8.cosine_min < int8.cosine_min < 1
    assert w8a8.cosine_min < w8a8.cosine_mean < 1
    assert 0.9 < w8a8.rank < int8.rank < 1
    assert int8.weight_bytes < 0.4 * base.weight_bytes
    assert base.rate > 0
    vectors = []
    for options in ({"dtype": "float32"}, {"quantization": "int8"}):
        with LLM(ENCODER_DIR, **options) as llm:
            vectors.append([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    cosines = [float(np.dot(a, b)) for a, b in zip(*vectors, strict=True)]
    assert int8.cosine_min == pytest.approx(min(cosines), abs=1e-6)
    with pytest.raises(ValueError, match="another model"):
        list(compare(ENCODER_DIR, [str(CLASSIFIER_DIR)], TEXTS))


@pytest.mark.slow
def test_the_command(cli):
    asked = "compare", CLASSIFIER_DIR, "--schemes", "int8,kv-int8", "--questions", 13, "--max-tokens", 200
    code, out, err = cli(*asked, "--json")
    report = json.loads(out)
    base, price = report["prices"]
    assert (base["scheme"], base["same"], base["change_max"], base["exact_match"]) == (None, 1, 0, 1)
    assert price["same"] == 1
    assert 0 < price["change_mean"] <= price["change_max"] < 0.2
    assert 5 < price["texts"] < 30
    assert (code, "models that classify have no use for it" in err) == (1, True)
    assert (
        "worst change" in cli("compare", CLASSIFIER_DIR, "--schemes", "int8", "--questions", 0, "--max-tokens", 99).out
    )
