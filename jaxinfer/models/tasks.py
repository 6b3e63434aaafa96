"""What a model is for: text, or vectors and classes of whole texts, which any body's hidden states make."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxinfer.errors import CheckpointError
from jaxinfer.models.architecture import Architecture

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from jaxinfer.layers.classifier_config import ClassifierConfig
    from jaxinfer.models.body import Body
    from jaxinfer.models.config import ConfigReader, ModelConfig
    from jaxinfer.models.sources import Source
    from jaxinfer.models.weights import ParamMapping

GENERATE, EMBED, CLASSIFY = "generate", "embed", "classify"
TASK = "jaxinfer_task"  # beside the fields of a config.json, where it is not to generate
BOTH_WAYS = "use_bidirectional_attention"
# What names of classes end with, by what they can be loaded for: without their head, or with it.
CLASSIFIER = ("ForSequenceClassification",)
BODIES = ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM", "ForConditionalGeneration")
ENDINGS = {EMBED: BODIES, CLASSIFY: CLASSIFIER}
MOST_LABELS = 2**16


def with_task(data: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A config.json's content of which the model is made for a task."""
    return {**data, TASK: task}


def wanted_task(data: Mapping[str, Any]) -> str:
    """That of a config.json's content, see `with_task`. Raises CheckpointError."""
    task = data.get(TASK, GENERATE)
    if task not in (GENERATE, EMBED, CLASSIFY):
        raise CheckpointError(f"{TASK} is {task!r:.100}: it must be {GENERATE}, {EMBED} or {CLASSIFY}")
    return str(task)


def stem(name: str) -> str:
    """Of a class's name, without what it ends with. Where a model that sees has the name, that of its text model is
    longer."""
    return re.sub(f"(Text)?({'|'.join((*BODIES[::-1], *CLASSIFIER))})$", "", name)


def for_task(architecture: Architecture, task: str) -> Architecture:
    """One that encodes, without its head for words, and with its head for classes where these are wanted."""

    def parse(fields: ConfigReader) -> ModelConfig:
        # Without a head of its own it makes none, and what a file has of one is left aside.
        config = replace(architecture.parse(fields), tie_word_embeddings=True)
        if architecture.both_ways is not None and fields.boolean(BOTH_WAYS, False):
            config = architecture.both_ways(config)
        if task == CLASSIFY:
            head = architecture.classifier or last_token
            config = replace(config, classifier=head(fields, config))
        return config

    def build(config: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Body:
        from jaxinfer.layers.classifier import Classifier

        module = architecture.build(config, dtype=dtype, rngs=rngs)
        if config.classifier is not None:
            module.classifier = Classifier(config.classifier, config.output_size, dtype=dtype, rngs=rngs)
        return module

    build.__module__ = architecture.build.__module__  # whose it is, see Declared
    return replace(architecture, parse=parse, build=build, weights=lambda config: _weights(architecture, config))


def _weights(architecture: Architecture, config: ModelConfig) -> ParamMapping:
    from jaxinfer.models.sources import Tensor

    mapping, head = architecture.weights(config), config.classifier

    def source(name: str) -> Source:
        part = re.fullmatch(r"classifier\.(dense|norm|out)(\..+)", name)
        return mapping.source(name) if part is None else Tensor(getattr(head, part[1]) + part[2])

    return replace(mapping, source=source, beside=(*mapping.beside, r"lm_head\..+"))


def last_token(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """The head of decoders in transformers: of the last token that is not padding."""
    from jaxinfer.layers.classifier_config import LAST_BUT_PADDING, ClassifierConfig

    padding = fields.data.get("pad_token_id")
    return ClassifierConfig(
        num_labels(fields),
        LAST_BUT_PADDING,
        out="score",
        out_bias=False,
        padding_id=None if padding is None else fields.integer("pad_token_id", minimum=-1),
    )


def of_pooler(dense: str) -> Callable[[ConfigReader, ModelConfig], ClassifierConfig]:
    """The head of BERT and its kin, of the pooler's vector. dense: the name of the pooler's matrix."""

    def head(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
        from jaxinfer.layers.classifier_config import ClassifierConfig

        return ClassifierConfig(num_labels(fields), dense=dense)

    return head


def num_labels(fields: ConfigReader) -> int:
    """How many classes there are: what `id2label` names, or `num_labels`, or 2."""
    names = fields.data.get("id2label")
    if names is None:
        return fields.integer("num_labels", 2, maximum=MOST_LABELS)
    if not isinstance(names, Mapping) or {str(i) for i in range(len(names))} != names.keys() or not names:
        raise fields.error("id2label", 'it must name each class by its number, from "0" on')
    return len(names)
