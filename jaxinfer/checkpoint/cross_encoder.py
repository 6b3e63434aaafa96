"""Models that score a pair of texts, a query and a document: what their folders say besides a model with classes.

Format: that of sentence-transformers up to 6.2, and the fields that vLLM reads of rerankers that are language models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.files import read_json
from jaxinfer.checkpoint.sentence import MODULES, lengths, modules, said
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.vectors import TORCH_ACTIVATIONS
from jaxinfer.models.config import ConfigReader

METHODS = ("from_2_way_softmax", "no_post_processing")
# Where nothing is said, of one class; of several there is none.
DEFAULT_ACTIVATION = "Sigmoid"


@dataclass(frozen=True)
class CrossEncoderModel:
    """What is said of one.

    transformer: the folder of the model itself.
    activation: of scores, a name in TORCH_ACTIVATIONS; None: nothing is said.
    tokens: ids of tokens whose logits are the classes, or the tokens themselves; none: the model has classes.
    difference: of two of them, the second's logit less the first's is the only class.
    conversation: a pair is one, of a query and a document, by the checkpoint's chat template.
    original_qwen3: it is one by the template of Qwen3-Reranker.
    prompts, default_prompt, max_seq_length, lower_case: as in SentenceModel.
    """

    transformer: Path
    activation: str | None = None
    tokens: tuple[int | str, ...] = ()
    difference: bool = False
    conversation: bool = False
    original_qwen3: bool = False
    prompts: Mapping[str, str] | None = None
    default_prompt: str | None = None
    max_seq_length: int | None = None
    lower_case: bool = False


def read_cross_encoder(folder: Path, config: Mapping[str, Any]) -> CrossEncoderModel:
    """config: config.json's content. Raises CheckpointError for what can't be done, by name."""
    fields = ConfigReader(config, str(folder / "config.json"))
    found = {"activation": _activation(fields), **lengths(folder, "sequence-classification"), **_tokens(fields)}
    if os.path.lexists(folder / MODULES):
        _, *others = modules(folder)
        if others:
            kinds = ", ".join(module.kind for module in others)
            raise CheckpointError(f"{folder / MODULES}: {kinds} after a model with classes is not supported here")
        found |= _spoken(folder)
    return CrossEncoderModel(folder, **found)


def scores_by_logits(folder: Path) -> CrossEncoderModel | None:
    """Of a folder whose modules are a language model and what makes a score of its logits; else None."""
    if not os.path.lexists(folder / MODULES):
        return None
    transformer, *others = modules(folder)
    if [module.kind for module in others] != ["LogitScore"]:
        return None
    fields = ConfigReader(read_json(others[0].folder / "config.json"), str(others[0].folder / "config.json"))
    fields.refuse("module_input_name", "causal_logits")
    true = fields.integer("true_token_id", minimum=0)
    false = None if fields.data.get("false_token_id") is None else fields.integer("false_token_id", minimum=0)
    found = {**lengths(transformer.folder, "text-generation"), **_spoken(folder)}
    tokens = (true,) if false is None else (false, true)
    found |= {"tokens": tokens, "difference": false is not None}
    return CrossEncoderModel(transformer.folder, **found)


def _activation(fields: ConfigReader) -> str | None:
    """In both spellings, of versions from 4 on and before."""
    new = fields.data.get("sentence_transformers")
    if isinstance(new, Mapping) and new.get("activation_fn") is not None:
        return _named(ConfigReader(new, f"{fields.where}: sentence_transformers"), "activation_fn")
    old = "sbert_ce_default_activation_function"
    return None if fields.data.get(old) is None else _named(fields, old)


def _named(fields: ConfigReader, name: str) -> str:
    value = fields.data[name]
    activation = value.rpartition(".")[2] if isinstance(value, str) and value.startswith("torch.nn.") else ""
    if activation not in TORCH_ACTIVATIONS:
        raise fields.error(name, f"supported are torch.nn's {', '.join(TORCH_ACTIVATIONS)}")
    return activation


def _spoken(root: Path) -> dict[str, Any]:
    """What is said for all modules together."""
    fields, found = said(root, "CrossEncoder")
    spoken = {name: found[name] for name in ("prompts", "default_prompt")}
    if fields.data.get("activation_fn") is not None:
        spoken["activation"] = _named(fields, "activation_fn")
    return spoken


def _tokens(fields: ConfigReader) -> dict[str, Any]:
    """A language model's head for a few tokens: `classifier_from_token`, as vLLM has it."""
    words, original = fields.data.get("classifier_from_token"), fields.boolean("is_original_qwen3_reranker", False)
    if words is None and not original:
        return {}
    words = ["no", "yes"] if words is None else words
    if not isinstance(words, list) or not words or not all(type(word) in (str, int) for word in words):
        raise fields.error("classifier_from_token", 'it must be a list of tokens, as ["no", "yes"]')
    method = fields.choice("method", METHODS[0] if original else "", METHODS)
    difference = method == METHODS[0]
    if difference and len(words) != 2:
        raise fields.error("classifier_from_token", f"{method} is of two tokens, the second of which is the answer")
    return {"tokens": tuple(words), "difference": difference, "original_qwen3": original}
