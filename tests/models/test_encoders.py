"""Every encoder, and every head for classes, against transformers, in float32: alone, and packed with others."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models import registry
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.tasks import CLASSIFY, EMBED, with_task
from tests.models.families import CLASSES, VOCAB, Variant, encoder_mutants, encoders
from tests.models.references import SCALES, Model, error, found_or_made, random_model, save
from tests.models.table import encoding, row

VARIANTS, MUTANTS = encoders(), encoder_mutants()
TOLERANCE = 1e-5  # of the largest value
SIZES = (5, 1, 40, 17)  # tokens of texts
LENGTH = 70  # of the stream, with padding


class Reference(NamedTuple):
    """What transformers computes.

    folder: the checkpoint.
    texts: token ids. types: of each of them, where the family has such.
    hidden: f32[tokens of all, D]. classes: f32[texts, C], where there is a head.
    """

    folder: Path
    texts: list[list[int]]
    types: list[list[int]] | None
    hidden: np.ndarray
    classes: np.ndarray | None


@cache
def texts() -> tuple[list[list[int]], list[list[int]]]:
    """Their tokens, and their types: the second half is another text."""
    rng = np.random.default_rng(3)
    tokens = [rng.integers(0, VOCAB, size).tolist() for size in SIZES]
    return tokens, [[0] * (size // 2) + [1] * (size - size // 2) for size in SIZES]


def reference(root: Path, name: str, scale: str) -> Reference:
    """Made, or found below `root`."""
    folder = found_or_made(root / "encoders", name, scale, lambda folder: make(VARIANTS[name], *SCALES[scale], folder))
    data = np.load(folder / "reference.npz")
    tokens, types = texts()
    return Reference(folder, tokens, types if data["typed"] else None, data["hidden"], data.get("classes"))


def make(variant: Variant, matrices: float, vectors: float, folder: Path) -> None:
    import torch

    model = random_model(variant, matrices, vectors)
    typed = getattr(model.config, "type_vocab_size", 0) > 1
    results = []
    with torch.no_grad():
        for tokens, types in zip(*texts(), strict=True):
            given = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens))}
            given |= {"token_type_ids": torch.tensor([types])} if typed else {}
            body = model.base_model(**given).last_hidden_state[0].numpy()
            results.append((body, model(**given).logits[0].numpy() if variant.auto == CLASSES else None))
    hidden, classes = zip(*results, strict=True)
    more = {} if classes[0] is None else {"classes": np.stack(classes)}
    save(model, variant, folder, hidden=np.concatenate(hidden), typed=np.asarray(typed), **more)


def abstract(found: Reference) -> Model:
    config = json.loads((found.folder / "config.json").read_text())
    task = EMBED if found.classes is None else CLASSIFY
    model = AbstractModel.from_config(with_task(config, task), "float32")

    def compute(module, batch):
        hidden = module.encode(batch)
        return hidden, None if model.config.classifier is None else module.classify(hidden, batch)

    return Model(model, compute)


def load(model: Model, found: Reference):
    with Checkpoint(found.folder) as checkpoint:
        return load_params(model.abstract, checkpoint, jax.devices()[0])


def computed(model: Model, params, found: Reference, which: list[int]):
    """Of some of the texts, in one batch."""
    rows = [found.texts[i] for i in which] + [[]] * (len(SIZES) - len(which))
    types = None if found.types is None else [found.types[i] for i in which]
    hidden, classes = model.program(params, ForwardBatch.of_sequences(rows, LENGTH, types))
    count = sum(map(len, rows))
    return np.asarray(hidden)[:count], None if classes is None else np.asarray(classes)[: len(which)]


def worst(found: Reference, hidden: np.ndarray, classes: np.ndarray | None) -> float:
    assert (classes is None) == (found.classes is None)
    return max(error(hidden, found.hidden), 0 if classes is None else error(classes, found.classes))


def worst_of(root: Path, name: str) -> float:
    """Of a variant, at both scales, packed."""
    founds = [reference(root, name, scale) for scale in SCALES]
    model = abstract(founds[0])
    every = list(range(len(SIZES)))
    return max(worst(found, *computed(model, load(model, found), found, every)) for found in founds)


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_classes(checkpoints, name):
    model = None
    for scale in SCALES:
        found = reference(checkpoints.root, name, scale)
        model = abstract(found) if model is None else model
        params = load(model, found)
        together = computed(model, params, found, list(range(len(SIZES))))
        assert worst(found, *together) < TOLERANCE, scale
        alone = [computed(model, params, found, [i]) for i in range(len(SIZES))]
        hidden, classes = zip(*alone, strict=True)
        joined = None if classes[0] is None else np.concatenate(classes)
        assert worst(found, np.concatenate(hidden), joined) < TOLERANCE, scale


def test_the_table_in_the_documents_is_of_these():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for family in encoding():
        line = row(*family, "")
        assert line[: line.rindex("|  |")] in text, "python -m tests.models.table > docs/families.md"


def test_every_encoder_has_variants():
    assert {model_type for model_type, *_ in encoding()} >= set(registry.encoder_types())


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(checkpoints, monkeypatch, name):
    mutant, parse = MUTANTS[name], registry.parse_config
    monkeypatch.setattr(registry, "parse_config", lambda data: (parse(data)[0], mutant.change(parse(data)[1])))
    founds = [reference(checkpoints.root, mutant.variant, scale) for scale in SCALES]
    model = abstract(founds[0])
    every = list(range(len(SIZES)))
    assert any(worst(found, *computed(model, load(model, found), found, every)) > 10 * TOLERANCE for found in founds)
