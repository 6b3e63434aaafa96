"""Models of transformers in which every parameter is random, saved with what they compute, at two scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer.models import model as models
from jaxinfer.models import registry
from tests.checkpoints import building, write_tokenizer
from tests.models.families import Mutant, Variant

# Of matrices, and of what vectors differ by from what they start as. Large ones show caps, small ones a wrong epsilon.
SCALES = {"large": (0.3, 0.2), "small": (0.05, 0.05)}


def found_or_made(root: Path, name: str, scale: str, make: Callable[[Path], None]) -> Path:
    """The folder of a variant, below `root`."""
    folder = root / f"{name}-{scale}"
    if not folder.exists():
        pytest.importorskip("torch", reason="torch makes the reference checkpoints")
        make(folder)
    return folder


def random_model(variant: Variant, matrices: float, vectors: float) -> Any:
    """Transformers' model, with random parameters, and buffers that matter."""
    import torch
    import transformers

    torch.manual_seed(1)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, variant.config)(**(ids | variant.fields))
    text = config.get_text_config()
    text.eos_token_id, text.pad_token_id = None, variant.fields.get("text_config", variant.fields).get("pad_token_id")
    config._attn_implementation = text._attn_implementation = "eager"
    model = getattr(transformers, variant.auto).from_config(config).eval().float()
    randomize(model, matrices, vectors)
    return model


def randomize(model: Any, matrices: float, vectors: float) -> None:
    """Every parameter, and the buffers that matter: by these standard deviations, around what vectors are."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * matrices if weight.ndim > 1 else weight + noise * vectors)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias", "layer_scalar")):
                buffer.copy_(buffer + torch.randn_like(buffer) * vectors)


def save(model: Any, variant: Variant, folder: Path, **arrays: np.ndarray) -> None:
    """The checkpoint, and what it computes as reference.npz."""
    with building(folder) as own:
        model.save_pretrained(own)
        write_tokenizer(own)
        np.savez(own / "reference.npz", **arrays)
        if variant.change is not None:
            variant.change(own)


def mutate(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """From now on configurations that are read have its rule broken."""
    parse = registry.parse_config
    monkeypatch.setattr(registry, "parse_config", lambda data: (parse(data)[0], mutant.change(parse(data)[1])))


class Model:
    """Of one configuration, hashed by itself: one program for all its weights."""

    def __init__(self, abstract: models.AbstractModel, compute: Callable[[Any, Any], Any]):
        self.abstract = abstract
        self.program = jax.jit(lambda params, batch: compute(abstract.bind(params), batch))


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
