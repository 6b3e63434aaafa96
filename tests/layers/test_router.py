"""The router's rules in numpy, one token at a time."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.router import Routing, route

EXPERTS, TOKENS = 12, 40
RNG = np.random.default_rng(0)


def by_numpy(logits, routing, bias):
    scores = np.exp(logits - logits.max())
    scores = scores / scores.sum() if routing.scores == "softmax" else 1 / (1 + np.exp(-logits))
    choice = logits if routing.among_chosen else scores + bias
    groups = choice.reshape(routing.groups, -1)
    worth = np.sort(groups, axis=1)[:, -routing.group_best :].sum(axis=1)
    kept = np.argsort(-worth, kind="stable")[: routing.groups_kept]
    allowed = np.isin(np.arange(EXPERTS) // groups.shape[1], kept)
    best = [i for i in np.argsort(-choice, kind="stable") if allowed[i]][: routing.top_k]
    shares = scores[best]
    if routing.among_chosen:
        shares = np.exp(logits[best] - logits[best].max())
        shares /= shares.sum()
    if routing.sparsemixer is not None:
        shares = []
        for k, expert in enumerate(best):
            left = [i for i in range(EXPERTS) if i not in best[:k]]
            far = [(logits[expert] - logits[i]) / max(abs(logits[i]), logits[expert]) for i in left]
            near = [logits[i] for i, gap in zip(left, far, strict=True) if gap <= 2 * routing.sparsemixer]
            shares.append(1 / np.exp(near - logits[expert]).sum())
        shares = np.array(shares)
    if routing.normalized:
        shares = shares / shares.sum()
    return best, shares * routing.scale


RULES = [
    Routing(EXPERTS, top_k, scores=scores, normalized=normalized, scale=scale, **more)
    for top_k, scores, (normalized, scale), more in itertools.product(
        (1, 4),
        ("softmax", "sigmoid"),
        ((False, 1.0), (True, 2.5)),
        (
            {},
            {"bias": True},
            {"bias": True, "groups": 4, "groups_kept": 2, "group_best": 2},
            {"groups": 3, "groups_kept": 1},
        ),
    )
]
RULES.append(Routing(EXPERTS, 3, among_chosen=True))
RULES += [Routing(EXPERTS, top_k, sparsemixer=jitter) for top_k in (1, 2, 3) for jitter in (0.0, 0.01, 0.2)]


@pytest.mark.parametrize("routing", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("mean", [-8, 0, 8])
def test_one_token_at_a_time(routing, mean):
    """All logits may be negative, and a bias may turn everything around."""
    logits = RNG.normal(mean, 2, (TOKENS, EXPERTS)).astype(np.float32)
    bias = RNG.normal(0, 0.3, EXPERTS).astype(np.float32) if routing.bias else np.zeros(EXPERTS, np.float32)
    experts, shares = route(jnp.asarray(logits), routing, jnp.asarray(bias) if routing.bias else None)
    for i in range(TOKENS):
        best, right = by_numpy(logits[i].astype(np.float64), routing, bias)
        assert np.asarray(experts)[i].tolist() == best
        np.testing.assert_allclose(np.asarray(shares)[i], right, rtol=1e-5)
