"""Every family against transformers, in float32, by plain forwards: its variants, and mutants that have to be seen."""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models import model as models
from jaxinfer.models import registry
from tests.checkpoints import write_tokenizer
from tests.models.families import VOCAB, Variant, mutants, speaker, variants
from tests.models.table import families, row

VARIANTS, MUTANTS = variants(), mutants()
TOLERANCE = 1e-4  # of the largest logit
PROMPT, TOKENS = 6, 70
# Of matrices, and of what vectors differ by from what they start as. Large ones show caps, small ones a wrong epsilon.
SCALES = {"large": (0.3, 0.2), "small": (0.05, 0.05)}


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
    folder = root / ("greedy" if greedy else "families") / f"{name}-{scale}"
    if not folder.exists():
        pytest.importorskip("torch", reason="torch makes the reference checkpoints")
        make(VARIANTS[name], *SCALES[scale], folder, greedy)
    data = np.load(folder / "reference.npz")
    return Reference(folder, data["tokens"].tolist(), data["logits"], data["gaps"])


def make(variant: Variant, matrices: float, vectors: float, folder: Path, greedy: bool = False) -> None:
    import torch
    import transformers

    torch.manual_seed(1)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, variant.config)(**(ids | variant.fields))
    text = config.get_text_config()
    text.eos_token_id, text.pad_token_id = None, variant.fields.get("text_config", {}).get("pad_token_id")
    config._attn_implementation = text._attn_implementation = "eager"
    model = getattr(transformers, variant.auto).from_config(config).eval().float()
    spoken = speaker(model)
    model.generation_config = spoken.generation_config = transformers.GenerationConfig(max_new_tokens=TOKENS - PROMPT)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * matrices if weight.ndim > 1 else weight + noise * vectors)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.copy_(buffer + torch.randn_like(buffer) * vectors)
        tokens = torch.tensor(np.random.default_rng(2).integers(0, VOCAB, (1, TOKENS)))
        if greedy:
            prompt = tokens[:, :PROMPT]
            tokens = spoken.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
        logits = spoken(tokens).logits[0]
        best = logits.topk(2).values
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    model.save_pretrained(building)
    write_tokenizer(building)
    gaps = (best[:, 0] - best[:, 1]).numpy()
    np.savez(building / "reference.npz", tokens=tokens[0].numpy(), logits=logits.numpy(), gaps=gaps)
    if variant.change is not None:
        variant.change(building)
    building.rename(folder)


@lru_cache(1)
def program(model: Any) -> Any:
    """One for all weights of a model. It isn't kept for long: see MOST in kept.py."""
    return jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])


class Model(NamedTuple):
    """Of one configuration, hashed by itself."""

    abstract: models.AbstractModel

    def __hash__(self) -> int:
        return id(self.abstract)

    def bind(self, params: Any) -> Any:
        return self.abstract.bind(params)


def logits(model: Model, found: Reference) -> np.ndarray:
    with Checkpoint(found.folder) as checkpoint:
        params = load_params(model.abstract, checkpoint, jax.devices()[0])
    return np.asarray(program(model)(params, ForwardBatch.of_sequences([found.tokens])))


def abstract(found: Reference) -> Model:
    config = json.loads((found.folder / "config.json").read_text())
    return Model(models.AbstractModel.from_config(config, "float32"))


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


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
