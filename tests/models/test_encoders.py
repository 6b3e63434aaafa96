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
from jaxinfer.models.tasks import CLASSIFY, EMBED, GENERATE, with_task
from jaxinfer.sharding import make_mesh
from tests.models.families import CLASSES, VOCAB, Variant, encoder_mutants, encoders
from tests.models.references import SCALES, Model, error, found_or_made, random_model, save
from tests.models.table import encoding, row
from tests.plain import CONFIG as LLAMA
from tests.plain import random_tensors, write_checkpoint
from tests.refusals import line

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


BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}} | {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TEXTS = [[5, 6, 7], [8, 9, 10, 11]]


def encoded(model, params):
    """Hidden states of two texts, and classes where there are some."""
    batch = ForwardBatch.of_sequences(TEXTS, 16)

    def compute(params, batch):
        module = model.bind(params)
        hidden = module.encode(batch)
        return hidden, None if model.config.classifier is None else module.classify(hidden, batch)

    return jax.tree.map(np.asarray, jax.jit(compute)(params, batch))


def loaded(folder, config, task, placement=None, **options):
    model = AbstractModel.from_config(with_task(config, task), "float32", **options)
    with Checkpoint(folder) as checkpoint:
        return model, load_params(model, checkpoint, placement or jax.devices()[0])


def test_weights_are_quantized_and_split_like_others(tmp_path):
    folder = write_checkpoint(tmp_path / "model", BERT, random_tensors(with_task(BERT, CLASSIFY)))
    model, params = loaded(folder, BERT, CLASSIFY)
    hidden, classes = encoded(model, params)
    assert (hidden.shape, classes.shape, classes.dtype) == ((16, 256), (2, 2), np.float32)
    packed, packed_params = loaded(folder, BERT, CLASSIFY, quantization="int8")
    assert {"layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"} <= packed.quantized.keys()
    assert "embeddings.words.weight" not in packed.quantized
    rounded, _ = encoded(packed, packed_params)
    cosines = (hidden * rounded).sum(axis=1) / np.linalg.norm(hidden, axis=1) / np.linalg.norm(rounded, axis=1)
    assert 0.99 < cosines[:7].min() < 1 - 1e-7
    mesh = make_mesh("fsdp=2,tensor=2", jax.devices(), 4, 4, 256)
    _, split = loaded(folder, BERT, CLASSIFY, mesh)
    assert len(split["layers.0.mlp.up_proj.weight"].sharding.device_set) == 4
    for name, values in params.items():
        np.testing.assert_array_equal(np.asarray(split[name]), np.asarray(values), err_msg=name)


def test_heads_that_are_missing_or_others(tmp_path):
    """A fresh head is never made; of a body what is beside it is known by name."""
    tensors = random_tensors(with_task(BERT, CLASSIFY))
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    folder = write_checkpoint(tmp_path / "body", BERT, without)
    assert "missing tensors: classifier.bias, classifier.weight" in line(lambda: loaded(folder, BERT, CLASSIFY))
    body = BERT | {"architectures": ["BertForMaskedLM"]}
    hidden, classes = encoded(*loaded(folder, body, EMBED))
    assert classes is None
    whole = write_checkpoint(tmp_path / "whole", BERT, tensors)
    np.testing.assert_array_equal(hidden, encoded(*loaded(whole, BERT, CLASSIFY))[0])
    assert "unknown tensors: classifier.bias, classifier.weight" in line(lambda: loaded(whole, body, EMBED))
    three = BERT | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    assert "wrong shapes: classifier.bias [2] instead of [3]" in line(lambda: loaded(whole, three, CLASSIFY))


def test_a_language_model_encodes_without_its_head(tmp_path):
    folder = write_checkpoint(tmp_path / "model", LLAMA, tensors := random_tensors(LLAMA))
    model, params = loaded(folder, LLAMA, EMBED)
    assert not any("lm_head" in name for name in params)
    hidden, _ = encoded(model, params)
    language, all_params = loaded(folder, LLAMA, GENERATE)
    batch = ForwardBatch.of_sequences(TEXTS, 16)
    logits = jax.jit(lambda params: language.bind(params)(batch, None)[0])(all_params)
    np.testing.assert_allclose(hidden[:7] @ tensors["lm_head.weight"].T, logits[:7], rtol=1e-4, atol=1e-4)
