"""Every family against transformers, in float32, by plain forwards: its variants, and mutants that have to be seen."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models import model as models
from jaxinfer.models import registry
from tests.models.families import VOCAB, Variant, mutants, speaker, variants
from tests.models.references import SCALES, Model, error, found_or_made, random_model, save
from tests.models.table import families, row

VARIANTS, MUTANTS = variants(), mutants()
TOLERANCE = 1e-4  # of the largest logit
PROMPT, TOKENS = 6, 70


class Reference(NamedTuple):
    """What transformers computes.

    folder: the checkpoint.
    tokens: any, or a prompt and what comes after it, greedily.
    logits: f32[TOKENS, VOCAB]. gaps: between the two best of each.
    """

    folder: Path
    tokens: list[int]
    logits: np.ndarray
    gaps: np.ndarray


def reference(root: Path, name: str, scale: str, greedy: bool = False) -> Reference:
    """Made, or found below `root`. greedy: tokens are, which takes longer."""

    def make_one(folder: Path) -> None:
        make(VARIANTS[name], *SCALES[scale], folder, greedy)

    folder = found_or_made(root / ("greedy" if greedy else "families"), name, scale, make_one)
    data = np.load(folder / "reference.npz")
    return Reference(folder, data["tokens"].tolist(), data["logits"], data["gaps"])


def make(variant: Variant, matrices: float, vectors: float, folder: Path, greedy: bool = False) -> None:
    import torch
    import transformers

    model = random_model(variant, matrices, vectors)
    spoken = speaker(model)
    model.generation_config = spoken.generation_config = transformers.GenerationConfig(max_new_tokens=TOKENS - PROMPT)
    with torch.no_grad():
        tokens = torch.tensor(np.random.default_rng(2).integers(0, VOCAB, (1, TOKENS)))
        if greedy:
            prompt = tokens[:, :PROMPT]
            tokens = spoken.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
        logits = spoken(tokens).logits[0]
        best = logits.topk(2).values
    gaps = (best[:, 0] - best[:, 1]).numpy()
    save(model, variant, folder, tokens=tokens[0].numpy(), logits=logits.numpy(), gaps=gaps)


def logits(model: Model, found: Reference) -> np.ndarray:
    with Checkpoint(found.folder) as checkpoint:
        params = load_params(model.abstract, checkpoint, jax.devices()[0])
    return np.asarray(model.program(params, ForwardBatch.of_sequences([found.tokens])))


def abstract(found: Reference) -> Model:
    config = json.loads((found.folder / "config.json").read_text())
    return Model(models.AbstractModel.from_config(config, "float32"), lambda module, batch: module(batch, None)[0])


# In each run one variant of a family, or few; in CI all.
ALL = [pytest.param(name, marks=pytest.mark.slow if "-" in name else ()) for name in VARIANTS]


@pytest.mark.parametrize("name", ALL)
def test_logits(checkpoints, name):
    model = None
    for scale in SCALES:
        found = reference(checkpoints.root, name, scale)
        model = abstract(found) if model is None else model
        ours = logits(model, found)
        assert error(ours, found.logits) < TOLERANCE, scale


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(checkpoints, monkeypatch, name):
    mutant, parse = MUTANTS[name], registry.parse_config
    monkeypatch.setattr(registry, "parse_config", lambda data: (parse(data)[0], mutant.change(parse(data)[1])))
    founds = [reference(checkpoints.root, mutant.variant, scale) for scale in SCALES]
    model = abstract(founds[0])
    assert any(error(logits(model, found), found.logits) > 100 * TOLERANCE for found in founds)


def test_the_table_in_the_documents_is_of_these():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for family in families():
        line = row(*family, "")
        assert line[: line.rindex("|  |")] in text, "python -m tests.models.table > docs/families.md"
